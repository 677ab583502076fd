"""How many units of each family to remove so that a budget of work is met at the least harm.

The caller ranks the units of every family (units that occupy the same axes and are therefore interchangeable) and tells
what removing the first k of them would harm. Work is a sum of terms, each a coefficient times a product of alive counts
per axis (`graphopt.analysis.rules.CostTerm`), so what a removal saves depends on what went before. The solver

1. takes steps of least harm per work saved, looking several levels ahead in each family (a step to a far level may be
   cheaper per work than the next one: that follows the lower convex hull of a family's curve), until the budget is met;
2. spends the slack that the last step left: it gives back what relieves most harm per work, while the budget holds;
3. exchanges levels between pairs of families while that lowers the harm within the budget.

Only levels at which every axis involved keeps a multiple of `multiple` positions (or its full length) are considered,
so there is no rounding afterwards; where no level satisfies all axes of a family, levels that satisfy most of them are.
No axis goes below `min_keep` positions. Nothing here knows about operators. Deterministic; of equals the first wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LEVELS = 64
"""Levels of a family that the first stage considers; the later stages go step by step."""

ROUNDS = 200
"""Exchanges at most."""


class Term(Protocol):
    """Work of one place: coefficient * product over axes of the number of alive positions."""

    @property
    def coefficient(self) -> float:
        """What does not depend on units."""

    @property
    def axes(self) -> tuple[Vector, ...]:
        """Unit ids by position, (positions,) or (factors, positions); 0 = never removed."""


@dataclass(frozen=True)
class Family:
    """Interchangeable units.

    Attributes:
        name: for messages.
        units: unit ids in the order in which they would go.
        harm: (len(units) + 1,), harm[k] of removing the first k; harm[0] = 0, not decreasing.
    """

    name: str
    units: tuple[int, ...]
    harm: Floats


@dataclass(frozen=True)
class Choice:
    """What to remove.

    Attributes:
        dead: unit ids.
        removed: number of units by family, in the order given.
        kept: fraction of the work that stays.
        harm: sum over the families.
        least: the smallest fraction that the constraints allow; `kept` is above the budget only if this is.
    """

    dead: frozenset[int]
    removed: tuple[int, ...]
    kept: float
    harm: float
    least: float


def choose(
    families: Sequence[Family],
    terms: Sequence[Term],
    axes: Sequence[Vector],
    *,
    keep: float,
    multiple: int = 1,
    min_keep: int = 1,
) -> Choice:
    """Choose units to remove.

    Args:
        families: candidates; units that are in no family stay.
        terms: the work.
        axes: every axis that may not become empty and wants the multiple, as in `Term.axes`.
        keep: fraction of the work that may stay, in (0, 1].
        multiple: alive counts of axes are multiples of it, or the full length.
        min_keep: positions that every axis keeps at least (or all that it has, if fewer).

    Returns:
        A choice within the budget, or, where the constraints do not allow it, the one of least work.

    Raises:
        ValueError: options out of range, or a unit in two families.
    """
    if not 0 < keep <= 1 or multiple < 1 or min_keep < 1:
        raise ValueError(f"keep={keep} must be in (0, 1], multiple={multiple} and min_keep={min_keep} at least 1")
    state = _State(families, terms, axes, multiple, min_keep)
    full = state.work()
    budget = keep * full * (1 + 1e-12)
    while state.work() > budget:
        step = state.best_step()
        if step is None:
            break
        state.move(*step)
    least = state.work() if state.work() > budget else 0.0
    if not least:
        state.spend(budget)
        state.exchange(budget)
    return Choice(
        frozenset(u for f, k in zip(families, state.level, strict=True) for u in f.units[:k]),
        tuple(state.level),
        state.work() / full if full else 1.0,
        float(sum(f.harm[k] for f, k in zip(families, state.level, strict=True))),
        least / full if full else 0.0,
    )


class _Counter:
    """Alive positions of one axis."""

    def __init__(self, units: Vector, alive: npt.NDArray[np.bool_]) -> None:
        self.units = np.atleast_2d(units)
        self.full = self.count(alive)

    def count(self, alive: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(alive[self.units].all(axis=0)))


class _State:
    """Levels of all families, and what they cost; `alive` is kept in step with `level`."""

    def __init__(
        self, families: Sequence[Family], terms: Sequence[Term], axes: Sequence[Vector], multiple: int, min_keep: int
    ) -> None:
        self.families = families
        self.multiple, self.min_keep = multiple, min_keep
        every = [a for t in terms for a in t.axes] + list(axes)
        top = max([int(a.max(initial=0)) for a in every] + [u for f in families for u in f.units], default=0)
        owner = np.full(top + 1, -1, dtype=np.int64)
        for number, family in enumerate(families):
            if len(family.harm) != len(family.units) + 1:
                raise ValueError(f"family {family.name}: {len(family.units)} units, {len(family.harm)} harms")
            for unit in family.units:
                if unit <= 0 or owner[unit] >= 0:
                    raise ValueError(f"unit {unit} of family {family.name} is frozen or in two families")
                owner[unit] = number
        self.alive = np.ones(top + 1, dtype=bool)
        self.level = [0] * len(families)
        self._units = [np.asarray(f.units, dtype=np.int64) for f in families]
        self._counters: dict[bytes, _Counter] = {}
        self._terms = [(t.coefficient, [self._counter(a) for a in t.axes]) for t in terms]
        checked = {id(c): c for c in (self._counter(a) for a in axes)}
        self._terms_of: list[list[int]] = [[] for _ in families]
        self._axes_of: list[list[_Counter]] = [[] for _ in families]
        for number, (_, counters) in enumerate(self._terms):
            for family_number in {int(o) for c in counters for o in np.unique(owner[c.units]) if o >= 0}:
                self._terms_of[family_number].append(number)
        for counter in checked.values():
            for family_number in (int(o) for o in np.unique(owner[counter.units]) if o >= 0):
                self._axes_of[family_number].append(counter)
        self._work = [self._term(number) for number in range(len(self._terms))]
        self._near = [{g for g in range(len(families)) if self._touch(f, g)} for f in range(len(families))]
        self._steps: dict[int, tuple[float, int] | None] = {}

    def _counter(self, units: Vector) -> _Counter:
        key = np.atleast_2d(units).tobytes() + bytes(str(np.atleast_2d(units).shape), "ascii")
        if key not in self._counters:
            self._counters[key] = _Counter(units, self.alive)
        return self._counters[key]

    def _touch(self, f: int, g: int) -> bool:
        shared_terms = set(self._terms_of[f]) & set(self._terms_of[g])
        return bool(shared_terms) or bool({id(c) for c in self._axes_of[f]} & {id(c) for c in self._axes_of[g]})

    def _term(self, number: int) -> float:
        coefficient, counters = self._terms[number]
        product = coefficient
        for counter in counters:
            product *= counter.count(self.alive)
        return product

    def work(self) -> float:
        return float(sum(self._work))

    def saving(self, family: int, level: int) -> float:
        """Work saved by going to a level (negative: added)."""
        before = self.level[family]
        self._set(family, level)
        saved = sum(self._work[n] - self._term(n) for n in self._terms_of[family])
        self._set(family, before)
        return float(saved)

    def move(self, family: int, level: int) -> None:
        self._set(family, level)
        self.level[family] = level
        for number in self._terms_of[family]:
            self._work[number] = self._term(number)
        for near in self._near[family]:
            self._steps.pop(near, None)

    def _set(self, family: int, level: int) -> None:
        units = self._units[family]
        self.alive[units[:level]] = False
        self.alive[units[level:]] = True

    def levels(self, family: int) -> list[int]:
        """Levels allowed now, given the other families: fewest violations of the multiple, no axis too short."""
        before = self.level[family]
        broken: dict[int, int] = {}
        for level in range(len(self.families[family].units) + 1):
            self._set(family, level)
            counts = [(c.count(self.alive), c.full) for c in self._axes_of[family]]
            if any(count < min(self.min_keep, full) for count, full in counts):
                continue
            broken[level] = sum(count % self.multiple != 0 and count != full for count, full in counts)
        self._set(family, before)
        fewest = min((v for k, v in broken.items() if k > 0), default=0)
        if fewest == len(self._axes_of[family]):
            fewest = 0  # no axis would gain anything: leave the family alone
        return [k for k, v in broken.items() if k in {0, before} or v <= fewest]

    def best_step(self) -> tuple[int, int] | None:
        """(family, level) of least harm per work saved."""
        best: tuple[float, int, int] | None = None
        for number, family in enumerate(self.families):
            if number not in self._steps:
                self._steps[number] = self._step(number, family)
            found = self._steps[number]
            if found is not None and (best is None or found[0] < best[0]):
                best = (found[0], number, found[1])
        return None if best is None else best[1:]

    def _step(self, number: int, family: Family) -> tuple[float, int] | None:
        now = self.level[number]
        ahead = [k for k in self.levels(number) if k > now]
        stride = -(-len(ahead) // LEVELS) if ahead else 1
        best: tuple[float, int] | None = None
        for level in ahead[stride - 1 :: stride]:
            saved = self.saving(number, level)
            if saved <= 0:
                continue
            price = float(family.harm[level] - family.harm[now]) / saved
            if best is None or price < best[0]:
                best = (price, level)
        return best

    def spend(self, budget: float) -> None:
        """Give units back while the budget holds, the most relief per work first."""
        while True:
            room = budget - self.work()
            best: tuple[float, int, int] | None = None
            for number, family in enumerate(self.families):
                now = self.level[number]
                for level in self.levels(number) if now else ():
                    if level >= now:
                        break
                    added = -self.saving(number, level)
                    if added > room:
                        continue
                    relief = float(family.harm[now] - family.harm[level])
                    price = relief / added if added > 0 else np.inf
                    if best is None or price > best[0]:
                        best = (price, number, level)
            if best is None:
                return
            self.move(*best[1:])

    def exchange(self, budget: float) -> None:
        """One family a level down, another a level up, while that lowers the harm within the budget."""
        for _ in range(ROUNDS):
            swap = self._best_swap(budget)
            if swap is None:
                return
            for family, level in swap:
                self.move(family, level)

    def _best_swap(self, budget: float) -> tuple[tuple[int, int], tuple[int, int]] | None:
        room = budget - self.work()
        down: list[tuple[int, int, float, float]] = []  # family, level, work saved, harm added
        up: list[tuple[int, int, float, float]] = []  # family, level, work added, harm relieved
        for number, family in enumerate(self.families):
            now, levels = self.level[number], self.levels(number)
            for level in [k for k in levels if k > now][:2]:
                down.append((number, level, self.saving(number, level), float(family.harm[level] - family.harm[now])))
            for level in [k for k in levels if k < now][-2:]:
                up.append((number, level, -self.saving(number, level), float(family.harm[now] - family.harm[level])))
        best: tuple[float, Any] | None = None
        for f, to, saved, harm in down:
            for g, back, added, relief in up:
                gain = relief - harm
                # families that share terms do not add up exactly: leave those to the other stages
                if f == g or g in self._near[f] or gain <= 1e-12 * relief or added - saved > room:
                    continue
                if best is None or gain > best[0]:
                    best = (gain, ((f, to), (g, back)))
        return None if best is None else best[1]
