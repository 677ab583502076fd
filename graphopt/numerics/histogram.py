"""Streaming histograms of tensors: constant memory, any scale, and the same result in whatever order the data comes.

The bins are those of a float with a short mantissa: every octave [2^e, 2^(e+1)) of either sign is cut into 256 equal
bins, so a bin is never wider than 1/256 of the values in it, be they 1e-6 or 1e30, and one huge outlier does not take
the resolution away from the rest. Which bin a float32 belongs to are its 17 leading bits. OCTAVES below the largest
magnitude are kept (and below 2^-126, where float32 has no shorter steps, bins of 2^-134); what is smaller shares the
bin next to zero. When a larger value comes, bins at the lower end merge.
Since the bins a value can end in depend on the value and the largest magnitude alone, counts are exact, and neither
the order of the data nor its cut into batches matters; the averages of batch extremes know the cut, not the order.

Exact zeros are counted apart: ReLU makes many of them, and every grid represents them without error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PER_OCTAVE = 256
"""Bins between a power of two and the next; at the end of a range a step of uint8 is one or two of them."""

OCTAVES = 32
"""Powers of two below the largest magnitude that are told apart."""

_SIDE = OCTAVES * PER_OCTAVE
_SHIFT = 23 - 8
"""Mantissa bits of float32 beyond the 8 that number the bins of an octave."""

_INFINITY = 255 * PER_OCTAVE
"""Number of the first bin that no finite magnitude falls into."""


class Histogram:
    """Streaming histogram of one tensor.

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
        self._empty = True
        self._top = 0
        self._counts = np.zeros((2, _SIDE))  # of negative and of positive values, by rising magnitude
        self._lows = self._highs = self._weight = 0.0

    @property
    def total(self) -> float:
        """Number of finite values seen."""
        return float(self._counts.sum() + self.zeros)

    @property
    def average(self) -> tuple[float, float]:
        """Means of the lowest and highest values of the arrays given to `update`, weighted by their sizes."""
        return (self._lows / self._weight, self._highs / self._weight) if self._weight else (0.0, 0.0)

    def update(self, x: NDArray[Any]) -> None:
        """Count the values of one array of any shape; what is no float32 is rounded to it."""
        with np.errstate(over="ignore"):  # a double beyond float32 counts as infinite
            flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = flat[np.isfinite(flat)]
            self.nonfinite += flat.size - finite.size
            if finite.size == 0:
                return
            flat, low, high = finite, float(finite.min()), float(finite.max())
        self.low = low if self._empty else min(self.low, low)
        self.high = high if self._empty else max(self.high, high)
        self._empty = False
        self._lows += low * flat.size
        self._highs += high * flat.size
        self._weight += flat.size
        nonzero = flat[flat != 0] if low <= 0 <= high else flat
        self.zeros += flat.size - nonzero.size
        if nonzero.size == 0:
            return
        self._cover(_top_of(max(-low, high)))
        bits = nonzero.view(np.uint32) >> _SHIFT
        counts = np.bincount(bits, minlength=2 << 16).reshape(2, -1)[::-1, :_INFINITY]
        self._add(counts, _INFINITY)

    def merge(self, other: Histogram) -> None:
        """Add what `other` has seen; `other` is left as it is."""
        if not other._empty:
            self.low = other.low if self._empty else min(self.low, other.low)
            self.high = other.high if self._empty else max(self.high, other.high)
            self._empty = False
        self.zeros += other.zeros
        self.nonfinite += other.nonfinite
        self._lows, self._highs = self._lows + other._lows, self._highs + other._highs
        self._weight += other._weight
        if other._top:
            self._cover(other._top)
            self._add(other._counts, other._top)

    def _cover(self, top: int) -> None:
        """Shift the bins until number `top` is the first beyond them."""
        if self._top and top > self._top:
            old, end = self._counts, self._top
            self._counts, self._top = np.zeros_like(old), top
            self._add(old, end)
        self._top = max(self._top, top)

    def _add(self, counts: NDArray[Any], end: int) -> None:
        """Add counts (2, n) of the bins before number `end`; those below the lowest bin kept fall into it."""
        start, lowest = end - counts.shape[1], self._top - _SIDE
        below = min(max(0, lowest - start), counts.shape[1])
        self._counts[:, 0] += counts[:, :below].sum(axis=1)
        kept = counts[:, below : self._top - start]
        at = start + below - lowest
        self._counts[:, at : at + kept.shape[1]] += kept

    def bins(self) -> Bins:
        """The bins that hold values."""
        numbers = np.arange(self._top - _SIDE, self._top + 1)
        edges = (np.maximum(numbers, 0).astype(np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
        edges[0] = 0.0
        if self._top == _INFINITY:
            edges[-1] = np.finfo(np.float32).max
        negative, positive = (np.flatnonzero(side) for side in self._counts)
        negative = negative[::-1]
        lower = np.concatenate([-edges[negative + 1], edges[positive]])
        upper = np.concatenate([-edges[negative], edges[positive + 1]])
        counts = np.concatenate([self._counts[0, negative], self._counts[1, positive]])
        return Bins(np.maximum(lower, self.low), np.minimum(upper, self.high), counts)


def _top_of(magnitude: float) -> int:
    """Number of the first bin beyond the octave of a positive magnitude."""
    octave = int(np.float32(magnitude).view(np.uint32)) >> 23
    return (octave + 1) * PER_OCTAVE


@dataclass(frozen=True)
class Bins:
    """Bins that hold values, ascending and apart; within each the values are taken to be spread evenly.

    Attributes:
        lower, upper: their edges, cut at the extremes of the data; equal where all values of a bin are one.
        counts: values in each; exact zeros are not among them.
    """

    lower: Floats
    upper: Floats
    counts: Floats

    @property
    def centres(self) -> Floats:
        """Middle of each bin."""
        return (self.lower + self.upper) / 2

    def cumulative(self) -> Cumulative:
        """The integrals of the distribution."""
        return Cumulative(self)


class Cumulative:
    """sum 1, sum x and sum x^2 over all values x <= t, as functions of t."""

    def __init__(self, bins: Bins) -> None:
        a, b = bins.lower, bins.upper
        self._bins = bins
        each = np.stack([np.ones_like(a), (a + b) / 2, (a * a + a * b + b * b) / 3]) * bins.counts
        self._sums = np.concatenate([np.zeros((3, 1)), np.cumsum(each, axis=1)], axis=1)
        self._width = np.where(b > a, b - a, 1.0)

    def __call__(self, t: Floats) -> Floats:
        """(3, *t.shape): number, sum and sum of squares of the values up to t."""
        full = np.searchsorted(self._bins.upper, t, side="right")
        found = self._sums[:, full]
        if self._bins.counts.size:
            at = np.minimum(full, self._bins.counts.size - 1)
            a = self._bins.lower[at]
            part = self._bins.counts[at] * np.maximum(t - a, 0.0) / self._width[at]
            part = np.where(full < self._bins.counts.size, part, 0.0)
            t = np.maximum(t, a)
            found = found + np.stack([part, part * (a + t) / 2, part * (a * a + a * t + t * t) / 3])
        return np.asarray(found)

    def number(self, t: Floats) -> Floats:
        """How many values are <= t."""
        return np.asarray(self(t)[0])
