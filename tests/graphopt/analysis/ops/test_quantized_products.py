"""Operators on integers that stand for real numbers: units, their scales, certificates."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from certified import certified, exact, reasons
from text_graph import graph

from graphopt.analysis.cost import model_stats
from graphopt.analysis.remove import remove_units

_MICROSOFT = '"com.microsoft" : 1'
_RANDOM = np.random.default_rng(0)


def _int8(*shape: int) -> np.ndarray:
    return _RANDOM.integers(-90, 90, shape).astype(np.int8)


def _bias(*shape: int) -> np.ndarray:
    return _RANDOM.integers(-900, 900, shape).astype(np.int32)


_QUANTS = {
    "xs": np.float32(0.02),
    "xz": np.uint8(128),
    "hs": np.float32(0.05),
    "hz": np.uint8(117),
    "ys": np.float32(0.3),
    "yz": np.uint8(128),
    "ws": _RANDOM.uniform(0.01, 0.02, 6).astype(np.float32),
    "wz": np.zeros(6, np.int8),
    "s": np.float32(0.01),
    "z": np.int8(0),
    "gs": np.float32(0.04),
    "gz": np.uint8(100),
}


def _model(signature: str, body: str, *, opset: int = 17, **parameters: object) -> ir.Model:
    text = body + ";"
    used = {n: v for n, v in _QUANTS.items() if any(f"{before}{n}{after}" in text for before in " (" for after in ",)")}
    return graph(signature, body, opset=opset, imports=_MICROSOFT, **used, **parameters)


_CONVOLUTION = """q = QuantizeLinear(x, xs, xz)  h = QLinearConv<pads=[1,1,1,1]>(q, xs, xz, w, ws, wz, hs, hz, b)
                  {}  p = QLinearConv<pads=[1,1,1,1]>(r, {}, v, s, z, ys, yz)  y = DequantizeLinear(p, ys, yz)"""
_PASSING = {
    "nothing": ("r = Identity(h)", "hs, hz"),
    "pool": ("r = MaxPool<kernel_shape=[2,2]>(h)", "hs, hz"),
    "average": ("r = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(h, hs, hz, gs, gz)", "gs, gz"),
    "leaky": ("r = com.microsoft.QLinearLeakyRelu<alpha=0.2>(h, hs, hz, gs, gz)", "gs, gz"),
    "sum": ("r = com.microsoft.QLinearAdd(h, hs, hz, h, hs, hz, gs, gz)", "gs, gz"),
    "join": ("r = com.microsoft.QLinearConcat<axis=1>(gs, gz, h, hs, hz)", "gs, gz"),
    "gate": (
        """a = com.microsoft.QLinearGlobalAveragePool(h, hs, hz, gs, gz)
           t = com.microsoft.QLinearSigmoid(a, gs, gz, xs, xz)
           r = com.microsoft.QLinearMul(h, hs, hz, t, xs, xz, gs, gz)""",
        "gs, gz",
    ),
}


@pytest.mark.parametrize("name", _PASSING)
def test_channels_of_quantised_convolutions(name: str) -> None:
    body = _CONVOLUTION.format(*_PASSING[name])
    model = _model("(float[2,3,8,8] x) => (float[] y)", body, w=_int8(6, 3, 3, 3), b=_bias(6), v=_int8(4, 6, 3, 3))
    coupling = certified(model)
    assert exact(coupling) == 6
    assert {m.parameter for m in coupling.units[0].members} >= {"w", "ws", "wz", "b", "v"}


def test_quantised_branches_that_are_joined() -> None:
    body = """q = QuantizeLinear(x, xs, xz)  h = QLinearConv(q, xs, xz, w, ws, wz, hs, hz, b)
              t = QLinearConv(q, xs, xz, u, s, z, ys, yz)
              r = com.microsoft.QLinearConcat<axis=1>(gs, gz, h, hs, hz, t, ys, yz)
              p = QLinearConv(r, gs, gz, v, s, z, ys, yz)  y = DequantizeLinear(p, ys, yz)"""
    parameters = {"w": _int8(6, 3, 1, 1), "b": _bias(6), "u": _int8(5, 3, 1, 1), "v": _int8(4, 11, 1, 1)}
    assert exact(certified(_model("(float[2,3,8,8] x) => (float[] y)", body, **parameters))) == 11


def test_a_grouped_quantised_convolution_keeps_its_groups() -> None:
    body = _CONVOLUTION.format("r = QLinearConv<group=6>(h, hs, hz, d, ws, wz, gs, gz)", "gs, gz")
    model = _model(
        "(float[2,3,8,8] x) => (float[] y)",
        body,
        w=_int8(6, 3, 3, 3),
        b=_bias(6),
        d=_int8(6, 1, 3, 3),
        v=_int8(4, 6, 3, 3),
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    pruned = model.clone()
    remove_units(pruned, coupling, {1, 2})
    assert [n.attributes.get_int("group", 1) for n in pruned.graph if n.op_type == "QLinearConv"] == [1, 4, 1]


@pytest.mark.parametrize(
    "product",
    [
        """q, qs, qz = DynamicQuantizeLinear(r)  i = MatMulInteger(q, v, qz, z)  c = Cast<to=1>(i)
           t = Mul(qs, s)  y = Mul(c, t)""",
        "q, qs, qz = DynamicQuantizeLinear(r)  y = com.microsoft.MatMulIntegerToFloat(q, v, qs, s, qz, z, f)",
        "y = com.microsoft.DynamicQuantizeMatMul(r, v, s, z, f)",
        """q = QuantizeLinear(r, hs, hz)  p = QLinearMatMul(q, hs, hz, v, s, z, ys, yz)
           y = DequantizeLinear(p, ys, yz)""",
    ],
)
def test_an_inner_axis_between_a_real_and_a_quantised_product(product: str) -> None:
    used = {"f": (4,)} if ", f)" in product else {}
    model = _model(
        "(float[5,8] x) => (float[] y)", f"h = MatMul(x, w)  r = Relu(h)  {product}", w=(8, 6), v=_int8(6, 4), **used
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    assert model_stats(model).macs == 5 * (8 * 6 + 6 * 4)


@pytest.mark.parametrize(
    "product",
    [
        """q, qs, qz = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, qz, wz)  c = Cast<to=1>(i)  t = Mul(qs, ws)
           h = Mul(c, t)""",
        "q, qs, qz = DynamicQuantizeLinear(x)  h = com.microsoft.MatMulIntegerToFloat(q, w, qs, ws, qz, wz, f)",
        "h = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, f)",
        """q = QuantizeLinear(x, xs, xz)  p = com.microsoft.QGemm(q, xs, xz, w, ws, wz, b, hs, hz)
           h = DequantizeLinear(p, hs, hz)""",
        """q = QuantizeLinear(x, xs, xz)  p = QLinearMatMul(q, xs, xz, w, ws, wz, hs, hz)
           h = DequantizeLinear(p, hs, hz)""",
    ],
)
def test_columns_of_a_quantised_product_take_their_scales_along(product: str) -> None:
    used = {name: value for name, value in {"f": (6,), "b": _bias(6)}.items() if f", {name}" in product}
    model = _model(
        "(float[5,8] x) => (float[] y)", f"{product}  r = Relu(h)  y = MatMul(r, v)", w=_int8(8, 6), v=(6, 4), **used
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    assert {m.parameter for m in coupling.units[0].members} >= {"w", "ws", "v"}


def test_integers_of_a_convolution() -> None:
    model = _model(
        "(uint8[2,3,8,8] x) => (float[] y)",
        "i = ConvInteger(x, w, xz, z)  c = Cast<to=1>(i)  r = Relu(c)  m = GlobalAveragePool(r)  y = Conv(m, v)",
        w=_int8(6, 3, 3, 3),
        v=(4, 6, 1, 1),
    )
    assert exact(certified(model)) == 6


def test_a_weight_whose_zero_is_not_zero_is_not_exact() -> None:
    body = (
        "q = QuantizeLinear(x, xs, xz)  p = QLinearMatMul(q, xs, xz, w, s, k, hs, hz)  h = DequantizeLinear(p, hs, hz)"
    )
    model = _model("(float[5,8] x) => (float[] y)", f"{body}  y = MatMul(h, v)", w=_int8(8, 6), k=np.int8(3), v=(6, 4))
    coupling = certified(model)
    assert len(coupling.units) == 6
    assert exact(coupling) == 0


@pytest.mark.parametrize("given", [False, True])
def test_columns_of_packed_weights(given: bool) -> None:
    zeros = {"zp": _RANDOM.integers(0, 255, (6, 1)).astype(np.uint8)} if given else {}
    model = _model(
        "(float[5,32] x) => (float[] y)",
        f"""h = com.microsoft.MatMulNBits<N=6, K=32, bits=4, block_size=16>(x, w, sc{", zp" if given else ",,, f"})
            r = Relu(h)  y = MatMul(r, v)""",
        w=_RANDOM.integers(0, 255, (6, 2, 8)).astype(np.uint8),
        sc=(12,) if not given else (6, 2),
        v=(6, 4),
        **zeros,
        **({} if given else {"f": (6,)}),
    )
    coupling = certified(model)
    assert exact(coupling) == 6
    pruned = model.clone()
    remove_units(pruned, coupling, {2})
    assert pruned.graph[0].attributes.get_int("N") == 5
    assert model_stats(model).macs == 5 * (32 * 6 + 6 * 4)


def test_blocks_along_the_inner_axis_stay() -> None:
    model = _model(
        "(float[5,8] x) => (float[] y)",
        "h = MatMul(x, w)  y = com.microsoft.MatMulNBits<N=6, K=32, bits=4, block_size=16>(h, p, sc)",
        w=(8, 32),
        p=_RANDOM.integers(0, 255, (6, 2, 8)).astype(np.uint8),
        sc=(12,),
    )
    coupling = certified(model)
    assert not coupling.units
    assert "packed in blocks" in reasons(coupling, "w")
