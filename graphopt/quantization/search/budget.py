"""Formats for layers within a budget: the estimate is additive, the truth is measured, and the estimate is corrected.

What a format costs a layer stands in a table: the noise that it alone makes at the outputs, the bytes of its weights,
the time of its kernels. Bytes and times add up. Noise does so for independent errors of layers only: in truth errors
meet, cancel, and are amplified together. So a choice is made on the sum of noises, the model that comes out is
measured, and where a bound on the noise (or on the drop of an accuracy) is not kept, the bound on the sum is lowered
until it is: a bisection over what sums can be, each step the optimum of `graphopt.numerics.selection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.numerics.selection import select

Assignment = dict[str, str]
"""The format of every layer, by key."""

Goal = Literal["noise", "bytes", "time"]

STEPS = 8
"""Measurements of a bisection: they narrow the bound on the sum of noises to a 256th of its range in dB."""


@dataclass(frozen=True)
class Cost:
    """What one format of one layer costs.

    Attributes:
        noise: noise-to-signal power at the outputs that it makes alone.
        bytes: of its weights.
        time: of its kernels and of conversions around them, in any unit.
    """

    noise: float
    bytes: float
    time: float


Table = Mapping[str, Mapping[str, Cost]]
"""Costs by layer and format."""


@dataclass(frozen=True)
class Budget:
    """Bounds; None for none.

    Attributes:
        bytes: of all weights in the table.
        time: of all layers in the table.
        drop: of what is measured on the whole model (noise, or loss of accuracy).
    """

    bytes: float | None = None
    time: float | None = None
    drop: float | None = None


@dataclass(frozen=True)
class Choice:
    """A solution.

    Attributes:
        formats: of every layer.
        cost: sums over the table.
        drop: what was measured with it; None where nothing bounds it.
        measured: how often a model was.
    """

    formats: Assignment
    cost: Cost
    drop: float | None = None
    measured: int = 0


def total(table: Table, formats: Assignment) -> Cost:
    """Sums over all layers."""
    costs = [table[key][formats[key]] for key in table]
    return Cost(sum(c.noise for c in costs), sum(c.bytes for c in costs), sum(c.time for c in costs))


def best(
    table: Table, goal: Goal, *, noise: float | None, bytes: float | None, time: float | None
) -> Assignment | None:
    """The formats of least `goal` by the table, within bounds on the sums; None where there are none.

    Among formats of equal goal the one of less noise is taken, then of fewer bytes.
    """
    bounds = {"noise": noise, "bytes": bytes, "time": time}
    held = [name for name, bound in bounds.items() if bound is not None]
    names = {key: list(choices) for key, choices in table.items()}
    ties = _tie_breaks(table, goal)
    found = select(
        [np.array([getattr(c, goal) + ties(c) for c in choices.values()]) for choices in table.values()],
        [np.array([[getattr(c, name) for name in held] for c in choices.values()]) for choices in table.values()],
        [float(bounds[name] or 0.0) for name in held],
    )
    return None if found is None else {key: names[key][index] for key, index in zip(table, found, strict=True)}


def _tie_breaks(table: Table, goal: Goal) -> Callable[[Cost], float]:
    """A term so small that it decides between equal goals only."""
    unit = 1e-12 * max((getattr(c, goal) for choices in table.values() for c in choices.values()), default=0.0)
    others = [name for name in ("noise", "bytes", "time") if name != goal]
    scale = {
        name: max((getattr(c, name) for choices in table.values() for c in choices.values()), default=0.0) or 1.0
        for name in others
    }
    return lambda cost: unit * sum(getattr(cost, name) / scale[name] for name in others)


def within(table: Table, budget: Budget, drop: Callable[[Assignment], float]) -> Choice | None:
    """The formats that a budget asks for.

    With bounds on bytes or time and none on the drop, the noise is made least. With a bound on the drop, time is made
    least, or the bytes where only they are known; the drop is that of the model measured, never of the table.

    Args:
        table: costs; every layer has at least one format.
        budget: at least one bound.
        drop: measures the model with these formats; 0 for one that is untouched.

    Returns:
        The best found; None where no assignment keeps the bounds.
    """
    bounds = {"bytes": budget.bytes, "time": budget.time}
    if budget.drop is None:
        formats = best(table, "noise", noise=None, **bounds)
        return None if formats is None else Choice(formats, total(table, formats))
    goal: Goal = "time" if any(c.time > 0 for choices in table.values() for c in choices.values()) else "bytes"
    return _Bisection(table, goal, budget, drop).run()


class _Bisection:
    """Over the bound on the sum of noises: the loosest whose optimum keeps the bound on the drop."""

    def __init__(self, table: Table, goal: Goal, budget: Budget, drop: Callable[[Assignment], float]) -> None:
        self.table, self.goal, self.budget, self._drop = table, goal, budget, drop
        self.measured: dict[tuple[str, ...], float] = {}

    def run(self) -> Choice | None:
        """Bisect; see `within`."""
        assert self.budget.drop is not None
        loosest = self._formats(math.inf)
        if loosest is None:
            return None
        if self._keeps(loosest):
            return self._choice(loosest)
        quietest = best(self.table, "noise", noise=None, bytes=self.budget.bytes, time=self.budget.time)
        if quietest is None or not self._keeps(quietest):
            return None
        good = quietest
        high = total(self.table, loosest).noise
        low = total(self.table, quietest).noise
        low = max(low, self._least_positive())
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            formats = self._formats(middle)
            if formats is None:
                low = middle
                continue
            if self._keeps(formats):
                good = min(good, formats, key=lambda f: getattr(total(self.table, f), self.goal))
                low = middle
            else:
                high = middle
        return self._choice(good)

    def _formats(self, noise: float) -> Assignment | None:
        bound = noise if math.isfinite(noise) else None
        return best(self.table, self.goal, noise=bound, bytes=self.budget.bytes, time=self.budget.time)

    def _least_positive(self) -> float:
        """The smallest noise of a single layer: below that a bound on the sum leaves everything untouched."""
        return min((c.noise for choices in self.table.values() for c in choices.values() if c.noise > 0), default=1e-30)

    def _keeps(self, formats: Assignment) -> bool:
        key = tuple(formats[k] for k in self.table)
        if key not in self.measured:
            self.measured[key] = self._drop(formats)
        assert self.budget.drop is not None
        return self.measured[key] <= self.budget.drop

    def _choice(self, formats: Assignment) -> Choice:
        drop = self.measured[tuple(formats[k] for k in self.table)]
        return Choice(formats, total(self.table, formats), drop, len(self.measured))
