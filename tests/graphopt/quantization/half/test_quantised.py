"""Quantised models whose float part becomes half: Q and DQ in half types, no Cast at a layer, scales that survive."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import context, run
from text_graph import graph

from graphopt import calibration, registry
from graphopt.model import infer_shapes
from graphopt.passes.quantize import Quantize
from graphopt.quantization.half.convert import Converted, to_half

RNG = np.random.default_rng(1)
LINEAR = ("QuantizeLinear", "DequantizeLinear")


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def convert(model: ir.Model, **options: Any) -> Converted:
    infer_shapes(model)
    done = to_half(model, ir.DataType.FLOAT16, quantised=True, **options)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return done


def producers(node: ir.Node) -> set[str]:
    return {v.producer().op_type for v in node.inputs if v is not None and v.producer() is not None}


def residual(target: str = "jetson-orin") -> ir.Model:
    model = graph(
        "(float[N,4,8,8] x) => (float[N,3] y)",
        """a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,1,1,1]>(r, w2, b2)  s = Add(c, r)
        t = Relu(s)  p = GlobalAveragePool(t)  h = Flatten(p)  y = Gemm(h, g, j)""",
        w1=normal(8, 4, 3, 3) / 6, b1=normal(8) / 4, w2=normal(8, 8, 3, 3) / 8, b2=normal(8) / 4, g=normal(8, 3) / 3,
        j=normal(3),
    )  # fmt: skip
    ctx: Any = dataclasses.replace(context(), target=registry.target(target))
    ctx = dataclasses.replace(ctx, calibration=calibration.load({"x": normal(16, 4, 8, 8)}, model))
    Quantize(sensitive="none", ranges="minmax").run(model, ctx)
    infer_shapes(model)
    return model


@pytest.mark.parametrize("opset", [None, 21, 23])
def test_no_cast_stands_between_a_layer_and_its_integers(opset: int | None) -> None:
    from graphopt.files.opset import opset_of, raise_opset

    model = residual()
    x = normal(2, 4, 8, 8)
    before = run(model, {"x": x})[0]
    if opset is not None:
        raise_opset(model, opset, "the test")
    done = convert(model)
    assert opset_of(model) == (opset or 19) and not done.kept
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert node.outputs[0].dtype == ir.DataType.FLOAT16 == node.inputs[1].dtype
            assert not any(use.node.op_type == "Cast" for use in node.outputs[0].uses())
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype == node.inputs[1].dtype
        if node.op_type in ("Conv", "Gemm"):
            assert "DequantizeLinear" in producers(node) and "Cast" not in producers(node)
    # the input is quantised as it comes, with the scale in float32; only the result is cast
    assert [n.op_type for n in model.graph if n.op_type == "Cast"] == ["Cast"]
    first = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    assert first.inputs[0].dtype == ir.DataType.FLOAT
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(run(model, {"x": x})[0], before, atol=2e-2 * np.abs(before).max())


def test_without_the_option_quantised_layers_stay() -> None:
    model = residual()
    done = to_half(model, ir.DataType.FLOAT16)
    assert any("quantised already" in skip.reason for skip in done.kept)
    assert all(n.inputs[1].dtype == ir.DataType.FLOAT for n in model.graph if n.op_type in LINEAR)


def tiny(scale: float) -> ir.Model:
    """Two quantised layers; one scale of the second's weight is `scale`, and a Relu reads its input, too."""
    return graph(
        "(float[2,4] x) => (float[2,4] y, float[2,4] z)",
        """q = QuantizeLinear(x, s, zero)  d = DequantizeLinear(q, s, zero)  e = DequantizeLinear<axis=1>(w, ws)
        m = MatMul(d, e)  q2 = QuantizeLinear(m, s, zero)  d2 = DequantizeLinear(q2, s, zero)
        e2 = DequantizeLinear<axis=1>(w, vs)  z = Relu(d2)  y = MatMul(d2, e2)""",
        s=np.array(0.05, np.float32), zero=np.array(0, np.int8), w=RNG.integers(-90, 90, (4, 4)).astype(np.int8),
        ws=np.full(4, 0.01, np.float32), vs=np.array([0.01, 0.01, scale, 0.01], np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(("scale", "survives"), [(0.02, True), (3e-5, True), (1e-7, False), (1e-9, False)])
def test_a_layer_whose_scales_do_not_survive_stays_in_float32_with_all_its_integers(
    scale: float, survives: bool
) -> None:
    model = tiny(scale)
    x = normal(2, 4)
    before = run(model, {"x": x})
    done = convert(model)
    after = run(model, {"x": x})
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a, atol=3e-3 * np.abs(a).max())
    products = [n for n in model.graph if n.op_type == "MatMul"]
    assert all("Cast" not in producers(n) for n in products)
    kinds = [n.outputs[0].dtype for n in products]
    if survives:
        assert not done.kept and set(kinds) == {ir.DataType.FLOAT16}
        return
    assert kinds == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    text = {skip.node: skip.reason for skip in done.kept}
    assert any("a scale in 'vs' loses" in reason for reason in text.values())
    assert any("which stays: a scale in 'vs'" in reason for reason in text.values())
    # the pair that both a half and a float operator read is read in either type, without a Cast
    pairs = [n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].name == "q2"]
    assert sorted(n.outputs[0].dtype.name for n in pairs) == ["FLOAT", "FLOAT16"]


def test_a_dequantizer_that_only_float_operators_read_is_not_written_twice() -> None:
    model = tiny(1e-9)
    convert(model, exclude=("*",))
    assert sum(n.op_type == "DequantizeLinear" for n in model.graph) == 4
    assert not any(n.op_type == "Cast" for n in model.graph)
    assert all(v.dtype != ir.DataType.FLOAT16 for v in model.graph.initializers.values())
