from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class
from graphopt.rewriting import row_blocks

DEQUANTIZE = pass_class("dequantize-constants")()


def test_per_tensor_and_per_axis() -> None:
    expect(
        """g (float[N,2] x) => (float[N,3] y) <int8[2,3] w_quantized = {1,2,3,4,5,6}, float s = {0.5}, int8 z = {1}>
        { w = DequantizeLinear(w_quantized, s, z) y = MatMul(x, w) }""",
        "g (float[N,2] x) => (float[N,3] y) <float[2,3] w = {0.0,0.5,1.0,1.5,2.0,2.5}> { y = MatMul(x, w) }",
        DEQUANTIZE,
    )
    expect(
        """g (float[N,2] x) => (float[N,3] y) <uint8[2,3] q = {1,2,3,4,5,6}, float[2] s = {0.5,2.0},
        uint8[2] z = {1,2}>
        { w = DequantizeLinear <axis: int = 0> (q, s, z) y = MatMul(x, w) }""",
        "g (float[N,2] x) => (float[N,3] y) <float[2,3] w = {0.0,0.5,1.0,4.0,6.0,8.0}> { y = MatMul(x, w) }",
        DEQUANTIZE,
    )


def test_per_block() -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 21]> g (float[N,5] x) => (float[N,2] y)
    <int8[5,2] q = {1,2,3,4,5,6,7,8,9,10}, float[3,2] s = {1.0,2.0,3.0,4.0,5.0,6.0}>
    { w = DequantizeLinear <axis: int = 0, block_size: int = 2> (q, s) y = MatMul(x, w) }""")
    assert DEQUANTIZE.run(model, context()).changed
    (value,) = model.graph.initializers.values()
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), [[1, 4], [3, 8], [15, 24], [21, 32], [45, 60]])


def test_computed_scales_stay() -> None:
    result = expect(
        """g (float[N,2] x, float s) => (float[N,2] y) <int8[2,2] q = {1,2,3,4}>
        { w = DequantizeLinear(q, s) y = MatMul(x, w) }""",
        None,
        DEQUANTIZE,
    )
    assert "not constant" in reasons(result)


@pytest.mark.parametrize("asked", [True, False])
def test_fold_does_it_on_request(asked: bool) -> None:
    model = parse("""g (float[N,2] x) => (float[N,3] y) <int8[2,3] q = {1,2,3,4,5,6}, float s = {0.5}>
    { w = DequantizeLinear(q, s) y = MatMul(x, w) }""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    result = pass_class("fold")(dequantize=asked).run(model, context())
    assert not any("undone" in note for note in result.notes)
    assert [n.op_type for n in model.graph] == (["MatMul"] if asked else ["DequantizeLinear", "MatMul"])
    assert_close(run(model, feeds), reference)


def test_in_a_function() -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 17, "l": 1]>
    g (float[N,2] x) => (float[N,2] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 17]> f (a) => (b) { q = Constant <value = int8[2,2] {1,2,3,4}> ()
      s = Constant <value = float {0.5}> () w = DequantizeLinear(q, s) b = MatMul(a, w) }""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert DEQUANTIZE.run(model, context()).changed
    (function,) = model.functions.values()
    assert [n.op_type for n in function] == ["Constant", "MatMul"]
    assert isinstance(function, ir.Function)
    assert_close(run(model, feeds), reference)


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (0, 2), (1, 2), (None, 0)])
def test_blocks_of_rows_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, axis: int | None, block: int) -> None:
    def floats() -> bytes:
        generator = np.random.default_rng(1)
        blocks = {0: (3, 7), 1: (5, 4)}
        shape = () if axis is None else blocks[axis] if block else ((5, 7)[axis],)
        tensors = {
            "q": generator.integers(-128, 128, (5, 7)).astype(np.int8),
            "s": generator.uniform(0.01, 1, shape).astype(np.float32),
            "z": generator.integers(-9, 9, shape).astype(np.int8),
        }
        q, s, z = (ir.val(n, const_value=ir.Tensor(t, name=n)) for n, t in tensors.items())
        attributes = {"axis": axis or 0} | ({"block_size": block} if block else {})
        node = ir.node("DequantizeLinear", [q, s, z], attributes)
        last = ir.node("Neg", [node.outputs[0]])
        graph = ir.Graph([], last.outputs, nodes=[node, last], initializers=[q, s, z], opset_imports={"": 21})
        model = ir.Model(graph, ir_version=10)
        assert DEQUANTIZE.run(model, context()).changed
        (value,) = graph.initializers.values()
        assert value.const_value is not None
        return value.const_value.tobytes()

    whole = floats()
    monkeypatch.setattr(row_blocks, "BLOCK", 8 * 7 * 2)
    assert floats() == whole
