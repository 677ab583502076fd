"""Scales of least weighted error: how far the extremes of a block may be clipped so that all else is finer.

For the numbers w of a block, with importances h (the second moments of what they are multiplied by: the diagonal of
tr((W - V) H (W - V)^T), and all that is known before anything is rounded), every candidate scale s = f s_0 and zero
point z is tried, s_0 and z_0 those of the extremes:

    error(s, z) = sum_i h_i (w_i - (clip(round(w_i / s) + z) - z) s)^2

First the factors f at z_0, then the neighbours of z_0 near the best factor. The extremes are among the candidates, so
the error is never above theirs. A grid of factors, not a descent: the error has many minima.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FACTORS = tuple(round(1.0 - 0.03 * k, 2) for k in range(1, 18))
"""Candidates below 1, which is always one: down to half the range."""

NEAR = (-0.06, -0.03, 0.0, 0.03, 0.06)
"""Around the best factor, where another zero point is tried."""

ROWS = 1 << 15
"""Numbers that are worked on at once: they and what is made of them stay in the processor's cache."""


def searched(
    parts: Floats, importance: Floats, scale: Floats, zero: NDArray[Any], low: int, high: int, *, shifts: bool
) -> tuple[Floats, NDArray[Any]]:
    """The best scale and zero point of every block.

    Args:
        parts: (blocks, size), what shares a scale in one row.
        importance: (blocks, size) or (1, size), not negative.
        scale, zero: (blocks,), those of the extremes.
        low, high: smallest and largest integer.
        shifts: zero points may move.

    Returns:
        scale and zero, (blocks,).
    """
    scale, zero = scale.copy(), zero.copy()
    step = max(1, ROWS // max(1, parts.shape[1]))
    for start in range(0, len(parts), step):
        here = slice(start, start + step)
        weights = importance if len(importance) == 1 else importance[here]
        block = _Block(parts[here], weights, scale[here], zero[here].astype(np.float32), low, high)
        block.search(shifts)
        scale[here], zero[here] = block.scale, block.zero.astype(zero.dtype)
    return scale, zero


class _Block:
    """Some blocks and the best scales so far."""

    def __init__(self, parts: Floats, importance: Floats, scale: Floats, zero: Floats, low: int, high: int) -> None:
        self.parts, self.importance, self.low, self.high = parts, importance, low, high
        self.scale, self.zero = scale, zero
        self.least = self._error(scale, zero)

    def search(self, shifts: bool) -> None:
        first, zero = self.scale, self.zero
        for factor in FACTORS:
            self._try(first * np.float32(factor), zero)
        if not shifts:
            return
        best = self.scale
        for shift in (-1, 1):
            moved = np.clip(zero + shift, self.low, self.high).astype(np.float32)
            for more in NEAR:
                self._try(best + first * np.float32(more), moved)

    def _try(self, scale: Floats, zero: Floats) -> None:
        error = self._error(scale, zero)
        better = error < self.least
        self.least = np.where(better, error, self.least)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)

    def _error(self, scale: Floats, zero: Floats) -> Floats:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            steps = np.rint(self.parts / scale[:, None])
            np.clip(steps, (self.low - zero)[:, None], (self.high - zero)[:, None], out=steps)
            steps *= scale[:, None]
            steps -= self.parts
            steps *= steps
            steps *= self.importance
            found: Floats = steps.sum(axis=1)
        return found
