"""Streaming histograms and the ranges taken from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphopt.numerics.ranges import BINS, Histogram, minmax_range, mse_range, percentile_range, squared_error
from graphopt.numerics.rounding import Grid, affine, dequantise, quantise

GRIDS = [Grid.of("uint8"), Grid.of("int8"), Grid.of("int8", symmetric=True)]
VALUES = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e4, 1e4, width=32))


def _of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(VALUES, min_size=1, max_size=6))
def test_nothing_is_lost_while_streaming(parts):
    histogram, every = _of(*parts), np.concatenate(parts)
    assert histogram.total == every.size
    assert histogram.zeros == np.count_nonzero(every == 0)
    assert (histogram.low, histogram.high) == (every.min(), every.max())
    centres, counts = histogram.occupied()
    width = histogram.reach / BINS
    nonzero = np.sort(every[every != 0].astype(np.float64))
    # Values in order lie within a bin of the centres that stand for them.
    np.testing.assert_allclose(np.repeat(centres, counts.astype(int)), nonzero, rtol=0, atol=width * (1 + 1e-9))


def test_doubling_keeps_resolution():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000).astype(np.float32)
    grown = _of(x[:10] * 1e-3, x)
    assert grown.reach / 2 <= np.abs(x).max() <= grown.reach
    assert len(grown._counts) == 2 * BINS


@settings(max_examples=40, deadline=None)
@given(values=VALUES, scale=st.sampled_from([1e-6, 1.0, 1e6]), grid=st.sampled_from(GRIDS))
def test_mse_is_never_worse_than_minmax(values, scale, grid):
    histogram = _of(values * np.float32(scale))
    best = squared_error(histogram, affine(*mse_range(histogram, grid), grid))
    assert best <= squared_error(histogram, affine(*minmax_range(histogram), grid))


@settings(max_examples=40, deadline=None)
@given(values=VALUES, percentile=st.floats(50, 100), grid=st.sampled_from(GRIDS))
def test_every_range_holds_zero_and_stays_inside_minmax(values, percentile, grid):
    histogram = _of(values)
    low, high = minmax_range(histogram)
    for a, b in (mse_range(histogram, grid), percentile_range(histogram, percentile)):
        assert low <= a <= 0 <= b <= high


@pytest.mark.parametrize("grid", GRIDS, ids=["uint8", "int8", "symmetric"])
def test_mse_clips_an_outlier_where_that_lowers_the_true_error(grid):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(200_000).astype(np.float32)
    x[0] = 12
    histogram = _of(x)
    errors = {}
    for name, found in (("minmax", minmax_range(histogram)), ("mse", mse_range(histogram, grid))):
        params = affine(*found, grid)
        errors[name] = float(np.mean(np.square(dequantise(quantise(x, params), params) - x)))
    assert errors["mse"] < 0.8 * errors["minmax"]
    # The histogram's estimate is that of the samples.
    assert squared_error(histogram, affine(*mse_range(histogram, grid), grid)) / x.size == pytest.approx(
        errors["mse"], rel=0.05
    )


def test_percentile_counts_values():
    x = np.arange(1, 10001, dtype=np.float32)
    low, high = percentile_range(_of(x), 99.0)
    assert low == 0
    assert high == pytest.approx(9900, abs=3)
    low, high = percentile_range(_of(np.concatenate([-x, x])), 99.0)
    assert (-low, high) == (pytest.approx(9900, abs=3), pytest.approx(9900, abs=3))
    assert percentile_range(_of(x), 100) == (0, 10000)


def test_zeros_count_as_values_of_the_percentile():
    """After ReLU most values are zero; a percentile of the rest alone would clip far more than asked."""
    x = np.concatenate([np.zeros(9000, np.float32), np.arange(1, 1001, dtype=np.float32)])
    assert percentile_range(_of(x), 99.0)[1] == pytest.approx(900, abs=3)


def test_constant_empty_and_zero_tensors():
    assert minmax_range(_of(np.full(5, 3.0, np.float32))) == (0, 3)
    assert mse_range(_of(np.full(5, -2.0, np.float32)), GRIDS[0]) == (-2, 0)
    for parts in ([], [np.zeros((2, 3), np.float32)], [np.zeros((0, 3), np.float32)]):
        histogram = _of(*parts)
        assert minmax_range(histogram) == percentile_range(histogram, 99) == mse_range(histogram, GRIDS[0]) == (0, 0)


def test_values_that_are_not_finite_are_counted_and_ignored():
    histogram = _of(np.array([1, np.inf, -2, np.nan, -np.inf], np.float32), np.array([np.nan], np.float32))
    assert histogram.nonfinite == 4
    assert (histogram.total, histogram.low, histogram.high) == (2, -2, 1)


def test_extreme_magnitudes_do_not_overflow():
    histogram = _of(np.array([1e-45], np.float32), np.array([3e38], np.float32), np.array([-3e38], np.float32))
    assert histogram.total == 3
    assert histogram.high == pytest.approx(3e38)


def test_percentile_is_checked():
    with pytest.raises(ValueError, match="percentile"):
        percentile_range(_of(np.ones(1, np.float32)), 0)
