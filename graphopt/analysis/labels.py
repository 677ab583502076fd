"""Labels: integers on tensor positions, equated while the graph is walked, solved into units by connected components.

A position of a tensor is alive iff every label it carries is alive. A dense tensor can only lose whole slices, so what
survives is a product of per-axis sets (a *box*); labels are therefore kept per axis, as vectors: axis ``a`` of a tensor
of size ``n`` carries a tuple of *factors*, each an int64 vector of length ``n``, and position ``i`` is alive iff
``factor[i]`` is alive for every factor (a monomial). An axis without factors is never shortened. Label 0 is never
removed and is the neutral element of a monomial. Memory is linear in the sum of the axis lengths, not in the elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
Factors = tuple[Vector, ...]
Axes = dict[int, Factors]
"""Labels of one tensor: axis -> factors. Axes that are absent carry no labels."""


@dataclass(frozen=True)
class Freeze:
    """A label that may never be removed, and why."""

    label: int
    reason: str


class LabelTable:
    """All labels of one graph, the equalities between them and the reasons that freeze some.

    Equalities are only collected; `solve` finds the classes in one pass, so the walk stays linear.
    """

    def __init__(self) -> None:
        self._next = 1
        self._left: list[Vector] = []
        self._right: list[Vector] = []
        self._freezes: list[Freeze] = []

    def fresh(self, count: int) -> Vector:
        """`count` labels that occur nowhere else."""
        labels = np.arange(self._next, self._next + count, dtype=np.int64)
        self._next += count
        return labels

    def equate(self, left: Vector, right: Vector, reason: str) -> None:
        """Both must live or die together, position by position (arrays broadcast).

        Where one side is 0 the other side freezes, for `reason`.
        """
        left, right = np.broadcast_arrays(left, right)
        flat_left, flat_right = left.ravel(), right.ravel()
        for one, other in ((flat_left, flat_right), (flat_right, flat_left)):
            frozen = np.unique(one[(other == 0) & (one != 0)])
            self._freezes.extend(Freeze(int(label), reason) for label in frozen)
        both = (flat_left != 0) & (flat_right != 0) & (flat_left != flat_right)
        if both.any():
            self._left.append(flat_left[both])
            self._right.append(flat_right[both])

    def freeze(self, factors: Iterable[Vector], reason: str) -> None:
        """Nothing that carries one of these labels may be removed, for `reason`."""
        for vector in factors:
            # One label stands for a run of labels with the same reason only where they are the same label.
            self._freezes.extend(Freeze(int(label), reason) for label in np.unique(vector[vector != 0]))

    def merge(self, factors: Sequence[Vector], reason: str) -> Vector:
        """Tie all factors of an axis to one, where their structure cannot be kept; returns it."""
        first = factors[0]
        for other in factors[1:]:
            self.equate(first, other, reason)
        return first

    def solve(self) -> Solution:
        """The classes of equal labels."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        size = self._next
        empty = np.empty(0, dtype=np.int64)
        left = np.concatenate(self._left) if self._left else empty
        right = np.concatenate(self._right) if self._right else empty
        graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
        _, component = connected_components(graph, directed=False)
        reasons: dict[int, list[str]] = {}
        for freeze in self._freezes:
            known = reasons.setdefault(int(component[freeze.label]), [])
            if freeze.reason not in known:
                known.append(freeze.reason)
        frozen = np.zeros(int(component.max()) + 1, dtype=bool)
        frozen[list(reasons)] = True
        frozen[component[0]] = True
        # Units are numbered in the order in which their first label was made: the same graph gives the same ids.
        unit_of_component = np.zeros(len(frozen), dtype=np.int64)
        order = component[np.sort(np.unique(component, return_index=True)[1])]
        live = order[~frozen[order]]
        unit_of_component[live] = np.arange(1, len(live) + 1)
        return Solution(unit_of_component[component], component.astype(np.int64), reasons)


@dataclass(frozen=True)
class Solution:
    """Which unit each label belongs to.

    Attributes:
        unit: unit id by label; 0 where the label is frozen.
        component: class by label, frozen or not.
        reasons: why a class is frozen, by class.
    """

    unit: Vector
    component: Vector
    reasons: dict[int, list[str]]

    def units(self, factors: Factors) -> Factors:
        """Unit ids by position, factor by factor; factors that are frozen everywhere are dropped."""
        mapped = (self.unit[vector] for vector in factors)
        return tuple(vector for vector in mapped if vector.any())

    def why(self, factors: Factors) -> list[str]:
        """Reasons that freeze labels of these factors, each once, in order of discovery."""
        found: dict[str, None] = {}
        for vector in factors:
            for component in np.unique(self.component[vector[vector != 0]]):
                found.update(dict.fromkeys(self.reasons.get(int(component), ())))
        return list(found)


def varying_axes(labels: npt.NDArray[np.int64]) -> list[int]:
    """Axes along which an array of labels is not constant."""
    return [a for a in range(labels.ndim) if labels.shape[a] > 1 and (labels != labels.take([0], a)).any()]


def close_box(table: LabelTable, labels: npt.NDArray[np.int64], where: str, keep: int | None = None) -> Axes:
    """Make an array of labels that varies along several axes a box: equate along all axes but one (a *mode*).

    Args:
        table: where the equalities go.
        labels: labels by position, any rank.
        where: the node, for the reason of a freeze.
        keep: the axis that keeps its variety, if it has any; None: the one with most positions, the earliest of equals.

    Returns:
        Labels per axis; at most one axis.
    """
    varying = varying_axes(labels)
    if not varying:
        if not labels.any():
            return {}
        # All positions carry one label: they live and die together, so none can go without emptying the axis.
        table.freeze((labels.ravel()[:1],), f"{where}: removing it would empty the axis")
        return {}
    axis = max(varying, key=lambda a: (labels.shape[a], -a)) if keep is None else keep
    rows = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    table.equate(rows, rows[:, :1], f"{where}: shares a slice with positions that are never removed")
    if axis not in varying:  # what the other axes held is one label now
        table.freeze((rows[:1, 0],), f"{where}: removing it would empty the axis")
        return {}
    return {axis: (np.ascontiguousarray(rows[:, 0]),)}
