"""Integer operators get their results in float, and a model of them is compared layer by layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from text_graph import graph

from graphopt import calibration
from graphopt.diagnosis.integers import SCALED_BY, add_floats
from graphopt.diagnosis.layers import layer_errors
from graphopt.executor import Session
from graphopt.quantization.back.recognised import QUANTISED_OPS

RNG = np.random.default_rng(0)


def linear(noise: int = 0) -> tuple[ir.Model, ir.Model]:
    """A product, a residual sum and a product, in float and as integer operators."""
    weights = {name: RNG.integers(-100, 100, (16, 16)).astype(np.int8) for name in ("u", "v")}
    real = {name: w.astype(np.float32) * np.float32(0.005) for name, w in weights.items()}
    a = graph("(float[N,16] x) => (float[N,16] y)", "h = MatMul(x, u)  m = Add(h, x)  y = MatMul(m, v)", **real)
    for node in a.graph:
        node.name = f"node_{node.outputs[0].name}"
    weights["v"] = np.round(weights["v"] / (1 + noise)).astype(np.int8) * np.int8(1 + noise)
    scales = {
        f"s{t}": np.asarray(s, np.float32) for t, s in (("x", 0.03), ("w", 0.005), ("h", 0.04), ("m", 0.06), ("y", 0.1))
    }
    body = (
        "x_quantized = QuantizeLinear(x, sx, z)  "
        "h_quantized = QLinearMatMul(x_quantized, sx, z, u, sw, zw, sh, z)  "
        "m_quantized = com.microsoft.QLinearAdd(h_quantized, sh, z, x_quantized, sx, z, sm, z)  "
        "y_quantized = QLinearMatMul(m_quantized, sm, z, v, sw, zw, sy, z)  "
        "y = DequantizeLinear(y_quantized, sy, z)"
    )
    b = graph(
        "(float[N,16] x) => (float[N,16] y)", body, imports='"com.microsoft" : 1', z=np.asarray(128, np.uint8),
        zw=np.asarray(0, np.int8), **scales, **weights,
    )  # fmt: skip
    return a, b


def test_every_integer_operator_with_a_scale_is_known() -> None:
    assert {op for op in QUANTISED_OPS if op.startswith("QLinear")} <= set(SCALED_BY) <= QUANTISED_OPS


def test_results_stay_and_have_names() -> None:
    _, b = linear()
    x = {"x": RNG.standard_normal((5, 16)).astype(np.float32)}
    before = Session(b).run(x)
    add_floats(b)
    after = Session(b).run(x)
    np.testing.assert_array_equal(before["y"], after["y"])
    assert {"h", "m"} <= {v.name for node in b.graph for v in node.outputs}


def test_a_bad_layer_among_integer_operators_is_found() -> None:
    a, b = linear()
    data = calibration.load({"x": RNG.standard_normal((32, 16)).astype(np.float32)}, a)
    clean = layer_errors(a, b, data)
    assert {layer.tensor for layer in clean.layers} == {"h", "m", "y"} and clean.exclude == ()
    a, b = linear(noise=60)
    found = layer_errors(a, b, data)
    assert found.layers[0].tensor == "y" and found.exclude == ("node_y",)
