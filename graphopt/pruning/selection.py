"""How many units of each family to remove so that a budget of work is met at the least harm.

The caller ranks the units of every family (units that occupy the same axes and are therefore interchangeable) and tells
what removing the first k of them would harm. Work is a sum of terms, each a function of alive counts per axis: a
product (multiply-accumulates, parameters) or a measured time with its stairs; so what a removal saves depends on what
went before. Whole branches can go as well, in an order given by the caller; a branch that is gone takes its terms along
and makes what its families did to it void. The solver

1. takes steps of least harm per work saved, looking several levels ahead in each family (a step to a far level may be
   cheaper per work than the next one: that follows the lower convex hull of a family's curve, and gets over the treads
   of a stair), until the budget is met;
2. spends the slack that the last step left: it gives back what relieves most harm per work, while the budget holds;
3. exchanges levels between pairs of families while that lowers the harm within the budget.

Only levels at which every axis involved keeps a multiple of `multiple` positions (or its full length) are considered,
so there is no rounding afterwards; where no level satisfies all axes of a family, levels that satisfy most of them are.
No axis goes below `min_keep` positions. Nothing here knows about operators. Deterministic; of equals the first wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graphopt.pruning.solver import State

Vector = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Term(Protocol):
    """Work of one place, as a function of how many positions of some axes are alive."""

    @property
    def axes(self) -> tuple[Vector, ...]:
        """Unit ids by position, (positions,) or (factors, positions); 0 = never removed."""

    @property
    def nodes(self) -> frozenset[str]:
        """Keys of the nodes that need it: it is gone when they all are. Empty: it always stays."""

    def work(self, counts: Sequence[int]) -> float:
        """Work with so many alive positions of each axis."""


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
class Erasures:
    """Branches that can go as a whole, one after the other.

    Attributes:
        nodes: for each branch in the order in which they would go, the keys of its nodes.
        families: for each branch, the numbers of the families that live in it alone.
        harm: (len(nodes) + 1,), harm[k] of erasing the first k, whatever their families lost before; harm[0] = 0.
    """

    nodes: tuple[frozenset[str], ...]
    families: tuple[tuple[int, ...], ...]
    harm: Floats


NO_ERASURES = Erasures((), (), np.zeros(1))


@dataclass(frozen=True)
class Choice:
    """What to remove.

    Attributes:
        dead: unit ids, without those of erased branches.
        removed: number of units by family, in the order given; 0 for families of erased branches.
        erased: how many branches.
        kept: fraction of the work that stays.
        harm: sum over the families and branches.
        least: the smallest fraction that the constraints allow; `kept` is above the budget only if this is.
    """

    dead: frozenset[int]
    removed: tuple[int, ...]
    kept: float
    harm: float
    least: float
    erased: int = 0


def choose(
    families: Sequence[Family],
    terms: Sequence[Term],
    axes: Sequence[Vector],
    *,
    keep: float,
    multiple: int = 1,
    min_keep: int = 1,
    erasures: Erasures = NO_ERASURES,
) -> Choice:
    """Choose units to remove.

    Args:
        families: candidates; units that are in no family stay.
        terms: the work.
        axes: every axis that may not become empty and wants the multiple, as in `Term.axes`.
        keep: fraction of the work that may stay, in (0, 1].
        multiple: alive counts of axes are multiples of it, or the full length.
        min_keep: positions that every axis keeps at least (or all that it has, if fewer).
        erasures: branches that may go as a whole.

    Returns:
        A choice within the budget, or, where the constraints do not allow it, the one of least work.

    Raises:
        ValueError: options out of range, or a unit in two families.
    """
    if not 0 < keep <= 1 or multiple < 1 or min_keep < 1:
        raise ValueError(f"keep={keep} must be in (0, 1], multiple={multiple} and min_keep={min_keep} at least 1")
    state = State(families, terms, axes, multiple, min_keep, erasures)
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
    removed = state.removed()
    return Choice(
        frozenset(u for f, k in zip(families, removed, strict=True) for u in f.units[:k]),
        removed,
        state.work() / full if full else 1.0,
        state.harm(),
        least / full if full else 0.0,
        state.level[-1],
    )
