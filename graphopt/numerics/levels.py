"""The values that a weight may be rounded to: integers from low to high, less a zero point, times a scale.

    v = (q - z) s        s and z one for every block of neighbouring columns of a row, or for all rows alike

Zero is always among them (q = z). Arrays are numpy or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from array_api_compat import array_namespace


@dataclass(frozen=True)
class Levels:
    """The levels of a weight, (m, n).

    Attributes:
        scale: (m, blocks) or (1, blocks), not zero.
        zero: integers of the same shape, as floats.
        low, high: smallest and largest integer.
        block: columns of a block.
    """

    scale: Any
    zero: Any
    low: int
    high: int
    block: int

    def column(self, j: int) -> Column:
        """The levels of one column."""
        b = j // self.block
        return Column(self.scale[:, b], self.zero[:, b], self.low, self.high)

    def steps(self, weight: Any) -> Any:
        """The nearest integers of every number, (m, n), as floats; halves to even."""
        scale, zero = self._wide(self.scale, weight), self._wide(self.zero, weight)
        xp = array_namespace(weight)
        return xp.clip(xp.round(weight / scale) + zero, self.low, self.high)

    def values(self, steps: Any) -> Any:
        """What integers stand for, (m, n)."""
        return self.counts(steps) * self._wide(self.scale, steps)

    def counts(self, steps: Any) -> Any:
        """q - z, (m, n)."""
        return steps - self._wide(self.zero, steps)

    def scaled(self, scale: Any) -> Levels:
        """The same integers, other scales."""
        return replace(self, scale=scale)

    def _wide(self, narrow: Any, weight: Any) -> Any:
        xp = array_namespace(weight)
        n = int(weight.shape[1])
        if int(narrow.shape[1]) == 1:
            return narrow
        return xp.repeat(narrow, self.block, axis=1)[:, :n]


@dataclass(frozen=True)
class Column:
    """The levels of one column of a weight.

    Attributes:
        scale, zero: (m,) or (1,).
        low, high: as for `Levels`.
    """

    scale: Any
    zero: Any
    low: int
    high: int

    def nearest(self, values: Any) -> Any:
        """The nearest level of each, (m,); halves to even."""
        xp = array_namespace(values)
        steps = xp.round(values / self.scale)
        return xp.clip(steps, self.low - self.zero, self.high - self.zero) * self.scale
