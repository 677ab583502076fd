"""Random tensors by mean and variance, and what pointwise functions, sums and products make of them.

Every element is taken to be normal and independent of the others. Moments of f(x) are integrals over the bell curve,

    E f(x) = sum_i w_i f(mean + sqrt(2 variance) t_i),         t_i, w_i: Gauss-Hermite nodes and weights,

which holds for any f; kinks (ReLU) cost a few per mille. The interval [low, high] is what a tensor hardly leaves:
deviations around the mean, as many as `reach` says, where a sum makes it, and its image under f behind that, so that
ReLU cuts it at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

REACH = 6.0
"""Deviations on each side of a mean that is known (Nagel et al. 2019, arXiv:1906.04721, take as many)."""

CARRIED = 12.0
"""The same where a variance was computed as if elements were independent: features of real data rise together, and the
deviation of their sums is larger, by layers upon layers. A range twice too wide costs one bit, one too narrow clips."""

_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(64)


@dataclass(frozen=True)
class Normal:
    """Mean, variance and interval of the elements of a tensor: arrays that broadcast to its shape."""

    mean: Floats
    variance: Floats
    low: Floats
    high: Floats

    @classmethod
    def of(cls, mean: ArrayLike, variance: ArrayLike, reach: float = REACH) -> Normal:
        """With the interval that follows."""
        m, v = np.asarray(mean, np.float64), np.maximum(np.asarray(variance, np.float64), 0.0)
        return cls(m, v, m - reach * np.sqrt(v), m + reach * np.sqrt(v))

    @classmethod
    def uniform(cls, low: float, high: float) -> Normal:
        """Evenly spread numbers."""
        ends = np.float64(low), np.float64(high)
        return cls(np.asarray(sum(ends) / 2), np.asarray((ends[1] - ends[0]) ** 2 / 12), *map(np.asarray, ends))

    @property
    def range(self) -> tuple[float, float]:
        """Over all elements, with zero."""
        return min(float(self.low.min()), 0.0), max(float(self.high.max()), 0.0)

    def each(self, change: Callable[[Floats], Floats]) -> Normal:
        """The elements moved about: `change` is applied to all four arrays."""
        return Normal(change(self.mean), change(self.variance), change(self.low), change(self.high))

    def along(self, axis: int, size: int, rank: int) -> Normal:
        """(size,): the distribution at each position of an axis, mixed over the others."""
        lead = self.each(lambda a: a.reshape((1,) * (rank - a.ndim) + a.shape))
        others = tuple(i for i in range(rank) if i != axis % rank)
        mean = lead.mean.mean(axis=others)
        variance = lead.variance.mean(axis=others) + np.broadcast_arrays(lead.mean, lead.variance)[0].var(axis=others)
        found = Normal(mean, variance, lead.low.min(axis=others), lead.high.max(axis=others))
        return found.each(lambda a: np.broadcast_to(a, size))

    def mixed(self) -> Normal:
        """One distribution for all elements."""
        means = np.broadcast_arrays(self.mean, self.variance)[0]
        return Normal(
            np.asarray(self.mean.mean()), np.asarray(self.variance.mean() + means.var()),
            np.asarray(self.low.min()), np.asarray(self.high.max()),
        )  # fmt: skip

    def through(self, f: Callable[[Floats], Floats]) -> Normal:
        """f(x), element by element; `f` works on arrays."""
        nodes = self.mean[..., None] + np.sqrt(2 * self.variance)[..., None] * _NODES
        values = f(np.clip(nodes, self.low[..., None], self.high[..., None]))
        weights = _WEIGHTS / _WEIGHTS.sum()
        mean = (values * weights).sum(axis=-1)
        variance = (np.square(values - mean[..., None]) * weights).sum(axis=-1)
        # functions that are not monotone have their extremes inside
        grid = self.low[..., None] + np.linspace(0, 1, 65) * (self.high - self.low)[..., None]
        image = f(np.concatenate([grid, np.clip(0.0, self.low, self.high)[..., None]], axis=-1))
        return Normal(mean, variance, image.min(axis=-1), image.max(axis=-1))

    def plus(self, other: Normal) -> Normal:
        """x + y; never wider than the sum of both intervals."""
        found = Normal.of(self.mean + other.mean, self.variance + other.variance, CARRIED)
        low, high = self.low + other.low, self.high + other.high
        return Normal(found.mean, found.variance, np.maximum(found.low, low), np.minimum(found.high, high))

    def times(self, other: Normal) -> Normal:
        """x y: variance v w + v n^2 + w m^2 with means m, n and variances v, w."""
        variance = self.variance * other.variance + self.variance * other.mean**2 + other.variance * self.mean**2
        corners = np.stack(
            np.broadcast_arrays(*(a * b for a in (self.low, self.high) for b in (other.low, other.high)))
        )
        found = Normal.of(self.mean * other.mean, variance, CARRIED)
        low, high = np.maximum(found.low, corners.min(axis=0)), np.minimum(found.high, corners.max(axis=0))
        return Normal(found.mean, found.variance, low, high)


def union(parts: Sequence[Normal]) -> Normal:
    """An element drawn from any of them, with equal chances."""
    flat = [part.mixed() for part in parts]
    means = np.array([float(part.mean) for part in flat])
    variance = np.mean([float(part.variance) for part in flat]) + means.var()
    low, high = min(float(p.low) for p in flat), max(float(p.high) for p in flat)
    return Normal(np.asarray(means.mean()), np.asarray(variance), np.asarray(low), np.asarray(high))


def linear(weight: Floats, bias: Floats, x: Normal, kernel: int) -> Normal:
    """W x + b.

    Args:
        weight: (groups, rows, columns), `kernel` neighbouring columns for each channel of a group.
        bias: (groups * rows,).
        x: (channels,), groups one after the other.
        kernel: columns per channel.
    """
    groups = weight.shape[0]
    mean, variance = (np.repeat(a.reshape(groups, -1), kernel, axis=1) for a in (x.mean, x.variance))
    out = np.einsum("grc,gc->gr", weight, mean), np.einsum("grc,gc->gr", np.square(weight), variance)
    return Normal.of(out[0].reshape(-1) + bias, out[1].reshape(-1), CARRIED)
