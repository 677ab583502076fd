"""Ranges of tensors from streaming histograms: minmax, percentile, least squared error.

A histogram has 2 * BINS bins over [-reach, reach], with zero on a bin edge. When a value falls outside, reach doubles
and neighbouring bins merge: memory is constant, the counts stay exact and no first pass for the range is needed.
Exact zeros are counted apart: ReLU makes many of them, they are represented without error, and a bin centre would
charge them one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.rounding import Affine, Grid, affine

BINS = 4096
"""Bins on each side of zero; after a doubling at least half of them lie inside the data: 4 or more per uint8 step."""

CLIP_STEPS = 64
"""Clipping factors tried by `mse_range` on each side, evenly from 1 down to LEAST_CLIP."""

LEAST_CLIP = 0.2
"""Ranges narrower than this fraction of minmax are not tried."""


class Histogram:
    """Streaming histogram of one tensor: float64 counts, O(1) memory in samples.

    Attributes:
        low, high: exact extremes of the finite values seen; 0 before any.
        zeros: how many values were exactly zero.
        nonfinite: how many values were inf or nan; they are counted and otherwise ignored.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.zeros = 0.0
        self.nonfinite = 0
        self.reach = 0.0
        self._empty = True
        self._counts = np.zeros(2 * BINS, np.float64)

    @property
    def total(self) -> float:
        """Number of finite values seen."""
        return float(self._counts.sum() + self.zeros)

    def update(self, x: NDArray[Any]) -> None:
        """Count the values of one array of any shape."""
        flat = np.asarray(x).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            keep = np.isfinite(flat)
            self.nonfinite += int(flat.size - np.count_nonzero(keep))
            flat = flat[keep]
            if flat.size == 0:
                return
            low, high = float(flat.min()), float(flat.max())
        self.low = low if self._empty else min(self.low, low)
        self.high = high if self._empty else max(self.high, high)
        self._empty = False
        nonzero = flat[flat != 0]
        self.zeros += float(flat.size - nonzero.size)
        if nonzero.size == 0:
            return
        self._cover(max(-low, high))
        # Truncation toward minus infinity: a value on a bin edge belongs to the bin above it.
        index = np.floor(nonzero.astype(np.float64) * (BINS / self.reach)).astype(np.int64) + BINS
        np.clip(index, 0, 2 * BINS - 1, out=index)
        self._counts += np.bincount(index, minlength=2 * BINS)

    def _cover(self, magnitude: float) -> None:
        """Double `reach` until `magnitude` is inside."""
        if self.reach == 0.0:
            # Bin width must not underflow for tiny values.
            self.reach = max(magnitude, float(np.finfo(np.float32).tiny))
            return
        while magnitude > self.reach:
            half = BINS // 2
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros(2 * BINS, np.float64)
            self._counts[half : half + BINS] = pairs
            self.reach *= 2

    def occupied(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres and counts of the bins that hold values; exact zeros are not among them."""
        used = np.flatnonzero(self._counts)
        width = self.reach / BINS
        centres = (used - BINS + 0.5) * width
        # The outermost bins are centred beyond the data when the data end inside them.
        return np.clip(centres, self.low, self.high), self._counts[used]


def minmax_range(histogram: Histogram) -> tuple[float, float]:
    """The extremes, widened to hold zero."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The narrowest range that leaves out at most (100 - percentile)/2 % of the values at each end, and holds zero.

    Args:
        histogram: of the tensor.
        percentile: in (0, 100]; 100 is minmax.

    Resolution is one bin. One-sided tensors (after ReLU) lose values at their one end only.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], not {percentile}")
    low, high = minmax_range(histogram)
    centres, counts = histogram.occupied()
    if counts.size == 0:
        return low, high
    drop = histogram.total * (100 - percentile) / 100
    if low < 0 < high:
        drop /= 2
    width = histogram.reach / BINS
    if low < 0:
        from_left = np.cumsum(counts) + np.where(centres > 0, histogram.zeros, 0.0)
        # The first bin that may not be dropped whole.
        first = int(np.searchsorted(from_left, drop, side="right"))
        low = max(low, min(0.0, float(centres[min(first, len(centres) - 1)]) - width / 2))
    if high > 0:
        from_right = np.cumsum(counts[::-1]) + np.where(centres[::-1] < 0, histogram.zeros, 0.0)
        last = int(np.searchsorted(from_right, drop, side="right"))
        high = min(high, max(0.0, float(centres[::-1][min(last, len(centres) - 1)]) + width / 2))
    return low, high


def squared_error(histogram: Histogram, params: Affine) -> float:
    """Sum of squared rounding and clipping errors over the histogram, for per-tensor parameters."""
    centres, counts = histogram.occupied()
    info = np.iinfo(params.zero_point.dtype)
    scale, zero = float(params.scale), int(params.zero_point)
    restored = (np.clip(np.rint(centres / scale) + zero, info.min, info.max) - zero) * scale
    return float(np.sum(counts * np.square(centres - restored)))


def mse_range(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The range of least squared error on the histogram; never worse than `minmax_range` there.

    Coordinate search over clipping factors of both ends, started at minmax: the error is smooth in each, and two sweeps
    settle it. The idea is the MSE calibration of
    Banner et al. (2019) and Choukroun et al. (2019), searched instead of solved.
    """
    low, high = minmax_range(histogram)
    best = (low, high)
    best_error = squared_error(histogram, affine(low, high, grid))
    factors = np.linspace(1.0, LEAST_CLIP, CLIP_STEPS)
    tied = grid.symmetric
    for _ in range(1 if tied or low == 0 or high == 0 else 2):
        for end in (0, 1):
            if (low, high)[end] == 0:
                continue
            for factor in factors:
                if tied:
                    trial = (low * factor, high * factor)
                else:
                    trial = (low * factor, best[1]) if end == 0 else (best[0], high * factor)
                error = squared_error(histogram, affine(*trial, grid))
                if error < best_error:
                    best, best_error = trial, error
    return float(best[0]), float(best[1])
