"""Streaming histograms: exact counts in any order, at any scale, in constant memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphopt.numerics.histogram import OCTAVES, PER_OCTAVE, Histogram

VALUES = hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32))
PARTS = st.lists(VALUES, min_size=1, max_size=6)


def of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


def same(a: Histogram, b: Histogram) -> None:
    assert (a.low, a.high, a.zeros, a.nonfinite) == (b.low, b.high, b.zeros, b.nonfinite)
    for name in ("lower", "upper", "counts"):
        np.testing.assert_array_equal(getattr(a.bins(), name), getattr(b.bins(), name))


@settings(max_examples=80, deadline=None)
@given(parts=PARTS)
def test_nothing_is_lost_while_streaming(parts):
    histogram, every = of(*parts), np.concatenate(parts)
    assert histogram.total == every.size
    assert histogram.zeros == np.count_nonzero(every == 0)
    if every.size:
        assert (histogram.low, histogram.high) == (every.min(), every.max())
    bins = histogram.bins()
    nonzero = np.sort(every[every != 0].astype(np.float64))
    lower, upper = (np.repeat(edge, bins.counts.astype(int)) for edge in (bins.lower, bins.upper))
    # Values in order lie in the bins in order, and bins are narrow, or next to zero.
    assert (lower <= nonzero).all()
    assert (nonzero <= upper).all()
    smallest = max(2.0**-134, np.abs(every).max(initial=0) * 2.0 ** (1 - OCTAVES) * (1 + 1 / PER_OCTAVE))
    assert (upper - lower <= np.maximum(np.abs(nonzero) / PER_OCTAVE, smallest)).all()


@settings(max_examples=80, deadline=None)
@given(parts=PARTS, data=st.data())
def test_order_and_cut_do_not_matter(parts, data):
    whole = of(np.concatenate(parts))
    same(whole, of(*data.draw(st.permutations(parts))))
    merged = Histogram()
    for part in data.draw(st.permutations(parts)):
        merged.merge(of(part))
    same(whole, merged)
    np.testing.assert_allclose(merged.average, of(*parts).average, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_resolution_does_not_depend_on_the_scale(scale):
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * np.float32(scale)
    bins = of(x).bins()
    away = np.minimum(np.abs(bins.lower), np.abs(bins.upper)) > 1e-3 * scale
    assert (((bins.upper - bins.lower) / np.abs(bins.centres))[away] < 1.01 / PER_OCTAVE).all()


def test_an_outlier_leaves_the_resolution_of_the_rest():
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    assert of(x, np.array([1e6], np.float32)).bins().counts.size > 0.9 * of(x).bins().counts.size


def test_memory_does_not_grow():
    rng, histogram = np.random.default_rng(0), Histogram()
    for exponent in range(-30, 30, 3):
        histogram.update(rng.standard_normal(1000).astype(np.float32) * np.float32(10.0**exponent))
        assert histogram._counts.size == 2 * OCTAVES * PER_OCTAVE
    assert histogram.total == 20_000


def test_integrals_are_those_of_the_values():
    x = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    cumulative = of(x).bins().cumulative()
    for t in (-9.0, -1.0, 0.0, 0.3, 2.0, 9.0):
        below = x[x <= t].astype(np.float64)
        wanted = np.array([below.size, below.sum(), np.square(below).sum()])
        np.testing.assert_allclose(cumulative(np.array(t)), wanted, rtol=1e-3, atol=1)


def test_a_bin_of_one_value_is_that_value():
    bins = of(np.full(7, 3.3, np.float32)).bins()
    assert bins.lower.tolist() == bins.upper.tolist() == [float(np.float32(3.3))]
    assert bins.cumulative().number(np.array([3.2, 3.3000002, 4])).tolist() == [0, 7, 7]


def test_the_average_is_of_the_extremes_of_batches_weighted_by_size():
    histogram = of(np.array([-1, 5, 0], np.float32), np.array([-5, 1], np.float32))
    assert histogram.average == pytest.approx((-(3 * 1 + 2 * 5) / 5, (3 * 5 + 2 * 1) / 5))


def test_values_that_are_not_finite_are_counted_and_ignored():
    histogram = of(np.array([1, np.inf, -2, np.nan, -np.inf], np.float32), np.array([np.nan], np.float32))
    assert histogram.nonfinite == 4
    assert (histogram.total, histogram.low, histogram.high) == (2, -2, 1)


def test_extreme_magnitudes_of_float32():
    most = float(np.finfo(np.float32).max)
    histogram = of(np.array([1e-45], np.float32), np.array([most, -most], np.float32))
    assert histogram.total == 3
    assert (histogram.low, histogram.high) == (-most, most)
    assert histogram.bins().upper[-1] == most


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_other_types_count_as_their_float32(dtype):
    x = np.array([[-3, 0], [2, 7]], dtype)
    same(of(x), of(x.astype(np.float32)))
    assert of(np.array([1e300, 1.0])).nonfinite == 1
