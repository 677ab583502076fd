"""smooth: outliers of activations go into the weights that read them, and the model stays the same to the last bit."""

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
from graphopt.errors import DataError, UsageError
from graphopt.passes.quantize import Quantize
from graphopt.passes.smooth import Smooth
from graphopt.rewriting.constants import float64
from graphopt.target import QuantScheme, Target

WIDTH = 32
OUTLIERS = np.ones(WIDTH, np.float32)
OUTLIERS[[3, 17]] = 64, 100
X = np.clip(np.random.default_rng(0).normal(size=(64, WIDTH)), -2, 2).astype(np.float32)


def block(between: str = "u = Relu(a)", **more: Any) -> ir.Model:
    """Norm, two layers: the norm's scale makes two channels 64 and 100 times larger than the others."""
    return graph(
        f"(float[N,{WIDTH}] x) => (float[N,8] y)",
        f"n = LayerNormalization<axis=-1>(x, g, c)  a = Gemm(n, w, b)  {between}  y = MatMul(u, v)",
        g=OUTLIERS, c=OUTLIERS / 10, w=(WIDTH, 24), b=(24,), v=(24, 8), **more,
    )  # fmt: skip


def smooth(model: ir.Model, what: Smooth = Smooth(), target: Target | None = None) -> PassResult:  # noqa: B008
    ctx = dataclasses.replace(context(), calibration=calibration.load({"x": X}, model))
    ctx = dataclasses.replace(ctx, target=target) if target else ctx
    before = run(model, {"x": X})[0]
    result = what.run(model, ctx)
    after = run(model, {"x": X})[0]
    if what.power_of_two:
        np.testing.assert_array_equal(after, before)
    else:
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    return result


def noise(model: ir.Model) -> float:
    """Of the model in int8, in dB below the signal."""
    exact = run(model, {"x": X})[0]
    ctx = dataclasses.replace(context(), calibration=calibration.load({"x": X}, model))
    Quantize(sensitive="none", prepare="none").run(model, ctx)
    return float(10 * np.log10(np.square(exact).sum() / np.square(run(model, {"x": X})[0] - exact).sum()))


@pytest.mark.parametrize("whole", [True, False])
def test_outliers_of_a_norm_go_into_the_layer_behind_it(whole: bool) -> None:
    model = block()
    result = smooth(model, Smooth(power_of_two=whole))
    scale = float64(model.graph.initializers["g"])
    assert scale is not None
    assert scale.max() / np.median(scale) < 20
    assert result.details["smoothed channels"][0]["read by"] == "Gemm(a)"
    assert result.details["smoothed channels"][0]["channels"] == WIDTH
    assert result.details["smoothed channels"][0]["alpha"] in {0.3, 0.4, 0.5, 0.6, 0.7, 0.8}


def test_integers_lose_less_behind_it() -> None:
    plain, smoothed = block(), block()
    smooth(smoothed)
    assert noise(smoothed) > noise(plain) + 6


def test_layers_that_read_one_norm_share_its_scale() -> None:
    model = block("q = MatMul(n, p)  t = Tanh(q)  u = Add(t, a)", p=(WIDTH, 24))
    result = smooth(model)
    assert result.details["smoothed channels"][0]["read by"] == "Gemm(a), MatMul(q)"
    # Tanh does not pass a scale, and the sum with what it gives keeps that of the other layer
    assert "MatMul(q): Tanh 'Tanh(t)' is not positively homogeneous" in reasons(result)
    assert "Gemm(a): Add 'Add(u)' adds 't', whose scale is fixed" in reasons(result)


def test_what_is_even_already_stays() -> None:
    model = graph(
        f"(float[N,{WIDTH}] x) => (float[N,8] y)", "n = LayerNormalization<axis=-1>(x, g)  y = MatMul(n, w)",
        g=np.ones(WIDTH, np.float32), w=(WIDTH, 8),
    )  # fmt: skip
    result = smooth(model)
    assert not result.changed
    assert "MatMul(y): no alpha lessens the estimated error much" in reasons(result)


def test_a_weight_with_one_step_is_not_spread() -> None:
    target = Target("one-step", "ort", quant=QuantScheme(per_channel=False))
    result = smooth(block(), target=target)
    assert "Gemm(a): its weight has one step for all channels, which scales would spread" in reasons(result)
    assert [row["read by"] for row in result.details["smoothed channels"]] == ["Gemm(a)"]  # written by a norm


def test_convolutions_that_read_a_norm_are_named() -> None:
    model = graph(
        "(float[N,4,6,6] x) => (float[N,5,6,6] y)", "n = InstanceNormalization(x, g, g)  y = Conv(n, w)",
        g=np.array([1, 2, 3, 99], np.float32), w=(5, 4, 1, 1),
    )  # fmt: skip
    ctx = dataclasses.replace(context(), calibration=calibration.load({"x": np.ones((2, 4, 6, 6), np.float32)}, model))
    result = Smooth().run(model, ctx)
    assert "InstanceNormalization(n): 'Conv(y)' reads it, which is no matrix" in reasons(result)
    assert not result.changed


def test_data_and_integers_are_asked_for() -> None:
    with pytest.raises(DataError, match="calibration"):
        Smooth().run(block(), context())
    with pytest.raises(UsageError, match="int8"):
        Smooth().run(block(), dataclasses.replace(context(), target=Target("float-only", "ort", quant=None)))
