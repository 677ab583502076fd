"""Ranges chosen by what reads the tensor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import calibration
from graphopt.numerics.histogram import Histogram
from graphopt.numerics.rounding import Affine, Grid, affine, dequantise, quantise
from graphopt.progress import Silent
from graphopt.quantization.ranges.search import candidates, searched
from graphopt.quantization.static.plan import plan
from graphopt.target import QuantScheme

GRID = Grid.of("uint8")
RNG = np.random.default_rng(0)


def found(model: ir.Model, data: dict[str, np.ndarray], trials: dict[str, list[Affine]]) -> dict[str, Affine]:
    return searched(
        model, plan(model, QuantScheme()), trials, calibration.load(data, model), threads=1, progress=Silent()
    )


def ranges(*limits: tuple[float, float]) -> list[Affine]:
    return [affine(low, high, GRID) for low, high in limits]


def layer(weight: np.ndarray) -> ir.Model:
    return graph("(float[N, 8] x) => (float[N, 4] y)", "y = MatMul(x, w)", w=weight.astype(np.float32))


@pytest.mark.parametrize("read", [True, False])
def test_outliers_count_as_the_weights_that_read_them(read: bool) -> None:
    """One channel in eight is fifty times the others: whether to clip it depends on whether anybody reads it."""
    x = RNG.standard_normal((64, 8)).astype(np.float32)
    x[:, 3] *= 50
    weight = np.ones((8, 4))
    weight[3] = 1.0 if read else 0.0
    wide, narrow = ranges((float(x.min()), float(x.max())), (-4, 4))
    assert found(layer(weight), {"x": x}, {"x": [narrow, wide]}) == {"x": wide if read else narrow}


def test_the_cost_is_the_error_of_the_output() -> None:
    x = RNG.laplace(size=(32, 8)).astype(np.float32)
    weight = RNG.standard_normal((8, 4))
    trials = ranges(*((-r, r) for r in (0.5, 1, 2, 3, 4, 6, 8)))
    errors = [np.sum(np.square((dequantise(quantise(x, p), p) - x) @ weight)) for p in trials]
    assert found(layer(weight), {"x": x}, {"x": trials})["x"] is trials[int(np.argmin(errors))]


def test_both_operands_of_a_product_of_activations() -> None:
    model = graph("(float[N, 6, 8] a, float[N, 8, 6] b) => (float[N, 6, 6] y)", "y = MatMul(a, b)")
    a, b = (RNG.standard_normal(s).astype(np.float32) for s in ((16, 6, 8), (16, 8, 6)))
    a[:, :, 0] *= 100
    b[:, 0, :] = 0  # nobody reads the outliers
    trials = {"a": ranges((-4, 4), (-400, 400)), "b": ranges((-4, 4), (-400, 400))}
    chosen = found(model, {"a": a, "b": b}, trials)
    assert chosen == {name: trials[name][0] for name in "ab"}


def test_a_convolution_with_groups_and_an_addition() -> None:
    model = graph(
        "(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)",
        "c = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w)  s = Add(c, x)  y = Conv(s, v)",
        w=(4, 1, 3, 3), v=np.ones((4, 4, 1, 1), np.float32),
    )  # fmt: skip
    x = RNG.standard_normal((8, 4, 6, 6)).astype(np.float32)
    trials = {name: ranges((-0.1, 0.1), (-20, 20), (-2000, 2000)) for name in ("x", "c", "s")}
    assert found(model, {"x": x}, trials) == {name: of[1] for name, of in trials.items()}


def test_candidates_are_distinct_and_inside_the_data() -> None:
    histogram = Histogram()
    histogram.update(RNG.standard_normal(10_000).astype(np.float32))
    first = affine(histogram.low, histogram.high, GRID)
    trials = candidates(histogram, [first, first], GRID)
    assert trials[0] == first
    assert len({(float(p.scale), int(p.zero_point)) for p in trials}) == len(trials) > 4
    assert max(float(p.scale) for p in trials) <= float(first.scale)
