"""Errors from sums over all elements of all samples, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from graphopt.diagnosis.matching import Pair
from graphopt.diagnosis.running import Array, Seen

MASK = 9e3
"""Masks are added to scores as -10,000, as -1e9 or as the lowest number: where the least element of a tensor is below
minus this, elements within 1 % of it are masks, and left out: beside them no error of a score would show."""

OVERFLOW = 1e30
"""Elements that reach this stand for infinities and are left out."""

BLOCK = 1 << 20
"""Elements that are taken to float64 at a time."""


@dataclass(frozen=True)
class Error:
    """How far a tensor is off: signal to noise in dB (inf where exact), cosine similarity, largest difference."""

    sqnr_db: float
    cosine: float
    max_abs: float


class Sums:
    """Moments of a tensor and its approximation."""

    def __init__(self) -> None:
        self.signal = self.noise = self.other = self.product = self.max_abs = 0.0
        self.nonfinite = 0

    def add(self, a: Array, b: Array) -> None:
        """Take in one batch, of any shape; masks and infinities are left out."""
        flat, found = a.reshape(-1), b.reshape(-1)
        least = float(np.fmin.reduce(flat, initial=0.0))
        masked = 0.99 * least if least < -MASK else -math.inf
        for start in range(0, flat.size, BLOCK):
            x = flat[start : start + BLOCK].astype(np.float64)
            y = found[start : start + BLOCK].astype(np.float64)
            plain = (np.abs(x) < OVERFLOW) & (np.abs(y) < OVERFLOW) & (x > masked)
            if not plain.all():
                differ = ~(np.isfinite(x) & np.isfinite(y)) & (x != y) & ~(np.isnan(x) & np.isnan(y))
                self.nonfinite += int(np.count_nonzero(differ))
                x, y = x[plain], y[plain]
            error = y - x
            self.signal += float(x @ x)
            self.noise += float(error @ error)
            self.other += float(y @ y)
            self.product += float(x @ y)
            self.max_abs = max(self.max_abs, float(np.abs(error).max(initial=0.0)))

    def error(self) -> Error:
        """The error over everything that was taken in."""
        if self.nonfinite:
            return Error(-math.inf, 0.0, math.inf)
        if self.noise == 0.0:
            return Error(math.inf, 1.0, 0.0)
        sqnr = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        return Error(sqnr, min(1.0, self.product / norms) if norms else 0.0, self.max_abs)


@dataclass
class Both:
    """The error that a layer adds and the one that has accumulated behind it.

    Attributes:
        uneven: shapes in A and B of a batch in which they differ, where they depend on the data; it is left out.
    """

    added: Sums = field(default_factory=Sums)
    total: Sums = field(default_factory=Sums)
    uneven: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def measured(seen: Iterable[Seen]) -> dict[Pair, Both]:
    """The sums of every tensor of a stream."""
    found: dict[Pair, Both] = {}
    for tensor in seen:
        sums = found.setdefault(tensor.pair, Both())
        other = next((x.shape for x in (tensor.b, tensor.alone) if x.shape != tensor.a.shape), None)
        if other is not None:
            sums.uneven = tensor.a.shape, other
            continue
        sums.added.add(tensor.a, tensor.alone)
        sums.total.add(tensor.a, tensor.b)
    return found
