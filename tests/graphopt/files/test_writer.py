"""Saved files, and sessions that are timed, carry the shapes by which runtimes choose their fusions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from fusions import fused

from graphopt.errors import ModelError
from graphopt.executor import Session
from graphopt.files import shape_inference
from graphopt.model import infer_shapes, load, save

DYNAMIC = """<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>
g (float[batch, 3, h, w] x, bool c) => (float[batch, a] y, z) <float[4,3,3,3] k, int64 one = {1}>
{ t = Conv (x, k) u = Relu (t) p = GlobalAveragePool (u) y = Flatten (p) l = Constant <value_float = 1.0> ()
  i = If (c) <then_branch = yes () => (float[q] r) { m = Relu (y) r = Identity (m) },
              else_branch = no () => (float[q] r) { r = Neg (y) }>
  v = com.example.Mystery (i) z = Add (v, l) }"""


def model_of(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    for value in model.graph.initializers.values():
        if value.const_value is None or value.const_value.size == 0:
            raise AssertionError(value.name)
    return model


def dims(info: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]


@pytest.fixture
def dynamic() -> ir.Model:
    weights = ", ".join(["0.5"] * 108)
    return model_of(DYNAMIC.replace("float[4,3,3,3] k", f"float[4,3,3,3] k = {{{weights}}}"))


@pytest.mark.parametrize("external", [False, True])
def test_shapes_are_stored_that_readers_do_not_find(dynamic: ir.Model, tmp_path: Path, external: bool) -> None:
    save(dynamic, tmp_path / "m.onnx", external=external)
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {info.name: dims(info) for info in graph.value_info}
    # Neither constants, whose shapes are known, nor inputs and outputs, nor what stands behind an unknown operator.
    # Of the results of Relu and of pooling a reader knows all when it knows that of the convolution.
    assert stored.keys() == {"t", "i"}
    # That a convolution and the activation behind it have one unknown size is what runtimes ask.
    assert stored["t"] == ["batch", 4, *stored["t"][2:]]
    assert all(isinstance(d, str) and d for d in stored["t"][2:])
    read = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx")).graph
    found = {info.name: dims(info) for info in read.value_info}
    assert found["u"] == stored["t"]
    assert found["p"] == ["batch", 4, 1, 1]
    (branch,) = [a.g for n in graph.node for a in n.attribute if a.name == "then_branch"]
    # What it reads is declared to have an unknown size.
    assert [(v.name, dims(v)) for v in branch.value_info] == [("m", ["batch", 4])]
    assert [dims(v) for v in branch.output] == [["q"]], "what a graph declares of its outputs is not ours to change"


@pytest.mark.parametrize("external", [False, True])
def test_what_a_value_was_said_to_be_is_not_stored(dynamic: ir.Model, tmp_path: Path, external: bool) -> None:
    save(dynamic, tmp_path / "right.onnx", external=external)
    for node in dynamic.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([7, 7]), ir.TensorType(ir.DataType.INT64)
    save(dynamic, tmp_path / "again.onnx", external=external)
    first, second = (onnx.load(tmp_path / f"{n}.onnx", load_external_data=False) for n in ("right", "again"))
    assert list(first.graph.value_info) == list(second.graph.value_info)
    assert dynamic.graph.node(0).outputs[0].shape == ir.Shape([7, 7]), "saving leaves the model alone"


def test_a_graph_that_contradicts_itself_is_saved_without_shapes(
    dynamic: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the model on which a pass failed can be looked at."""

    def contradiction(*_: Any, **__: Any) -> Any:
        raise onnx.shape_inference.InferenceError("it contradicts itself")

    infer_shapes(dynamic)
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", contradiction)
    with pytest.raises(ModelError, match="contradicts itself"):
        infer_shapes(dynamic)
    save(dynamic, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert len(proto.graph.node) == len(dynamic.graph)
    assert not proto.graph.value_info


def test_loading_forgets_what_was_stored_and_saving_finds_it_again(dynamic: ir.Model, tmp_path: Path) -> None:
    save(dynamic, tmp_path / "a.onnx")
    again = load(tmp_path / "a.onnx")
    assert str(again.graph.node(0).outputs[0].shape) == "[batch,4,None,None]"
    save(again, tmp_path / "b.onnx")
    save(load(tmp_path / "b.onnx"), tmp_path / "c.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def test_a_session_that_optimises_sees_the_shapes_of_the_file(
    dynamic: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    seen: list[bytes] = []
    text = DYNAMIC[: DYNAMIC.index("  i = If")].replace("bool c", "float o").replace(", z)", ")") + "}"
    model = model_of(text.replace("float[4,3,3,3] k", f"float[4,3,3,3] k = {{{', '.join(['0.5'] * 108)}}}"))
    original = ort.InferenceSession

    def create(source: bytes, *rest: Any, **options: Any) -> Any:
        seen.append(source)
        return original(source, *rest, **options)

    monkeypatch.setattr(ort, "InferenceSession", create)
    for optimize in (True, False):
        Session(model, optimize=optimize).close()
    save(model, tmp_path / "m.onnx")
    timed, plain = (onnx.load_from_string(source) for source in seen)
    assert list(timed.graph.value_info) == list(onnx.load(tmp_path / "m.onnx").graph.value_info) != []
    assert not plain.graph.value_info


def test_no_weight_is_read_for_the_shapes(dynamic: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_inference, "SMALL", 64)
    tensor = dynamic.graph.initializers["k"].const_value
    assert tensor is not None

    def refuse(self: Any) -> bytes:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(type(tensor), "tobytes", refuse)
    clone = shape_inference.annotated(dynamic)
    assert clone.graph.initializers["k"].const_value is tensor


@pytest.mark.data
@pytest.mark.parametrize("name", ["minilm_l6", "yunet_n_dynamic"])
def test_saving_costs_no_fusion(data_dir: Path, tmp_path: Path, name: str) -> None:
    source = data_dir / "models" / f"{name}.onnx"
    save(load(source), tmp_path / "m.onnx")
    before, after = fused(source), fused(tmp_path / "m.onnx")
    assert after == before
    expected = Counter({"SkipLayerNormalization": 12, "BiasGelu": 6}) if name == "minilm_l6" else Counter(FusedConv=18)
    assert before >= expected
