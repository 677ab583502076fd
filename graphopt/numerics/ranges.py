"""Ranges of tensors from their histograms: minmax, average, percentile, least squared error, least divergence.

A range is what the integers of a tensor cover; values beyond are clipped. All rules return (low, high) with
low <= 0 <= high, because zero must be representable, inside the extremes of the data.

Errors are integrals over the histogram, whose bins are far narrower than the steps of the grid: within a cell, the
values that one integer q stands for,  sum (x - q)^2 = S2 - 2 q S1 + q^2 S0  with the cell's number, sum and sum of
squares, which are differences of the cumulative ones. A range is tried in as many operations as there are integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.histogram import Cumulative, Histogram
from graphopt.numerics.rounding import Affine, Grid, affine

Range = tuple[float, float]
Floats = NDArray[np.float64]

FACTORS = tuple(float(f) for f in np.concatenate([np.linspace(1.0, 0.2, 33), 0.2 * 2.0 ** (-np.arange(1, 45) / 4)]))
"""Clipping factors tried for each end: evenly where optima of common distributions lie, then a quarter of an octave
apart, down to 1e-4 of what one outlier made the range."""

REFINEMENTS = (0.91, 0.94, 0.97, 0.985, 1.015, 1.03, 1.06, 1.1)
"""Factors tried around the best of FACTORS."""

AT_ONCE = 1 << 16
"""Cells of trials whose errors are computed together."""

FAR = 2.0**129
"""Beyond all float32."""

DIVERGENCE_BINS = 2048
"""Bins of equal width on each side of zero between which distributions are compared by `entropy_range`."""

OUTLIERS = 1e-4
"""The share of the values that may lie outside the window of `entropy_range`; it must be wide for most of them."""

ZOOM = 4
"""By what that window narrows while no more lie outside."""


def minmax_range(histogram: Histogram) -> Range:
    """The extremes."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def average_range(histogram: Histogram) -> Range:
    """The means of the extremes of the batches, weighted by their sizes.

    The arithmetic mean, where Jacob et al. (2018) take an exponential moving average: theirs follows weights that
    change during training; with weights that stand still its one effect is that the last batches count most. The mean
    does not depend on the order. It does depend on the size of batches, as any mean of extremes: for batches of all
    the data it is minmax, for batches of one sample it is the range of the average sample.
    """
    low, high = histogram.average
    return min(low, 0.0), max(high, 0.0)


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """The narrowest range that leaves out at most (100 - percentile)/2 % of the values at each end.

    Args:
        histogram: of the tensor.
        percentile: in (0, 100]; 100 is minmax.

    Resolution is one bin. One-sided tensors (after ReLU) lose values at their one end only.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], not {percentile}")
    low, high = minmax_range(histogram)
    bins = histogram.bins()
    if bins.counts.size == 0:
        return low, high
    drop = histogram.total * (100 - percentile) / 100
    if low < 0 < high:
        drop /= 2
    # the zeros stand between the bins; no range reaches beyond them
    negative = bins.lower < 0
    from_left = np.cumsum(bins.counts) + np.where(negative, 0.0, histogram.zeros)
    from_right = np.cumsum(bins.counts[::-1])[::-1] + np.where(negative, histogram.zeros, 0.0)
    first = int(np.searchsorted(from_left, drop, side="right"))
    last = bins.counts.size - 1 - int(np.searchsorted(from_right[::-1], drop, side="right"))
    if low < 0:
        low = min(0.0, float(bins.lower[min(first, bins.counts.size - 1)]))
    if high > 0:
        high = max(0.0, float(bins.upper[max(last, 0)]))
    return low, high


def squared_error(histogram: Histogram, params: Affine) -> float:
    """Sum of squared rounding and clipping errors over the histogram, for per-tensor parameters."""
    return float(_squared_errors(histogram.bins().cumulative(), [params])[0])


def _squared_errors(cumulative: Cumulative, tried: Sequence[Affine]) -> Floats:
    """(tried,) sums of squared errors."""
    found = np.empty(len(tried))
    levels = int(np.ptp(_integers(tried[0]))) + 1
    step = max(1, AT_ONCE // levels)
    for start in range(0, len(tried), step):
        part = slice(start, start + step)
        values, borders = (np.stack(each) for each in zip(*map(_cells, tried[part]), strict=True))
        number, total, squares = np.diff(cumulative(borders))
        found[part] = np.sum(squares - values * (2 * total - values * number), axis=1)
    # differences of large sums: what is left of an error that is 0 may be slightly negative
    return np.maximum(found, 0.0)


def _integers(params: Affine) -> NDArray[np.float64]:
    info = np.iinfo(params.zero_point.dtype)
    return np.arange(info.min, info.max + 1, dtype=np.float64)


def _cells(params: Affine) -> tuple[Floats, Floats]:
    """What the integers stand for, and between which borders values are rounded to them, from -FAR to FAR."""
    steps, scale = _integers(params) - float(params.zero_point), float(params.scale)
    borders = (steps[:-1] + 0.5) * scale
    return steps * scale, np.concatenate([[-FAR], borders, [FAR]])


def mse_range(histogram: Histogram, grid: Grid) -> Range:
    """The range of least squared error on the histogram; never worse than `minmax_range` there.

    The idea is the MSE calibration of Banner et al. (2019) and Choukroun et al. (2019), searched instead of solved for
    an assumed distribution.
    """
    cumulative = histogram.bins().cumulative()

    def errors(trials: Sequence[Range]) -> Floats:
        return _squared_errors(cumulative, [affine(*trial, grid) for trial in trials])

    return least(errors, minmax_range(histogram), grid)


def least(costs: Callable[[Sequence[Range]], Floats], widest: Range, grid: Grid) -> Range:
    """The range inside `widest` of least cost that coordinate search over both ends finds; never worse than `widest`.

    Both ends of a symmetric grid move together; else one after the other, and each once more.
    """
    best, least_cost = widest, float(costs([widest])[0])
    ends = [end for end in (0, 1) if widest[end] != 0]
    moves = [tuple(ends)] if grid.symmetric else [(end,) for end in ends] * len(ends)
    if not ends:
        return widest
    for move in moves:
        for factors in (FACTORS, REFINEMENTS):
            trials = _moved(widest if factors is FACTORS else best, best, move, factors, widest)
            found = costs(trials)
            if found.min() < least_cost:
                best, least_cost = trials[int(found.argmin())], float(found.min())
    return best


def _moved(start: Range, best: Range, move: tuple[int, ...], factors: tuple[float, ...], widest: Range) -> list[Range]:
    """`best` with the moving ends at `start` times each factor, no wider than `widest`."""
    ends = ([start[end] * factor if end in move else best[end] for end in (0, 1)] for factor in factors)
    return [(max(low, widest[0]), min(high, widest[1])) for low, high in ends]


def entropy_range(histogram: Histogram, grid: Grid) -> Range:
    """The range for which the quantised distribution Q says most about that of the data, P: least KL(P || Q).

    P is the histogram in bins of equal width, with what is clipped added to the bins at the ends. Q knows of P without
    the clipped values only how many fall to each integer, and spreads these evenly over the bins of its cell that are
    not empty. With counts P_i, m_k values in cell k over n_k such bins, M_k where clipped ones are counted, T and T_in
    all values with and without clipped ones, zeros (which every grid represents) among both:

        KL = 1/T [sum_i P_i log P_i - sum_k M_k log(m_k / n_k)] - log T + log T_in

    which takes one pass over the cells; an empty cell that clipped values fall into counts as one value. Too narrow a
    range loses by the clipped values, which Q knows nothing of, and too wide a one by cells that merge many bins. The
    objective is that of Migacz (2017, 8-bit inference with TensorRT), here for both signs and any grid. A few values
    that are many times larger than all others would leave these too few bins to tell anything: the bins cover a window
    without them.
    """
    low, high = minmax_range(histogram)
    if low == high:
        return low, high
    cumulative = histogram.bins().cumulative()
    reach = max(-low, high)
    while _outside(cumulative, reach / ZOOM) <= OUTLIERS * histogram.total:
        reach /= ZOOM
    window = (max(low, -reach), min(high, reach))
    return least(_Divergence(histogram, cumulative, reach, grid), window, grid)


def _outside(cumulative: Cumulative, reach: float) -> float:
    """How many values have a larger magnitude."""
    below, inside, every = cumulative.number(np.array([np.nextafter(-reach, -np.inf), reach, FAR]))
    return float(every - inside + below)


class _Divergence:
    """KL(P || Q) of ranges inside a window; see `entropy_range`.

    Attributes:
        width: of a bin.
        all: values but zeros, those outside the window too.
    """

    def __init__(self, histogram: Histogram, cumulative: Cumulative, reach: float, grid: Grid) -> None:
        self._grid = grid
        self.width = reach / DIVERGENCE_BINS
        self.all = histogram.total - histogram.zeros
        self._zeros = histogram.zeros
        edges = np.arange(-DIVERGENCE_BINS, DIVERGENCE_BINS + 1, dtype=np.float64) * self.width
        # an edge has the values that stand on it to its left; the first shall have them to its right
        number = cumulative.number(np.concatenate([[np.nextafter(edges[0], -np.inf)], edges[1:]]))
        self._outside = (float(number[0]), self.all - float(number[-1]))
        self._counts = np.diff(number)
        # what rounding left in an empty bin is no value
        self._counts[self._counts < EMPTY * self.all] = 0.0
        self._number = _summed(self._counts)
        self._occupied = _summed(self._counts > 0)
        self._surprise = _summed(_xlogx(self._counts))

    def __call__(self, trials: Sequence[Range]) -> Floats:
        return np.array([self._of(trial) for trial in trials])

    def _of(self, trial: Range) -> float:
        first, last = (min(max(round(end / self.width), -DIVERGENCE_BINS), DIVERGENCE_BINS) for end in trial)
        params = affine(*trial, self._grid)
        if params.scale < self.width:
            return np.inf  # cells that merge nothing; in the limit P and Q are the same two piles of clipped values
        _, borders = _cells(params)
        at = np.clip(np.rint(borders / self.width), first, last).astype(np.int64) + DIVERGENCE_BINS
        at = at[np.concatenate([[True], np.diff(at) > 0])]
        if at.size < 2:
            return np.inf
        inside, occupied = np.diff(self._number[at]), np.diff(self._occupied[at])
        surprise = float(self._surprise[at[-1]] - self._surprise[at[0]])
        with_clipped = inside.copy()
        clipped = (self._outside[0] + self._number[at[0]], self._outside[1] + self._number[-1] - self._number[at[-1]])
        for cell, lost in zip((0, -1), clipped, strict=True):
            if lost < EMPTY * self.all:
                continue
            start, stop = (at[0], at[1]) if cell == 0 else (at[-2], at[-1])
            there = np.flatnonzero(self._counts[start:stop])
            alone = float(self._counts[start + there[cell]]) if there.size else 0.0
            if there.size == 0:  # Q would rule out what happened: it counts one value, as Laplace's rule does
                inside[cell] = occupied[cell] = 1.0
            surprise += float(_xlogx(alone + lost) - _xlogx(alone))
            with_clipped[cell] += lost
        used = occupied > 0
        told = float(np.sum(with_clipped[used] * np.log(inside[used] / occupied[used])))
        total, kept = self.all + self._zeros, float(inside.sum()) + self._zeros
        return (surprise - told) / total - float(np.log(total)) + float(np.log(kept))


EMPTY = 1e-12
"""Share of all values below which a count is rounding error."""


def _summed(values: NDArray[Any]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _xlogx(x: Any) -> Any:
    return x * np.log(np.where(x > 0, x, 1.0))
