"""Rounding with moments from data: never worse than the nearest where it counts, and said where there are none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_graph import graph

from graphopt.calibration import Calibration, load
from graphopt.executor import Session
from graphopt.numerics.metric import error
from graphopt.parallel import Workers
from graphopt.quantization.rounding.front_to_back import FrontToBack, Requests
from graphopt.quantization.rounding.interface import WeightGrid, nearest
from graphopt.quantization.rounding.second_order import SecondOrder, metric_of
from graphopt.quantization.rounding.solved import solved
from graphopt.rewriting.layer_moments import input_moments
from graphopt.rewriting.layers import layers_of

RNG = np.random.default_rng(0)
COARSE = WeightGrid(3)


def samples(*shape: int) -> np.ndarray:
    """Images or rows whose channels go together."""
    x = RNG.standard_normal(shape)
    axis = 1 if len(shape) == 4 else -1
    mixing = RNG.standard_normal((shape[axis], shape[axis]))
    return np.moveaxis(np.moveaxis(x, axis, -1) @ mixing, -1, axis).astype(np.float32)


def convolutions() -> tuple[ir.Model, Calibration]:
    model = graph(
        "(float[N, 6, 9, 9] x) => (float[N, 4, 4, 4] y)",
        """c = Conv<pads=[1,1,1,1], group=2>(x, w1, b1)  r = Relu(c)  d = Conv<group=8, strides=[2,2]>(r, w2)
           e = Relu(d)  y = Conv(e, w3)""",
        w1=(8, 3, 3, 3), b1=(8,), w2=(8, 1, 3, 3), w3=(4, 8, 1, 1),
    )  # fmt: skip
    return model, load({"x": samples(40, 6, 9, 9)}, model)


def products() -> tuple[ir.Model, Calibration]:
    model = graph(
        "(float[N, 5, 24] x) => (float[N, 5, 8] y)",
        "m = MatMul(x, w1)  a = Add(m, b1)  r = Relu(a)  k = MatMul(r, w2)  s = Add(k, x)  y = MatMul(s, w3)",
        w1=(24, 32), b1=(32,), w2=(32, 24), w3=(24, 8),
    )  # fmt: skip
    return model, load({"x": samples(64, 5, 24)}, model)


def output_error(model: ir.Model, calibration: Calibration, rounding: object, grid: WeightGrid) -> float:
    """Mean squared error of the outputs with rounded weights, relative."""
    copy = model.clone()
    for key, layer in layers_of(copy)[0].items():
        rounded = rounding(key, layer.weight(), grid)  # type: ignore[operator]
        layer.store(rounded.dequantised().astype(float), layer.bias())
    feeds = next(calibration.batches(64))
    one, other = (Session(m).run(feeds)["y"] for m in (model, copy))
    return float(((one - other) ** 2).mean() / (one**2).mean())


@pytest.mark.parametrize("make", [convolutions, products])
def test_every_step_lowers_the_error_of_the_outputs(make: object) -> None:
    model, calibration = make()  # type: ignore[operator]
    gptq, descent = (SecondOrder(model, calibration, method) for method in ("gptq", "descent"))  # type: ignore[arg-type]
    plain = output_error(model, calibration, nearest, COARSE)
    assert output_error(model, calibration, gptq, COARSE) < 0.8 * plain
    assert output_error(model, calibration, descent, COARSE) < 0.7 * plain


def test_layers_behind_make_up_for_layers_before() -> None:
    model, calibration = products()
    asked = Requests()
    output_error(model, calibration, asked, COARSE)
    assert set(asked.found) == {"m", "k", "y"}
    alone = output_error(model, calibration, SecondOrder(model, calibration), COARSE)
    together = FrontToBack(model, calibration, asked)
    assert output_error(model, calibration, together, COARSE) < 0.9 * alone
    assert together.notes == []


def test_what_was_not_asked_before_is_rounded_and_said() -> None:
    model, calibration = products()
    together = FrontToBack(model, calibration, Requests())
    together("m", layers_of(model)[0]["m"].weight(), COARSE)
    assert "m" in together.notes[0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(0, 10**6), st.integers(2, 8), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([None, 1, 4, 7, 64]),
)  # fmt: skip
def test_any_grid_is_kept_and_never_worse_than_the_nearest(
    groups: int, rows: int, columns: int, seed: int, bits: int, symmetric: bool, full: bool, channels: bool,
    block: int | None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((groups, rows, columns)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.2] = 0
    grid = WeightGrid(bits, symmetric, channels, block, full and symmetric)
    metrics = []
    for _ in range(groups):
        x = rng.standard_normal((columns + 3, columns)) * rng.uniform(0, 2, columns)
        metrics.append(x.T @ x + 0.01 * np.eye(columns))
    least = 0.02
    plain = nearest("", weight, grid, least)
    for method in ("search", "gptq", "descent"):
        found = solved(weight, grid, metrics, method, least)  # type: ignore[arg-type]
        assert found.scale.shape == plain.scale.shape and found.scale.dtype == np.float32
        assert found.integers.min() >= grid.low and found.integers.max() <= grid.high
        assert (np.abs(found.scale) >= np.float32(least)).all()
        assert not found.dequantised()[weight == 0].any()
        values = (each.dequantised().astype(float) for each in (found, plain))
        errors = [sum(error(w, v, h) for w, v, h in zip(weight, vs, metrics, strict=True)) for vs in values]
        assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-9


def test_symmetric_blocks_give_the_spare_level_to_the_longer_side() -> None:
    weight = np.array([[[0.1, 0.8, -0.2, 0.3], [-0.8, 0.2, 0.1, 0.3]]], np.float32)
    found = nearest("", weight, WeightGrid(4, block=4, full=True))
    assert found.integers[0, 0, 1] == found.integers[0, 1, 0] == -8
    assert np.allclose(np.abs(found.scale), 0.1) and found.scale[0, 0, 0] < 0 < found.scale[0, 1, 0]
    assert np.allclose(found.dequantised(), weight, atol=1e-6)


def test_inputs_that_are_dead_alike_or_unknown() -> None:
    model = graph(
        "(float[N, 4] x, float[N, 4] z) => (float[N, 3] y)",
        "a = MatMul(x, w1)  n = Mul(z, zero)  b = MatMul(n, w2)  y = Add(a, b)",
        w1=(4, 3), w2=(4, 3), zero=np.zeros((1,), np.float32),
    )  # fmt: skip
    x = samples(30, 4)
    x[:, 1], x[:, 3] = 0, x[:, 2]
    rounding = SecondOrder(model, load({"x": x, "z": x}, model))
    layers = layers_of(model)[0]
    found = rounding("a", layers["a"].weight(), COARSE)
    assert np.isfinite(found.dequantised()).all() and not rounding.notes
    rounding("b", layers["b"].weight(), COARSE)
    assert "all zero on the calibration data" in rounding.notes[0] and rounding.notes[0].endswith("b")
    rounding("embedding", np.ones((1, 9, 4)), COARSE)
    assert any("embedding" in note for note in rounding.notes)


def test_moments_are_taken_in_portions_and_once_for_layers_that_read_the_same() -> None:
    model = graph(
        "(float[N, 16] x) => (float[N, 16] y)",
        "q = MatMul(x, w1)  k = MatMul(x, w2)  s = Mul(q, k)  t = MatMul(s, w3)  y = MatMul(t, w4)",
        w1=(16, 16), w2=(16, 16), w3=(16, 16), w4=(16, 16),
    )  # fmt: skip
    calibration = load({"x": samples(50, 16)}, model)
    layers = layers_of(model)[0]
    whole = SecondOrder(model, calibration)
    parts = SecondOrder(model, calibration, memory=1)
    passes = []
    original = calibration.batches
    calibration.batches = lambda *a, **k: passes.append(1) or original(*a, **k)  # type: ignore[method-assign, func-returns-value]
    for rounding, expected in ((whole, 1), (parts, 3)):
        passes.clear()
        answers = [rounding(key, layers[key].weight(), COARSE) for key in ("q", "k", "t", "y", "q")]
        assert len(passes) == expected
    again = [whole(key, layers[key].weight(), COARSE) for key in ("q", "k", "t", "y", "q")]
    assert all(np.array_equal(a.integers, b.integers) for a, b in zip(answers, again, strict=True))


def test_few_observations_are_trusted_less() -> None:
    """Rounding fitted to three samples must not ruin what the others see."""
    model = graph("(float[N, 32] x) => (float[N, 16] y)", "y = MatMul(x, w)", w=(32, 16))
    x = samples(400, 32)
    some, held = load({"x": x[:3]}, model), load({"x": x[100:164]}, model)
    ours = output_error(model, held, SecondOrder(model, some), COARSE)
    assert ours < 1.1 * output_error(model, held, nearest, COARSE)


def test_columns_that_were_multiplied_have_their_moments_divided() -> None:
    model, calibration = products()
    key, layer = next(iter(layers_of(model)[0].items()))
    weight, grid = layer.weight(), WeightGrid(bits=4)
    factors = 2.0 ** (np.arange(weight.shape[2]) % 5)
    with Workers(1) as workers:
        metric = metric_of(input_moments(model, [layer], calibration, None, workers)[0][0], centred=False)

    def lost(found: np.ndarray) -> float:
        """What the layer's outputs lose: its inputs are divided by the factors."""
        return error(weight[0], found[0] / factors, metric)

    rounding = SecondOrder(model, calibration, "gptq")
    scaled = rounding(key, weight * factors, grid)
    assert not rounding.notes
    assert lost(scaled.dequantised()) < 0.8 * lost(nearest(key, weight * factors, grid).dequantised())
    rounding(key, weight * factors + np.eye(*weight.shape[1:]), grid)
    assert rounding.notes
