"""Positive scales that make the ranges of channels alike on both sides: cross-layer equalisation in the log domain.

A weight W has scales on its rows (it writes them, divided by s) and on its columns (it reads them, multiplied by s):

    W' = diag(1 / s_out) W diag(s_in)

With r1_i the largest magnitude of all that writes channel i and r2_i of all that reads it, the product of the shares
that channels have of their tensor's range is largest at r1_i / s_i = r2_i s_i, s_i = sqrt(r1_i / r2_i) (Nagel et al.,
arXiv:1906.04721, section 4.1 and its appendix A). Several writers count as one stacked matrix, and so do several
readers. Weights that have scales on both sides couple the groups: they are settled one after the other, sweep by sweep
(Gauss-Seidel), until nothing moves. The log domain makes each step a maximum and a mean, and no scale can overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]
"""Numbers of scales by position, with the rank of a weight and size 1 along axes on which they do not vary; number 0 is
the scale that is always one."""


@dataclass(frozen=True)
class Magnitudes:
    """What equalisation needs of one weight.

    Attributes:
        log2: logarithms of the magnitudes, -inf for zeros; size 1 along axes on which neither scale varies.
        divide: scales of what it writes.
        multiply: scales of what it reads.
    """

    log2: NDArray[np.float32]
    divide: Classes
    multiply: Classes

    @classmethod
    def of(cls, weight: NDArray[Any], divide: Classes, multiply: Classes) -> Magnitudes:
        """The magnitudes of a weight, the largest along axes on which neither scale varies."""
        fixed = tuple(a for a in range(weight.ndim) if divide.shape[a] == 1 and multiply.shape[a] == 1)
        largest = np.max(np.abs(weight.astype(np.float32)), axis=fixed, keepdims=True, initial=0.0)
        largest = np.where(np.isfinite(largest), largest, np.float32(0))  # a channel of inf or nan has no range
        with np.errstate(divide="ignore"):  # zeros become -inf: the maximum passes them over
            return cls(np.log2(largest), divide, multiply)

    def ranges(self, side: Classes, scales: NDArray[np.float64], into: NDArray[np.float64]) -> None:
        """Raise `into` (by scale) to the logarithms of the largest magnitudes at each scale of one side."""
        now = self.log2 + scales[self.multiply] - scales[self.divide]
        others = tuple(a for a in range(side.ndim) if side.shape[a] == 1)
        np.maximum.at(into, side.ravel(), np.max(now, axis=others, keepdims=True, initial=-np.inf).ravel())


def equalised(
    weights: Sequence[Magnitudes],
    groups: Sequence[Classes],
    offsets: Sequence[Magnitudes] = (),
    *,
    limit: float,
    whole: bool = False,
    least_gain: float = 0.5,
    sweeps: int = 50,
    tolerance: float = 0.05,
) -> NDArray[np.float64]:
    """Base-2 logarithms of the scales, by number; 0 where a channel is not written or not read with a weight.

    A group is left as it is where the ranges of what writes it and of what reads it, the largest magnitudes over all of
    its channels, do not shrink together by `least_gain`. A scale changes no product of the magnitudes written and read,
    so that this is what the shares of its channels gain. The scales of a group have mean one: what all have in common
    moves no range against another. No bias grows beyond the largest one of its layer: a channel of tiny weights and an
    ordinary bias is a constant, and would take the range of all others.

    Args:
        weights: all that scales stand on.
        groups: numbers of the scales that are settled together, each number in one group.
        offsets: what is added to channels and divided with them.
        limit: bound of the magnitude of a logarithm.
        whole: round to whole logarithms.
        least_gain: bits.
        sweeps: at most this many passes over all groups.
        tolerance: no logarithm moved by more: settled.
    """
    sides = _Sides(weights, groups)
    scales, least = np.zeros(sides.count), _least(offsets, sides.count)
    for _ in range(sweeps):
        moved = 0.0
        for number, group in enumerate(groups):
            written, read = sides.of(number, scales)
            both = group[np.isfinite(written[group]) & np.isfinite(read[group])]
            wanted = scales[both] + (written[both] - read[both]) / 2
            wanted = np.maximum(np.clip(wanted - wanted.mean() if len(both) else wanted, -limit, limit), least[both])
            moved = max(moved, float(np.max(np.abs(wanted - scales[both]), initial=0.0)))
            scales[both] = wanted
        if moved <= tolerance:
            break
    if whole:
        scales = np.maximum(np.clip(np.rint(scales), -np.floor(limit), np.floor(limit)), np.ceil(least))
    for number, group in enumerate(groups):
        without = scales.copy()
        without[group] = 0.0
        before, after = (sum(float(side[group].max()) for side in sides.of(number, s)) for s in (without, scales))
        if not before - after >= least_gain:
            scales = without
    return scales


def _least(offsets: Sequence[Magnitudes], count: int) -> NDArray[np.float64]:
    """Logarithms below which a scale would lift an offset above the largest one beside it; -inf without any."""
    least = np.full(count, -np.inf)
    for offset in offsets:
        peak = float(offset.log2.max(initial=-np.inf))
        if np.isfinite(peak):
            lifted = np.broadcast_to(offset.divide, offset.log2.shape).ravel()
            np.maximum.at(least, lifted, offset.log2.ravel() - peak)
    return least


class _Sides:
    """What writes and what reads each group."""

    def __init__(self, weights: Sequence[Magnitudes], groups: Sequence[Classes]) -> None:
        self.count = 1 + max((int(group.max()) for group in groups), default=0)
        group_of = np.full(self.count, -1)
        for number, group in enumerate(groups):
            group_of[group] = number
        self._writers: list[list[Magnitudes]] = [[] for _ in groups]
        self._readers: list[list[Magnitudes]] = [[] for _ in groups]
        for weight in weights:
            for members, side in ((self._writers, weight.divide), (self._readers, weight.multiply)):
                for number in np.unique(group_of[side]):
                    if number >= 0:
                        members[number].append(weight)

    def of(self, number: int, scales: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logarithms of the largest magnitudes written and read, by scale; those of other groups may be incomplete."""
        written, read = np.full(self.count, -np.inf), np.full(self.count, -np.inf)
        for weight in self._writers[number]:
            weight.ranges(weight.divide, scales, written)
        for weight in self._readers[number]:
            weight.ranges(weight.multiply, scales, read)
        return written, read
