"""The state of the budget solver: levels of all variables, what they cost and harm, and the moves between them.

See `graphopt.pruning.selection` for the stages that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from graphopt.pruning.selection import Erasures, Family, Term

Vector = npt.NDArray[np.int64]

LEVELS = 64
"""Levels of a family that the first stage considers; the later stages also go step by step."""

NEAREST = 4
"""Levels each way that an exchange considers, of those at which the work changes; and two at which it may not."""

ROUNDS = 200
"""Exchanges at most."""


class _Counter:
    """Alive positions of one axis."""

    def __init__(self, units: Vector, alive: npt.NDArray[np.bool_]) -> None:
        self.units = np.atleast_2d(units)
        self.full = self.count(alive)

    def count(self, alive: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(alive[self.units].all(axis=0)))


@dataclass(frozen=True)
class Move:
    """A change of one variable's level."""

    variable: int
    level: int
    saved: float
    harm: float


class State:
    """Levels of all variables, and what they cost; `alive` is kept in step with `level`.

    The variables are the families, and last the number of erased branches.
    """

    def __init__(
        self,
        families: Sequence[Family],
        terms: Sequence[Term],
        axes: Sequence[Vector],
        multiple: int,
        min_keep: int,
        erasures: Erasures,
    ) -> None:
        self.families, self.erasures = families, erasures
        self.multiple, self.min_keep = multiple, min_keep
        every = [a for t in terms for a in t.axes] + list(axes)
        top = max([int(a.max(initial=0)) for a in every] + [u for f in families for u in f.units], default=0)
        owner = _owners(families, top)
        self.alive = np.ones(top + 1, dtype=bool)
        self.last = len(families)
        self.level = [0] * (self.last + 1)
        self._units = [np.asarray(f.units, dtype=np.int64) for f in families]
        self._counters: dict[bytes, _Counter] = {}
        self._terms = [(t, [self._counter(a) for a in t.axes]) for t in terms]
        checked = {id(c): c for c in (self._counter(a) for a in axes)}
        self._terms_of: list[list[int]] = [[] for _ in self.level]
        self._axes_of: list[list[_Counter]] = [[] for _ in families]
        self._gone_at = [_first(t.nodes, erasures.nodes) for t in terms]
        self._void_at = [
            min([k for k, held in enumerate(erasures.families, 1) if f in held], default=len(erasures.nodes) + 1)
            for f in range(len(families))
        ]
        for number, (_, counters) in enumerate(self._terms):
            for family_number in {int(o) for c in counters for o in np.unique(owner[c.units]) if o >= 0}:
                self._terms_of[family_number].append(number)
            if self._gone_at[number] <= len(erasures.nodes):
                self._terms_of[self.last].append(number)
        for counter in checked.values():
            for family_number in (int(o) for o in np.unique(owner[counter.units]) if o >= 0):
                self._axes_of[family_number].append(counter)
        self._work = [self._term(number) for number in range(len(self._terms))]
        self._near = [{g for g in range(len(self.level)) if self._touch(f, g)} for f in range(len(self.level))]
        self._steps: dict[int, tuple[float, int] | None] = {}

    def _counter(self, units: Vector) -> _Counter:
        key = np.atleast_2d(units).tobytes() + bytes(str(np.atleast_2d(units).shape), "ascii")
        if key not in self._counters:
            self._counters[key] = _Counter(units, self.alive)
        return self._counters[key]

    def _touch(self, f: int, g: int) -> bool:
        if set(self._terms_of[f]) & set(self._terms_of[g]):
            return True
        if self.last in (f, g):
            return f == g or self._void_at[min(f, g)] <= len(self.erasures.nodes)
        return bool({id(c) for c in self._axes_of[f]} & {id(c) for c in self._axes_of[g]})

    def _term(self, number: int) -> float:
        if self._gone_at[number] <= self.level[self.last]:
            return 0.0
        term, counters = self._terms[number]
        return term.work([counter.count(self.alive) for counter in counters])

    def work(self) -> float:
        """Work at the present levels."""
        return float(sum(self._work))

    def removed(self) -> tuple[int, ...]:
        """Units to remove by family; those of erased branches go with these."""
        erased = self.level[self.last]
        return tuple(0 if void <= erased else k for k, void in zip(self.level[:-1], self._void_at, strict=True))

    def harm(self) -> float:
        """Harm at the present levels."""
        harm = sum(f.harm[k] for f, k in zip(self.families, self.removed(), strict=True))
        return float(harm + self.erasures.harm[self.level[self.last]])

    def harmed(self, variable: int, level: int) -> float:
        """Harm added by going to a level (negative: relieved)."""
        now = self.level[variable]
        if variable < self.last:
            void = self._void_at[variable] <= self.level[self.last]
            curve = self.families[variable].harm
            return 0.0 if void else float(curve[level] - curve[now])
        low, high = sorted((now, level))
        voided = sum(
            self.families[f].harm[self.level[f]] for f, at in enumerate(self._void_at) if low < at <= high
        )  # fmt: skip
        return float(self.erasures.harm[level] - self.erasures.harm[now] - np.sign(level - now) * voided)

    def saving(self, variable: int, level: int) -> float:
        """Work saved by going to a level (negative: added)."""
        before = self.level[variable]
        self._set(variable, level)
        saved = sum(self._work[n] - self._term(n) for n in self._terms_of[variable])
        self._set(variable, before)
        return float(saved)

    def move(self, variable: int, level: int) -> None:
        """Go to a level."""
        self._set(variable, level)
        for number in self._terms_of[variable]:
            self._work[number] = self._term(number)
        for near in self._near[variable]:
            self._steps.pop(near, None)

    def _set(self, variable: int, level: int) -> None:
        self.level[variable] = level
        if variable < self.last:
            units = self._units[variable]
            self.alive[units[:level]] = False
            self.alive[units[level:]] = True

    def levels(self, variable: int) -> list[int]:
        """Levels allowed now, given the other families: fewest violations of the multiple, no axis too short."""
        if variable == self.last:
            return list(range(len(self.erasures.nodes) + 1))
        before = self.level[variable]
        broken: dict[int, int] = {}
        for level in range(len(self.families[variable].units) + 1):
            self._set(variable, level)
            counts = [(c.count(self.alive), c.full) for c in self._axes_of[variable]]
            if any(count < min(self.min_keep, full) for count, full in counts):
                continue
            broken[level] = sum(count % self.multiple != 0 and count != full for count, full in counts)
        self._set(variable, before)
        fewest = min((v for k, v in broken.items() if k > 0), default=0)
        if fewest == len(self._axes_of[variable]):
            fewest = 0  # no axis would gain anything: leave the family alone
        return [k for k, v in broken.items() if k in {0, before} or v <= fewest]

    def best_step(self) -> tuple[int, int] | None:
        """(variable, level) of least harm per work saved."""
        best: tuple[float, int, int] | None = None
        for number in range(len(self.level)):
            if number not in self._steps:
                self._steps[number] = self._step(number)
            found = self._steps[number]
            if found is not None and (best is None or found[0] < best[0]):
                best = (found[0], number, found[1])
        return None if best is None else best[1:]

    def _step(self, number: int) -> tuple[float, int] | None:
        ahead = [k for k in self.levels(number) if k > self.level[number]]
        best: tuple[float, int] | None = None
        for level in _thinned(ahead):
            saved = self.saving(number, level)
            if saved <= 0:
                continue
            price = self.harmed(number, level) / saved
            if best is None or price < best[0]:
                best = (price, level)
        return best

    def spend(self, budget: float) -> None:
        """Give back while the budget holds, the most relief per work first."""
        while True:
            room = budget - self.work()
            best: tuple[float, int, int] | None = None
            for number, now in enumerate(self.level):
                for level in self.levels(number) if now else ():
                    if level >= now:
                        break
                    added, relief = -self.saving(number, level), -self.harmed(number, level)
                    if added > room or relief < 0:
                        continue
                    price = relief / added if added > 0 else np.inf
                    if best is None or price > best[0]:
                        best = (price, number, level)
            if best is None:
                return
            self.move(*best[1:])

    def exchange(self, budget: float) -> None:
        """One variable a level down, another a level up, while that lowers the harm within the budget."""
        for _ in range(ROUNDS):
            swap = self._best_swap(budget)
            if swap is None:
                return
            for move in swap:
                self.move(move.variable, move.level)

    def _best_swap(self, budget: float) -> tuple[Move, Move] | None:
        room = budget - self.work()
        down: list[Move] = []
        up: list[Move] = []
        for number, now in enumerate(self.level):
            levels = self.levels(number)
            down += self._nearest(number, [k for k in levels if k > now])
            up += self._nearest(number, [k for k in reversed(levels) if k < now])
        best: tuple[float, tuple[Move, Move]] | None = None
        for one in down:
            for other in up:
                if one.variable == other.variable:
                    continue
                found = (one, other)
                if other.variable in self._near[one.variable]:
                    found = self._together(one, other)
                gain, left = -sum(m.harm for m in found), room + sum(m.saved for m in found)
                if left < 0 or gain <= 1e-9 * abs(other.harm):
                    continue
                if best is None or gain > best[0]:
                    best = (gain, found)
        return None if best is None else best[1]

    def _nearest(self, number: int, levels: list[int]) -> list[Move]:
        """Moves to the next levels, and on to those at which the work changes."""
        found = [self._to(number, level) for level in levels[:2]]
        stairs = 0
        for level in _thinned(levels[2:]):
            move = self._to(number, level)
            if stairs == NEAREST:
                break
            if not found or abs(move.saved - found[-1].saved) > 1e-12 * abs(move.saved):
                found.append(move)
                stairs += 1
        return found

    def _to(self, number: int, level: int) -> Move:
        return Move(number, level, self.saving(number, level), self.harmed(number, level))

    def _together(self, one: Move, other: Move) -> tuple[Move, Move]:
        """The second of two moves as it is after the first: they share terms."""
        before = self.level[one.variable]
        self.move(one.variable, one.level)
        allowed = other.level in self.levels(other.variable)
        after = self._to(other.variable, other.level)
        self.move(one.variable, before)
        return one, after if allowed else Move(other.variable, other.level, -np.inf, 0.0)


def _thinned(levels: list[int]) -> list[int]:
    """At most `LEVELS` of them, the last included."""
    stride = -(-len(levels) // LEVELS) if levels else 1
    return levels[::-1][::stride][::-1]


def _owners(families: Sequence[Family], top: int) -> Vector:
    """The family of each unit, -1 where it has none."""
    owner = np.full(top + 1, -1, dtype=np.int64)
    for number, family in enumerate(families):
        if len(family.harm) != len(family.units) + 1:
            raise ValueError(f"family {family.name}: {len(family.units)} units, {len(family.harm)} harms")
        for unit in family.units:
            if unit <= 0 or owner[unit] >= 0:
                raise ValueError(f"unit {unit} of family {family.name} is frozen or in two families")
            owner[unit] = number
    return owner


def _first(nodes: frozenset[str], branches: Sequence[frozenset[str]]) -> int:
    """How many branches must go until all these nodes are gone; one more than there are: they never are."""
    left = set(nodes)
    for number, branch in enumerate(branches, 1):
        left -= branch
        if nodes and not left:
            return number
    return len(branches) + 1
