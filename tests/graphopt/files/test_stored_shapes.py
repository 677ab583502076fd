"""A file tells the shapes that its readers do not find themselves, and no others."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from graphopt.files import stored_shapes
from graphopt.files.stored_shapes import keep_needed, strip_value_info


def dims(info: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]


def kept(text: str, **shapes: list[int | str]) -> dict[str, list[int | str]]:
    """The shapes that stay of `shapes`, those of float tensors of the main graph of a model."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>\n{text}')
    model.graph.value_info.extend(onnx.helper.make_tensor_value_info(n, 1, s) for n, s in shapes.items())
    keep_needed(model)
    return {v.name: dims(v) for v in model.graph.value_info}


def test_what_follows_from_the_inputs_is_not_told() -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y) { a = Relu (x) b = Add (a, x) y = Neg (b) }"
    assert kept(text, a=["n", 4], b=["n", 4]) == {}


def test_what_follows_from_something_told_is_not_told() -> None:
    """One chain of three behind a computed size: a reader that is told the first finds the others."""
    text = """g (float[n] x, int64[2] s) => (float[a, b] y) {
      r = Reshape (x, s) t = Relu (r) c = Concat <axis = 1> (t, r) y = Neg (c) }"""
    assert kept(text, r=["n", 3], t=["n", 3], c=["n", 6]) == {"r": ["n", 3]}


def test_targets_in_constants_are_read_wherever_they_are() -> None:
    text = """g (float[2, 6] x) => (float[a] y) <int64[2] s = {3, 4}> {
      a = Reshape (x, s) k = Constant <value_ints = [2, 2, 3]> () b = Reshape (a, k) y = Neg (b) }"""
    assert kept(text, a=[3, 4], b=[2, 2, 3]) == {}


def test_more_than_inference_finds_is_told() -> None:
    text = "g (float[n, m] x) => (float[a, b] y) { r = NonZero (x) t = Cast <to = 1> (r) y = Neg (t) }"
    assert kept(text, t=[2, "k"], u=["k"]) == {"t": [2, 0]}, "a name that occurs once says nothing"
    assert kept(text, t=[2, 5]) == {"t": [2, 5]}


def test_results_of_unknown_operators_are_told() -> None:
    text = "g (float[n] x) => (float[n] y) { a = com.example.Mystery (x) b = Relu (a) y = Neg (b) }"
    assert kept(text, a=["n"], b=["n"]) == {"a": ["n"]}


def test_sizes_that_are_equal_are_told_once() -> None:
    """That the results of two convolutions of unknown size have one size is more than inference finds."""
    text = """g (float[n, 3, h, w] x) => (y) <float[3, 3, 3, 3] k, float[3, 3, 3, 3] l> {
      a = Conv (x, k) b = Conv (x, l) c = Add (a, b) y = Relu (c) }"""
    same: list[int | str] = ["n", 3, "unk__0", "unk__1"]
    assert kept(text, a=same, b=same, c=same) == {"a": same, "b": same}


def test_bodies_know_what_is_told_around_them() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x, int64[2] s, bool c) => (y) { r = Reshape (x, s)
      y = If (c) <then_branch = one () => (p) { a = Relu (r) b = NonZero (a) d = Cast <to = 1> (b) p = Neg (d) },
                  else_branch = two () => (q) { a = Neg (r) q = Abs (a) }> }""")
    info = onnx.helper.make_tensor_value_info
    model.graph.value_info.append(info("r", 1, ["n", 3]))
    one, two = (a.g for a in model.graph.node[1].attribute)
    one.value_info.extend([info("a", 1, ["n", 3]), info("b", 7, [2, 8]), info("d", 1, [2, 8])])
    two.value_info.append(info("a", 1, ["n", 3]))
    keep_needed(model)
    assert [v.name for v in model.graph.value_info] == ["r"]
    assert [(v.name, dims(v)) for v in one.value_info] == [("b", [2, 8])]
    assert not two.value_info
    strip_value_info(model)
    assert not model.graph.value_info
    assert not one.value_info


def test_large_constants_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3] x) => (float[n, 4000] y) {
      k = Constant <value = float[1] {0.0}> () a = MatMul (x, w) b = Add (a, k) y = Relu (b) }"""
    model = onnx.parser.parse_model(text)
    weight = onnx.TensorProto(name="w", data_type=1, dims=[3, 4000], raw_data=bytes(4 * 3 * 4000))
    model.graph.initializer.append(weight)
    model.graph.node[0].attribute[0].t.CopyFrom(weight)
    model.graph.node[0].attribute[0].t.dims[:] = [3, 1, 4000]
    for name, shape in {"a": ["n", 4000], "b": [3, "n", 4000]}.items():
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    seen: list[int] = []
    infer = onnx.shape_inference.infer_shapes

    def observed(proto: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        seen.append(proto.ByteSize())
        return infer(proto, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", observed)
    keep_needed(model)
    assert not model.graph.value_info
    assert 0 < seen[0] < stored_shapes.SMALL
