from __future__ import annotations

import onnx_ir as ir
from golden import context, parse

from graphopt.registry import pass_class

STRIP = pass_class("strip-metadata")()
TEXT = """g (bool c, float[2] x) => (float[2] y) { t = If (c) <
  then_branch = one () => (float[2] p) { p = Relu(x) }, else_branch = two () => (float[2] q) { q = Neg(x) }>
  y = Abs(t) }"""


def noted() -> ir.Model:
    """A model with notes of an exporter everywhere, and others beside them."""
    model = parse(TEXT)
    model.doc_string, model.metadata_props["classes"] = "what it is for", "cat,dog"
    for holder in (model.graph, model.graph.inputs[0], *model.graph.all_nodes()):
        holder.metadata_props.update({"pkg.torch.onnx.stack_trace": "File", "graphopt.folded_from": "a", "mine": "b"})
    for node in model.graph.all_nodes():
        node.metadata_props["namespace"] = ": Net/relu"
        node.doc_string = "File net.py, line 3"
        for value in node.outputs:
            value.metadata_props["pkg.onnxscript.optimizer.folded_from"] = "['a']"
    return model


def test_notes_of_exporters_go() -> None:
    model = noted()
    result = STRIP.run(model, context())
    assert result.changed
    assert (model.doc_string, dict(model.metadata_props)) == ("what it is for", {"classes": "cat,dog"})
    nodes = list(model.graph.all_nodes())
    assert len(nodes) == 4
    for holder in (model.graph, model.graph.inputs[0], *nodes):
        assert dict(holder.metadata_props) == {"graphopt.folded_from": "a", "mine": "b"}
    assert not any(value.metadata_props for node in nodes for value in node.outputs)
    assert not any(node.doc_string for node in nodes)
    assert not STRIP.run(model, context()).changed


def test_fold_keeps_them_when_asked() -> None:
    model = noted()
    pass_class("fold")(keep_metadata=True).run(model, context())
    assert "pkg.torch.onnx.stack_trace" in model.graph.metadata_props
    pass_class("fold")().run(model, context())
    assert "pkg.torch.onnx.stack_trace" not in model.graph.metadata_props
