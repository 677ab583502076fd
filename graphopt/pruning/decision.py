"""What was decided, carried out on a model: branches erased first, then units cut out of what is left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse
from graphopt.errors import UsageError
from graphopt.pipeline.clone import private_clone
from graphopt.pruning.branches import Branch
from graphopt.pruning.erasing import Eraser
from graphopt.pruning.families import Candidates, candidates
from graphopt.pruning.selection import Choice, Family
from graphopt.rewriting.layers import Layer, layers_of


@dataclass(frozen=True)
class Decision:
    """What goes.

    Attributes:
        choice: of the solver.
        ranked: its families.
        branches: those that are erased.
    """

    choice: Choice
    ranked: Sequence[Family]
    branches: Sequence[Branch]

    @property
    def removed(self) -> list[tuple[int, ...]]:
        """Units by family, in the order in which they go."""
        return [f.units[:k] for f, k in zip(self.ranked, self.choice.removed, strict=True)]

    @property
    def empty(self) -> bool:
        """True where nothing goes."""
        return not self.choice.dead and not self.branches


def told(decision: Decision, dead: Collection[int], what: str, multiple: int) -> list[str]:
    """Sentences for the report.

    Args:
        decision: what was decided.
        dead: the units that went, which a refit may have chosen anew.
        what: what the budget is a fraction of.
        multiple: of widths.
    """
    choice, notes = decision.choice, []
    if decision.branches:
        labels = ", ".join(b.label for b in decision.branches)
        notes.append(f"erased {len(decision.branches)} branches with their sums, which ended in {labels}")
    families = f"{sum(k > 0 for k in choice.removed)} of {len(decision.ranked)} families"
    notes.append(
        f"removed {len(dead)} of {sum(len(f.units) for f in decision.ranked)} units in {families}; "
        f"{choice.kept:.4f} of the {what} stay, widths in multiples of {multiple}"
    )
    return notes


def rows(decision: Decision) -> list[dict[str, str | int | float]]:
    """A row for each family: how many of its units go, and what that harms."""
    return [
        {"family": f.name, "units": len(f.units), "removed": k, "harm": float(f.harm[k])}
        for f, k in zip(decision.ranked, decision.choice.removed, strict=True)
    ]


def out_of_reach(decision: Decision, budget: str, what: str, limits: Mapping[str, int]) -> UsageError:
    """The error of a budget that no choice of units meets.

    Args:
        decision: the one of least work.
        budget: as it was given.
        what: what it is a fraction of.
        limits: options that keep units from going.
    """
    units = sum(len(f.units) for f in decision.ranked)
    told = " and ".join(f"{name}={value}" for name, value in limits.items())
    return UsageError(
        f"{budget} cannot be met: with all {units} candidate units gone that {told} let go, "
        f"{decision.choice.least:.3f} of the {what} is left",
        where="prune",
        hint="raise the budget, set multiple=1, or see `graphopt inspect --units` for what is frozen",
    )


def built(model: ir.Model, coupling: Coupling, decision: Decision, eraser: Eraser | None) -> ir.Model:
    """The model of a decision without any reconstruction: right in its shapes, so that it can be timed."""
    copy = private_clone(model)
    if decision.branches and eraser is not None:
        eraser.apply(copy, decision.branches)
        after = analyse(copy)
        dead = set(translate(coupling, after, [u for units in decision.removed for u in units]))
        remove_units(copy, after, dead)
    else:
        remove_units(copy, coupling, set(decision.choice.dead))
    return copy


@dataclass(frozen=True)
class Left:
    """A model without its erased branches.

    Attributes:
        coupling, layers, families: of what is left.
        removed: units that go, by these families.
        touched: layers that took over means and sums that are gone: what must be refitted although all units stay.
    """

    coupling: Coupling
    layers: dict[str, Layer]
    families: list[Candidates]
    removed: list[list[int]]
    touched: frozenset[str]


def erase_branches(
    model: ir.Model, coupling: Coupling, decision: Decision, eraser: Eraser, exclude: Sequence[str]
) -> Left:
    """Erase the branches of a decision in place, and find its units again in what is left."""
    erased = eraser.apply(model, decision.branches)
    after, layers = analyse(model), layers_of(model)[0]
    families, _ = candidates(after, layers, exclude, refitted=True)
    units = translate(coupling, after, [u for units in decision.removed for u in units])
    touched = frozenset(name for e in erased for name in (e.key, e.total) if name)
    return Left(after, layers, families, regroup(families, units), touched)


def translate(old: Coupling, new: Coupling, units: Sequence[int]) -> list[int]:
    """Unit ids of a smaller graph for those of a larger one, by the slices they own; units that are gone are left out.

    Raises:
        ValueError: an id that does not exist.
    """
    places: dict[tuple[str, int, int], int] = {
        (m.parameter, m.axis, index): unit.id for unit in new.units for m in unit.members for index in m.indices
    }
    found: dict[int, None] = {}
    for number in units:
        if not 1 <= number <= len(old.units):
            raise ValueError(f"there is no unit {number}")
        unit = old.units[number - 1]
        owners = {places.get((m.parameter, m.axis, index)) for m in unit.members for index in m.indices}
        found.update((owner, None) for owner in sorted(o for o in owners if o is not None))
    return list(found)


def regroup(families: Sequence[Candidates], units: Sequence[int]) -> list[list[int]]:
    """Units by family, in the order given."""
    home = {u: i for i, f in enumerate(families) for u in f.units}
    removed: list[list[int]] = [[] for _ in families]
    for unit in units:
        if unit in home:
            removed[home[unit]].append(unit)
    return removed
