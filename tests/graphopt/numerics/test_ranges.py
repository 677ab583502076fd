"""The ranges taken from streaming histograms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphopt.numerics.histogram import Histogram
from graphopt.numerics.ranges import (
    average_range,
    entropy_range,
    minmax_range,
    mse_range,
    percentile_range,
    squared_error,
)
from graphopt.numerics.rounding import Grid, affine, dequantise, quantise

GRIDS = [Grid.of("uint8"), Grid.of("int8"), Grid.of("int8", symmetric=True)]
VALUES = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e4, 1e4, width=32))
SCALES = st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30])


def of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


def true_error(x: np.ndarray, limits: tuple[float, float], grid: Grid) -> float:
    params = affine(*limits, grid)
    return float(np.sum(np.square(dequantise(quantise(x, params), params).astype(np.float64) - x)))


def every_rule(histogram: Histogram, grid: Grid) -> dict[str, tuple[float, float]]:
    return {
        "minmax": minmax_range(histogram),
        "average": average_range(histogram),
        "percentile": percentile_range(histogram, 99.9),
        "mse": mse_range(histogram, grid),
        "entropy": entropy_range(histogram, grid),
    }


@settings(max_examples=40, deadline=None)
@given(values=VALUES, scale=SCALES, grid=st.sampled_from(GRIDS))
def test_mse_is_never_worse_than_minmax(values, scale, grid):
    histogram = of(values * np.float32(scale))
    best = squared_error(histogram, affine(*mse_range(histogram, grid), grid))
    assert best <= squared_error(histogram, affine(*minmax_range(histogram), grid))


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(VALUES, min_size=1, max_size=4), scale=SCALES, grid=st.sampled_from(GRIDS))
def test_every_range_holds_zero_and_stays_inside_minmax(parts, scale, grid):
    histogram = of(*(part * np.float32(scale) for part in parts))
    low, high = minmax_range(histogram)
    for name, (a, b) in every_rule(histogram, grid).items():
        slack = 1e-12 * max(-low, high)  # averages are sums
        assert low - slack <= a <= 0 <= b <= high + slack, name


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(VALUES, min_size=2, max_size=5), data=st.data(), grid=st.sampled_from(GRIDS))
def test_the_order_of_batches_does_not_matter(parts, data, grid):
    one, other = of(*parts), of(*data.draw(st.permutations(parts)))
    for (name, a), b in zip(every_rule(one, grid).items(), every_rule(other, grid).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("grid", GRIDS, ids=["uint8", "int8", "symmetric"])
@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "lognormal", "uniform"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15])
def test_the_error_on_the_histogram_is_that_of_the_samples(grid, kind, scale):
    rng = np.random.default_rng(2)
    x = {
        "normal": rng.standard_normal(100_000),
        "relu": np.maximum(rng.standard_normal(100_000), 0),
        "laplace": rng.laplace(size=100_000),
        "lognormal": rng.lognormal(size=100_000),
        "uniform": rng.uniform(-1, 3, 100_000),
    }[kind].astype(np.float32) * np.float32(scale)
    histogram = of(*np.array_split(x, 7))
    found = mse_range(histogram, grid)
    for limits in (minmax_range(histogram), found):
        assert squared_error(histogram, affine(*limits, grid)) == pytest.approx(true_error(x, limits, grid), rel=0.02)
    # nothing that a fine search over both ends finds on the samples is much better
    low, high = minmax_range(histogram)
    factors = np.linspace(0.15, 1, 18)
    trials = [(low * f, high * g) for f in factors for g in (factors if not grid.symmetric and low and high else [f])]
    assert true_error(x, found, grid) <= 1.02 * min(true_error(x, trial, grid) for trial in trials)


@pytest.mark.parametrize("grid", GRIDS, ids=["uint8", "int8", "symmetric"])
def test_mse_clips_an_outlier_where_that_lowers_the_true_error(grid):
    x = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    x[0] = 12
    histogram = of(x)
    assert true_error(x, mse_range(histogram, grid), grid) < 0.8 * true_error(x, minmax_range(histogram), grid)


def test_the_error_of_16_bits():
    x = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    grid, limits = Grid.of("uint16"), (-5.0, 5.0)
    assert squared_error(of(x), affine(*limits, grid)) == pytest.approx(true_error(x, limits, grid), rel=0.02)


def brute_force_divergence(x: np.ndarray, limits: tuple[float, float], grid: Grid, bins: int) -> float:
    """KL(P || Q) written out bin by bin, for a one-sided tensor."""
    width = float(x.max()) / bins
    counts, _ = np.histogram(x[x > 0], bins, (0, float(x.max())))
    stop = round(limits[1] / width)
    params = affine(*limits, grid)
    cell = np.rint((np.arange(stop) + 0.5) * width / float(params.scale))
    p = counts[:stop].astype(float)
    q = np.zeros(stop)
    for k in np.unique(cell):
        there = (cell == k) & (p > 0)
        if there.any():
            q[there] = p[cell == k].sum() / there.sum()
    p[np.flatnonzero(p)[-1]] += counts[stop:].sum()
    zeros = np.count_nonzero(x == 0)
    p, q = np.append(p, zeros), np.append(q, zeros)
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("kind", ["relu", "exponential"])
def test_entropy_minimises_the_divergence_written_out(kind):
    rng, grid = np.random.default_rng(3), Grid.of("uint8")
    x = rng.exponential(size=300_000) if kind == "exponential" else np.maximum(rng.standard_normal(300_000), 0)
    x = x.astype(np.float32)
    found = entropy_range(of(x), grid)
    trials = [(0.0, float(x.max()) * f) for f in np.linspace(0.3, 1, 71)]
    best = min(brute_force_divergence(x, t, grid, 2048) for t in trials)
    # the trials end between bins and cells of the brute force differ by a bin: equal up to that
    assert brute_force_divergence(x, found, grid, 2048) <= best + 2e-4
    assert found[1] < float(x.max())


def test_entropy_leaves_out_few_huge_values_and_keeps_a_flat_distribution():
    rng = np.random.default_rng(4)
    for grid in GRIDS:
        x = np.concatenate([rng.standard_normal(200_000), [1e6, -3e5]]).astype(np.float32)
        low, high = entropy_range(of(x), grid)
        assert 3 < max(-low, high) < 20
        flat = rng.uniform(0, 5, 100_000).astype(np.float32)
        assert entropy_range(of(flat), grid)[1] == pytest.approx(5, rel=0.02)


def test_percentile_counts_values():
    x = np.arange(1, 10001, dtype=np.float32)
    low, high = percentile_range(of(x), 99.0)
    assert low == 0
    assert high == pytest.approx(9900, rel=1 / 256)
    low, high = percentile_range(of(np.concatenate([-x, x])), 99.0)
    assert (-low, high) == (pytest.approx(9900, rel=1 / 256), pytest.approx(9900, rel=1 / 256))
    assert percentile_range(of(x), 100) == (0, 10000)


@settings(max_examples=40, deadline=None)
@given(values=VALUES, percentile=st.floats(50, 100))
def test_percentile_leaves_out_no_more_than_asked(values, percentile):
    low, high = percentile_range(of(values), percentile)
    most = values.size * (100 - percentile) / 100
    assert np.count_nonzero(values < low) + np.count_nonzero(values > high) <= most


def test_zeros_count_as_values_of_the_percentile():
    """After ReLU most values are zero; a percentile of the rest alone would clip far more than asked."""
    x = np.concatenate([np.zeros(9000, np.float32), np.arange(1, 1001, dtype=np.float32)])
    assert percentile_range(of(x), 99.0)[1] == pytest.approx(900, rel=1 / 256)


def test_average_is_the_mean_of_the_batches():
    assert average_range(of(np.array([-1, 4], np.float32), np.array([-3, 2], np.float32))) == (-2, 3)
    assert average_range(of(np.array([3, 4], np.float32))) == (0, 4)


@pytest.mark.parametrize("grid", GRIDS, ids=["uint8", "int8", "symmetric"])
def test_constant_empty_and_zero_tensors(grid):
    for name, found in every_rule(of(np.full(5, 3.0, np.float32)), grid).items():
        assert found == (0, 3), name
    for name, found in every_rule(of(np.full(5, -2.0, np.float32)), grid).items():
        assert found == (-2, 0), name
    for parts in ([], [np.zeros((2, 3), np.float32)], [np.zeros((0, 3), np.float32)], [np.array([np.nan], np.float32)]):
        assert set(every_rule(of(*parts), grid).values()) == {(0.0, 0.0)}


def test_percentile_is_checked():
    with pytest.raises(ValueError, match="percentile"):
        percentile_range(of(np.ones(1, np.float32)), 0)
