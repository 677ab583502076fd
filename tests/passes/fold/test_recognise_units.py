"""Other passes understand what is written: as many units as in the graph written out, and the same outputs."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from golden import assert_close, context, random_feeds, run

from graphopt.analysis.units import analyse
from graphopt.files.opset import raise_opset
from graphopt.files.shape_inference import infer_shapes
from graphopt.model import load
from graphopt.registry import pass_class
from graphopt.rewriting.prepare import prepare


def units(model: ir.Model) -> int:
    copy = model.clone()
    prepare(copy)
    infer_shapes(copy)
    return len(analyse(copy).units)


@pytest.mark.parametrize(
    ("name", "wanted"), [("bert", {"LayerNormalization": 5, "Gelu": 2}), ("llama", {"RMSNormalization": 5})]
)
def test_an_old_export_recognised(name: str, wanted: dict[str, int], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from zoo import ZOO

    network = ZOO[name]
    names = [entry.name for entry in network.inputs]
    path = tmp_path / "old.onnx"
    torch.onnx.export(network.module(), network.example(), path, input_names=names, dynamo=False, opset_version=14)
    model = load(path)
    raise_opset(model, 23, "the test")
    pass_class("fold-constants")().run(model, context())
    infer_shapes(model)
    feeds = random_feeds(model)
    before, reference = units(model), run(model, feeds)
    for name in ("recognise-norms", "recognise-softmax", "recognise-activations"):
        pass_class(name)().run(model, context())
    assert {op: sum(node.op_type == op for node in model.graph) for op in wanted} == wanted
    assert units(model) >= before > 100
    assert_close(run(model, feeds), reference)
