"""Scales put in front of layers: exact in float, where they gain and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from text_graph import graph

from graphopt import calibration
from graphopt.executor import Session
from graphopt.model import check
from graphopt.quantization.dynamic.scheme import write_dynamic
from graphopt.quantization.scales.inserted import find_scales, insert_scales
from graphopt.target import QuantScheme

RNG = np.random.default_rng(0)
OUTLIERS = np.where(np.arange(16) == 3, 100.0, 1.0)
"""One channel is a hundred times as large as the others, and the weights make up for it."""


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def weight(outlier: bool, columns: int = 8) -> NDArray[np.float32]:
    return (normal(16, columns) / (OUTLIERS[:, None] if outlier else 1)).astype(np.float32)


def samples(outlier: bool) -> NDArray[np.float32]:
    return (normal(32, 16) * (OUTLIERS if outlier else 1)).astype(np.float32)


def residual(outlier: bool = True) -> ir.Model:
    """Two layers and a residual sum read x, so that nothing can absorb scales."""
    return graph(
        "(float[n,16] x) => (float[n,16] y)",
        "a = MatMul(x, v)  b = Gemm<transB=1>(x, u)  c = MatMul(x, w)  s = Add(a, b)  t = Add(s, c)  y = Add(t, x)",
        v=weight(outlier, 16), u=np.ascontiguousarray(weight(outlier, 16).T), w=weight(outlier, 16),
    )  # fmt: skip


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(Session(model).run({"x": x})["y"])


def inserted(model: ir.Model, keys: list[str], x: Any) -> Any:
    found = find_scales(model, keys, calibration.load({"x": x}, model), QuantScheme())
    done = insert_scales(model, keys, found)
    check(model)
    return [found[name] for name in done]


def test_float_outputs_stay_bit_for_bit() -> None:
    model, x = residual(), samples(True)
    before = run(model, x)
    (done,) = inserted(model, ["a", "b"], x)
    assert done.tensor == "x"
    assert done.gain > 3
    assert [n.op_type for n in model.graph].count("Mul") == 1
    # ONNX Runtime may sum in another order, but the factors are powers of two: nothing is rounded otherwise.
    np.testing.assert_array_equal(run(model, x), before)


def test_only_the_layers_asked_for_read_the_product() -> None:
    model = residual()
    inserted(model, ["a", "b"], samples(True))
    read = {n.outputs[0].name: n.inputs[0].name for n in model.graph if n.inputs[0] is not None}
    assert read["a"] == read["b"] == "x_smoothed"
    assert read["c"] == "x"


def test_integers_lose_less() -> None:
    x, w = samples(True), weight(True)
    noise = []
    for with_scales in (False, True):
        model = graph("(float[n,16] x) => (float[n,8] y)", "y = MatMul(x, w)", w=w)
        if with_scales:
            inserted(model, ["y"], x)
        want = run(model, x)
        write_dynamic(model, ["y"])
        noise.append(float(np.square(run(model, x) - want).sum()))
    assert noise[1] < noise[0] / 30


def test_even_channels_get_no_multiplication() -> None:
    model, x = residual(outlier=False), samples(False)
    assert inserted(model, ["a", "b"], x) == []
    assert "Mul" not in [n.op_type for n in model.graph]


@pytest.mark.parametrize("body", ["y = Gemm<transA=1>(x, w)", "h = MatMul(x, w)  k = MatMul(x, w)  y = Add(h, k)"])
def test_other_layers_are_left_alone(body: str) -> None:
    model = graph("(float[16,16] x) => (float[16,8] y)", body, w=weight(True))
    assert inserted(model, ["y", "h", "k"], samples(True)[:16]) == []
