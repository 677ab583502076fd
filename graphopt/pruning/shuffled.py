"""Channel shuffles: three nodes that move channels by groups, or a Gather each? Whichever harms less at the budget.

Reshape, Transpose, Reshape can only say what is a box of its parts: the same channels must go in every group. A Gather
(`graphopt.rewriting.shuffles`) says any permutation of what is left, so that every channel is a unit of its own, for
the price of an index. These forms are tried at the same budget:

    none      every shuffle stays as it is written
    all       every shuffle is a Gather
    some      only those are whose survivors in the form `all` are no box; the others need none
    ordered   all, and channels between grouped convolutions in an order in which they can go a few at a time
              (`graphopt.rewriting.transversals`); whole groups cannot go in it

The one of least harm wins, and of equals the one with the fewest Gathers. With a budget of latency every form is timed
with its Gathers, over the model as it is given; multiply-accumulates, parameters and bytes of weights are those of the
layers, and the form changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isinf
from typing import Generic, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.survivors import Survivors
from graphopt.analysis.units import Coupling
from graphopt.pipeline.clone import private_clone
from graphopt.rewriting.scopes import graphs
from graphopt.rewriting.shuffles import Shuffle, gather_shuffles, shuffles
from graphopt.rewriting.transversals import order_transversals

MARGIN = 0.01
"""Part of the harm that Gathers must save: harms are estimates, and a form is not changed for nothing."""

ROUNDING = 1e-6
"""A harm that is none: relative noise of the outputs, or share of the weights."""


class Trial(Protocol):
    """A pruning decided on one form of a model, not yet carried out."""

    @property
    def coupling(self) -> Coupling:
        """The analysis of that form."""

    @property
    def dead(self) -> frozenset[int]:
        """Units that go."""

    @property
    def harm(self) -> float:
        """What that harms, in one scale for all forms; inf where the budget is missed."""


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """The form that won.

    Attributes:
        trial: of that form.
        note: a sentence for the report; empty where the model has no shuffles.
        rows: by shuffle: what became of it, and why.
    """

    trial: T
    note: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Form:
    """How shuffles are written.

    Attributes:
        gathers: names of those that are a Gather.
        ordered: channels of the groups around them were put in order.
    """

    gathers: frozenset[str] = frozenset()
    ordered: bool = False


def choose_form(model: ir.Model, attempt: Callable[[ir.Model], T], *, gather: bool = True) -> Chosen[T]:
    """Try the forms of a model's shuffles.

    Args:
        model: with inferred shapes; the form `none` is tried on it, the others on private clones.
        attempt: decides a pruning of a model; may change it in a way that the trial can take back or carry on.
        gather: False: shuffles stay as they are.
    """
    found = {s.name: s for graph in graphs(model) for s in shuffles(graph)} if gather else {}
    if not found:
        return Chosen(attempt(model))
    dense, everything = private_clone(model), frozenset(found)
    trials: dict[Form, T] = {Form(): attempt(model), Form(everything): attempt(_gathered(dense, everything))}
    free = trials[Form(everything)]
    uneven = frozenset(name for name, s in found.items() if not even(s, free.coupling, free.dead))
    if Form(uneven) not in trials:
        trials[Form(uneven)] = attempt(_gathered(dense, uneven))
    copy = _gathered(dense, everything)
    if order_transversals(copy):
        trials[Form(everything, ordered=True)] = attempt(copy)
    best = Form()
    for form in sorted(trials, key=lambda form: (len(form.gathers), form.ordered))[1:]:
        if trials[form].harm < trials[best].harm * (1 - MARGIN) - ROUNDING:
            best = form
    harms = {form: trial.harm for form, trial in trials.items()}
    return Chosen(trials[best], _note(best, len(found), harms), _rows(found, best, uneven, harms))


def even(shuffle: Shuffle, coupling: Coupling, dead: Iterable[int]) -> bool:
    """True where what is left of the shuffled axis is a box of its parts: the same positions in every group."""
    alive = Survivors(coupling, set(dead)).mask(shuffle.source, shuffle.axis)
    if alive is None:
        return True
    grid = alive.reshape(shuffle.parts)
    sides = [grid.any(axis=tuple(a for a in range(grid.ndim) if a != axis)) for axis in range(grid.ndim)]
    return int(grid.sum()) == int(np.prod([side.sum() for side in sides]))


def _gathered(dense: ir.Model, names: frozenset[str]) -> ir.Model:
    copy = private_clone(dense)
    gather_shuffles(copy, names)
    return copy


def _note(best: Form, count: int, harms: Mapping[Form, float]) -> str:
    plain = _told(harms[Form()])
    if not best.gathers:
        other = min(harm for form, harm in harms.items() if form.gathers)
        return f"{count} channel shuffles stay reshapes: harm {plain}, with Gathers {_told(other)}"
    order = ", channels of their groups in a new order" if best.ordered else ""
    return (
        f"{len(best.gathers)} of {count} channel shuffles became a Gather each{order}: harm {_told(harms[best])}, "
        f"with reshapes alone {plain}"
    )


def _rows(
    found: Iterable[str], best: Form, uneven: frozenset[str], harms: Mapping[Form, float]
) -> list[dict[str, str]]:
    rows = []
    for name in found:
        if name in best.gathers and best.ordered:
            why = "channels of different groups go together whose places the reshapes cannot pair"
        elif name in best.gathers and name in uneven:
            why = "more channels go of one group than of another"
        elif name in best.gathers:
            why = f"Gathers throughout harm {_told(harms[best])}, less than where they are needed alone"
        elif best.gathers:
            why = "the same channels go in every group"
        else:
            why = "the same channels can go in every group at no more harm"
        form = "Gather" if name in best.gathers else "Reshape, Transpose, Reshape"
        rows.append({"shuffle": name, "form": form, "why": why})
    return rows


def _told(harm: float) -> str:
    return "out of reach" if isinf(harm) else f"{harm:.3g}"
