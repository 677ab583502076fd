"""absorb-bias: what channels have in common goes into the layers behind, and the outputs stay on the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import context, reasons, run
from text_graph import graph

from graphopt import calibration
from graphopt.base import PassResult
from graphopt.errors import DataError
from graphopt.passes.absorb_bias import AbsorbBias
from graphopt.passes.quantize import Quantize
from graphopt.rewriting.constants import float64

X = np.clip(np.random.default_rng(0).normal(size=(64, 16)), -2, 2).astype(np.float32)
LIFT = np.zeros(24, np.float32)
LIFT[::2] = 40
"""Every other channel never falls to zero."""


def absorb(model: ir.Model, x: np.ndarray = X) -> PassResult:
    ctx = dataclasses.replace(context(), calibration=calibration.load({"x": x}, model))
    before = run(model, {"x": x})[0]
    result = AbsorbBias().run(model, ctx)
    np.testing.assert_allclose(run(model, {"x": x})[0], before, rtol=0, atol=1e-5 * np.abs(before).max())
    return result


def layers(between: str = "r = Relu(a)", behind: str = "y = Gemm(r, v, c)", **more: Any) -> ir.Model:
    return graph(
        "(float[N,16] x) => (float[N,8] y)", f"a = Gemm(x, w, b)  {between}  {behind}",
        **{"w": (16, 24), "b": LIFT, "v": (24, 8), "c": (8,), **more},
    )  # fmt: skip


def test_channels_above_zero_lose_what_they_never_fall_below() -> None:
    model = layers()
    result = absorb(model)
    (row,) = result.details["absorbed biases"]
    assert row["channels"] == 12
    assert row["read by"].startswith("Gemm")
    bias = float64(model.graph.initializers["b"])
    assert bias is not None
    assert bias[::2].max() < 40
    np.testing.assert_array_equal(bias[1::2], 0)


def test_every_reader_gets_the_part() -> None:
    model = layers(behind="p = Gemm(r, v, c)  q = Gemm(r, u)  y = Add(p, q)", u=(24, 8))
    assert "," in absorb(model).details["absorbed biases"][0]["read by"]


def test_integers_lose_less_behind_it() -> None:
    def noise(model: ir.Model) -> float:
        exact = run(model, {"x": X})[0]
        ctx = dataclasses.replace(context(), calibration=calibration.load({"x": X}, model))
        Quantize(sensitive="none", prepare="none").run(model, ctx)
        deviation = exact - exact.mean(axis=0)
        return float(10 * np.log10(np.square(deviation).sum() / np.square(run(model, {"x": X})[0] - exact).sum()))

    plain, absorbed = layers(), layers()
    absorb(absorbed)
    assert noise(absorbed) > noise(plain) + 6


def test_convolutions_pass_it_on_through_pooling() -> None:
    x = np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)
    lift = np.array([30, 0, 50, 0], np.float32)
    model = graph(
        "(float[N,3,8,8] x) => (float[N,5] y)",
        "a = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(a)"
        "  m = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1]>(r)"
        "  d = Conv(m, v, c)  g = GlobalAveragePool(d)  f = Flatten(g)  y = Gemm(f, u, e)",
        w=(4, 3, 3, 3), b=lift, v=(6, 4, 1, 1), c=np.full(6, 500, np.float32), u=(6, 5), e=(5,),
    )  # fmt: skip
    rows = absorb(model, x).details["absorbed biases"]
    assert [row["channels"] for row in rows] == [2, 6]


@pytest.mark.parametrize(
    ("between", "behind", "reason"),
    [
        ("r = Relu(a)", "s = Softmax(r)  y = Gemm(s, v, c)", "a shift does not pass Softmax"),
        ("r = LeakyRelu(a)", "y = Gemm(r, v, c)", "a shift does not pass LeakyRelu"),
    ],
)
def test_where_it_stops_it_says_so(between: str, behind: str, reason: str) -> None:
    result = absorb(layers(between, behind))
    assert not result.changed
    assert reason in reasons(result)


def test_channels_that_fall_to_zero_keep_their_bias() -> None:
    result = absorb(layers(b=np.zeros(24, np.float32)))
    assert not result.changed
    assert "no channel of it stays above zero" in reasons(result)


def test_padding_does_not_carry_a_shift() -> None:
    x = np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)
    model = graph(
        "(float[N,3,8,8] x) => (float[N,5,8,8] y)",
        "a = Conv(x, w, b)  r = Relu(a)  y = Conv<pads=[1,1,1,1]>(r, v, c)",
        w=(4, 3, 1, 1), b=np.full(4, 30, np.float32), v=(5, 4, 3, 3), c=(5,),
    )  # fmt: skip
    result = absorb(model, x)
    assert not result.changed
    assert "zero-padded" in reasons(result)


def test_outputs_of_the_graph_keep_their_bias() -> None:
    model = graph(
        "(float[N,16] x) => (float[N,24] r, float[N,8] y)", "a = Gemm(x, w, b)  r = Relu(a)  y = Gemm(r, v, c)",
        w=(16, 24), b=LIFT, v=(24, 8), c=(8,),
    )  # fmt: skip
    assert "output of the graph" in reasons(absorb(model))


def test_few_samples_do_not_tell_what_a_channel_never_does() -> None:
    assert "seen on 8 samples" in reasons(absorb(layers(), X[:8]))


def test_without_data_it_asks_for_some() -> None:
    with pytest.raises(DataError, match="calibration"):
        AbsorbBias().run(layers(), context())
