"""Labels: integers on tensor positions, related by equations while the graph is walked, solved into units.

A position of a tensor is alive iff every label it carries is alive. A dense tensor can only lose whole slices, so what
survives is a product of per-axis sets (a *box*); labels are therefore kept per axis, as vectors: axis ``a`` of a tensor
of size ``n`` carries a tuple of *factors*, each an int64 vector of length ``n``, and position ``i`` is alive iff
``factor[i]`` is alive for every factor (a monomial). An axis without factors is never shortened. Label 0 is never
removed and is the neutral element of a monomial. Memory is linear in the sum of the axis lengths, not in the elements.

Where an axis is split over several axes, heads times positions within a head, each of these gets labels of its own, and
a label of the axis that was split is their product (`LabelTable.box`). So heads and positions within heads are both
units, and neither has to be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
Factors = tuple[Vector, ...]
Axes = dict[int, Factors]
"""Labels of one tensor: axis -> factors. Axes that are absent carry no labels."""

Trait = Literal["outer", "inner", "copy", "head"]
"""What is known of a label beside its equations: the outer or inner coordinate of a split, a copy, one of the matrices
of a batched product of activations. Units are named after it."""

EMPTIES = "removing it would empty the axis"


class LabelTable:
    """All labels of one graph, the equations between them and the reasons that freeze some.

    Equations are only collected; `solve` finds their solution, so the walk stays linear.
    """

    def __init__(self) -> None:
        self._next = 1
        self._equal: list[Vector] = []
        self._products: list[Vector] = []
        self._frozen: list[tuple[Vector, str]] = []
        self._axes: list[Vector] = []
        self._traits: list[tuple[Vector, Trait]] = []

    def fresh(self, count: int) -> Vector:
        """`count` labels that occur nowhere else."""
        labels = np.arange(self._next, self._next + count, dtype=np.int64)
        self._next += count
        return labels

    def axis(self, count: int, trait: Trait) -> Vector:
        """Fresh labels for an axis that makes nothing by itself: a coordinate of a box, or copies."""
        labels = self.fresh(count)
        self._axes.append(labels)
        self.note(labels, trait)
        return labels

    def note(self, labels: Vector, trait: Trait) -> None:
        """Remember a trait of labels."""
        self._traits.append((labels, trait))

    def equate(self, left: Vector, right: Vector, reason: str) -> None:
        """Both must live or die together, position by position (arrays broadcast).

        Where one side is 0 the other side freezes, for `reason`.
        """
        left, right = (side.ravel() for side in np.broadcast_arrays(left, right))
        for one, other in ((left, right), (right, left)):
            self.freeze((one[other == 0],), reason)
        both = (left != 0) & (right != 0) & (left != right)
        if both.any():
            self._equal.append(np.stack([left[both], right[both]], axis=1))

    def define(self, whole: Vector, factors: Sequence[Vector], reason: str) -> None:
        """A position of `whole` is alive iff all `factors` are alive there (arrays broadcast).

        Where `whole` is 0 the factors freeze, and where one of two factors is 0 the other is equated, for `reason`.
        """
        *more, inner = factors
        outer = more[0] if len(more) == 1 else self.product(more)
        columns = [side.ravel() for side in np.broadcast_arrays(whole, outer, inner)]
        rows = np.stack(columns, axis=1)
        self.freeze((np.concatenate([columns[1][columns[0] == 0], columns[2][columns[0] == 0]]),), reason)
        self.freeze((columns[0][(columns[1] == 0) & (columns[2] == 0)],), reason)
        rows = rows[rows[:, 0] != 0]
        if len(rows):
            self._products.append(rows)

    def product(self, factors: Sequence[Vector]) -> Vector:
        """One label a position that lives iff all factors do; the vectors have one length."""
        if len(factors) == 1:
            return factors[0]
        whole = self.fresh(len(factors[0]))
        self.define(whole, factors, EMPTIES)
        return whole

    def box(self, labels: npt.NDArray[np.int64], where: str, keep: int | None = None) -> Axes:
        """Labels per axis for a dense array whose elements carry labels.

        Along several axes every element becomes the product of its coordinates, each with a fresh label.

        Args:
            labels: labels by position, any rank.
            where: the node, for the reason of a freeze.
            keep: the only axis that may be shortened; the others are tied. None: all.
        """
        varying = varying_axes(labels)
        if not varying:  # all positions carry one label: they live and die together
            self.freeze((labels.ravel()[:1],), f"{where}: {EMPTIES}")
            return {}
        reason = f"{where}: shares a slice with positions that are never removed"
        if len(varying) == 1 and keep in (None, varying[0]):
            return {varying[0]: (np.ascontiguousarray(_line(labels, varying[0])),)}
        if keep is not None:
            rows = np.moveaxis(labels, keep, 0).reshape(labels.shape[keep], -1)
            self.equate(rows, rows[:, :1], reason)
            if keep not in varying:  # what the other axes held is one label now
                self.freeze((rows[:1, 0],), f"{where}: {EMPTIES}")
                return {}
            return {keep: (np.ascontiguousarray(rows[:, 0]),)}
        grid = labels[tuple(slice(None) if a in varying else 0 for a in range(labels.ndim))]
        traits: list[Trait] = ["inner"] * len(varying)
        traits[0] = "outer"
        axes: Axes = {a: (self.axis(labels.shape[a], t),) for a, t in zip(varying, traits, strict=True)}
        whole = grid.reshape(-1, grid.shape[-1])
        for axis in varying[:0:-1]:
            last = axis == varying[1]
            outer = axes[varying[0]][0] if last else self.fresh(len(whole))
            self.define(whole, [outer[:, None], axes[axis][0]], reason)
            if not last:
                whole = outer.reshape(-1, labels.shape[varying[varying.index(axis) - 1]])
        return axes

    def freeze(self, factors: Iterable[Vector], reason: str) -> None:
        """Nothing that carries one of these labels may be removed, for `reason`."""
        for vector in factors:
            if vector.any():
                self._frozen.append((vector, reason))

    def solve(self) -> Solution:
        """Solve the equations; see `graphopt.analysis.solve`."""
        from graphopt.analysis.solve import Equations

        products = _rows(self._products, 3)
        groups = np.repeat(np.arange(len(self._products)), [len(rows) for rows in self._products])
        frozen = np.concatenate([np.zeros(1, dtype=np.int64), *(vector for vector, _ in self._frozen)])
        solved = Equations(self._next, _rows(self._equal, 2), frozen, products, groups, self._axes).solve()
        atoms = np.zeros(len(solved.monomials) + 1, dtype=bool)
        atoms[solved.monomials] = True
        atoms[0] = False
        # Units are numbered in the order in which their first label was made: the same graph gives the same ids.
        number = np.cumsum(atoms) * atoms
        component = solved.component[: self._next]
        reasons = _Reasons(solved.component)
        for vector, reason in [*self._frozen, (solved.emptying, EMPTIES)]:
            reasons.add(vector, reason)
        reasons.spread(solved.causes)
        traits: dict[Trait, list[Vector]] = {}
        for vector, trait in self._traits:
            traits.setdefault(trait, []).append(component[vector])
        monomials = number[solved.monomials]
        return Solution(
            monomials[component],
            component,
            reasons,
            {trait: monomials[np.unique(np.concatenate(found))] for trait, found in traits.items()},
        )


class _Reasons:
    """Why classes are frozen."""

    def __init__(self, component: Vector) -> None:
        self._component = component
        self._texts: dict[str, int] = {}
        self._pairs = np.empty((0, 2), dtype=np.int64)
        self._new: list[Vector] = []

    def add(self, labels: Vector, reason: str) -> None:
        """One more reason for the classes of some labels."""
        found = np.unique(self._component[labels[labels != 0]])
        number = self._texts.setdefault(reason, len(self._texts))
        self._new.append(np.stack([found, np.full(len(found), number)], axis=1))

    def spread(self, causes: Vector) -> None:
        """The reasons of the second label of each row also hold for the first."""
        edges = np.unique(self._component[causes], axis=0)
        while self._settle():
            owner, rows = self._of(edges[:, 1])
            self._new.append(np.stack([edges[owner, 0], rows], axis=1))

    def _settle(self) -> bool:
        """Sort in what is new; True if anything is."""
        before = len(self._pairs)
        self._pairs = np.unique(np.concatenate([self._pairs, *self._new]), axis=0)
        self._new = []
        return len(self._pairs) > before

    def _of(self, classes: Vector) -> tuple[Vector, Vector]:
        """All reasons of some classes: (which of them, number of the reason)."""
        starts, ends = (np.searchsorted(self._pairs[:, 0], classes, side=side) for side in ("left", "right"))
        owner = np.repeat(np.arange(len(classes)), ends - starts)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(ends - starts) - (ends - starts), ends - starts)
        return owner, self._pairs[starts[owner] + offset, 1]

    def of(self, labels: Vector) -> list[str]:
        """Reasons of some labels, each once, in order of discovery."""
        numbers = np.unique(self._of(np.unique(self._component[labels[labels != 0]]))[1])
        texts = list(self._texts)
        return [texts[number] for number in numbers]


@dataclass(frozen=True)
class Solution:
    """Which units each label consists of.

    Attributes:
        monomials: (labels, degree) unit ids, 0 = none; a label without any is never removed.
        component: class by label: labels that are one.
        reasons: why classes are frozen.
        traits: monomials of the labels that have a trait.
    """

    monomials: Vector
    component: Vector
    reasons: _Reasons
    traits: dict[Trait, Vector]
    _found: dict[int, tuple[Vector, Factors]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Number of units."""
        return int(self.monomials.max(initial=0))

    def units(self, factors: Factors) -> Factors:
        """Unit ids by position, factor by factor; factors that are frozen everywhere are dropped."""
        return tuple(vector for factor in factors for vector in self._units(factor))

    def _units(self, factor: Vector) -> Factors:
        known = self._found.get(id(factor))
        if known is None:  # the factor is kept too: its id is its own as long as it lives
            rows = self.monomials[factor]
            found = tuple(np.ascontiguousarray(column) for column in rows.T if column.any())
            known = self._found[id(factor)] = (factor, found)
        return known[1]

    def why(self, factors: Factors) -> list[str]:
        """Reasons that freeze labels of these factors, each once, in order of discovery."""
        found = dict.fromkeys(reason for vector in factors for reason in self.reasons.of(vector))
        return list(found)

    def only(self, owned: npt.NDArray[np.bool_]) -> Solution:
        """The same with some units frozen and the others numbered anew; `owned`: (units + 1,), which stay."""
        number = np.where(owned, np.cumsum(owned), 0)
        traits = {trait: number[rows] for trait, rows in self.traits.items()}
        return Solution(number[self.monomials], self.component, self.reasons, traits)


def _rows(parts: list[Vector], width: int) -> Vector:
    return np.concatenate(parts) if parts else np.empty((0, width), dtype=np.int64)


def _line(labels: npt.NDArray[np.int64], axis: int) -> Vector:
    """The labels along one axis, at the front of all others."""
    return labels[tuple(slice(None) if a == axis else 0 for a in range(labels.ndim))]


def varying_axes(labels: npt.NDArray[np.int64]) -> list[int]:
    """Axes along which an array of labels is not constant."""
    return [a for a in range(labels.ndim) if labels.shape[a] > 1 and (labels != labels.take([0], a)).any()]
