"""Equations between labels, solved: which labels are one, which are products of others, which can never go.

A label is a Boolean, *alive*. Three kinds of equations relate labels: a = b (they live and die together), a = 1 (never
removed), and w = o i (an element of a box is alive iff both of its coordinates are). The solution writes every label as
a *monomial*, a product of free atoms; the atoms are the units.

Equal labels are merged by connected components. A class with a product takes it as its definition. Where it has a
second one, the two monomials must agree. What they share cancels, and of the rest, x1 x2 ... = y1 y2 ...,

    nothing = y...       freezes the y
    x = y                merges the two
    x1 x2 = y1 y2        is refined: x_k = z_k1 z_k2 and y_l = z_1l z_2l, with one atom z_kl for each set of positions
                         that x_k and y_l connect; a z_kl that connects all positions is 1

The last is what a channel shuffle between grouped convolutions needs: b a = g p, where g is a coarse part of b and a of
p, gives b = g m, p = m a. It is the refinement property of products of sets. Every step leaves fewer atoms, so the
rounds end. Whatever is merged or frozen more than necessary costs units and never correctness.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Solved:
    """The solution, by label.

    Attributes:
        component: class, numbered by first label; class 0 is that of label 0.
        monomials: (classes, degree) classes of atoms, ascending, then zeros; all zero: never removed.
        causes: (n, 2) labels: the first is frozen because the second is.
        emptying: labels that are frozen because an axis would be empty without them.
    """

    component: Vector
    monomials: Vector
    causes: Vector
    emptying: Vector


@dataclass
class Equations:
    """What is known about labels 0 .. size - 1.

    Attributes:
        size: number of labels.
        equal: (n, 2) labels that are one.
        frozen: labels that are never removed; label 0 is among them.
        products: (n, 3) labels (w, o, i) with w = o i.
        groups: (n,) which products were stated together.
        axes: labels along the axes of boxes; an atom that is at every position of one cannot be removed.
    """

    size: int
    equal: Vector
    frozen: Vector
    products: Vector
    groups: Vector
    axes: list[Vector]
    causes: list[Vector] = field(default_factory=list)
    emptying: list[Vector] = field(default_factory=list)

    def solve(self) -> Solved:
        """Rounds of merging, defining and comparing until nothing changes."""
        while True:
            component = _components(self.size, self.equal)
            # Most graphs have no products, and most classes of the others are defined by none.
            first = np.unique(component, return_index=True)[1]
            stuck = np.zeros(len(first), dtype=bool)
            stuck[component[self.frozen]] = True
            triples = component[self.products]
            definition = _definitions(triples, stuck)
            monomials, cyclic = _expand(triples, definition, stuck)
            if len(cyclic):  # w = o i and o = w z: they imply each other
                self._merge(first[cyclic])
                continue
            extra = np.ones(len(triples), dtype=bool)
            extra[definition[definition >= 0]] = False
            changed = self._compare(np.flatnonzero(extra), triples, monomials, first)
            changed |= self._spare_axes(component, monomials, first)
            if not changed:
                causes = self._causes(definition, monomials, first)
                return Solved(component, monomials, causes, np.concatenate([*self.emptying, self.frozen[:0]]))

    # One round -------------------------------------------------------------------------------------------------------

    def _compare(self, extra: Vector, triples: Vector, monomials: Vector, first: Vector) -> bool:
        """Make the second definitions of classes agree with the first; True where that took new equations."""
        left = monomials[triples[extra, 0]]
        right = _union(monomials[triples[extra, 1]], monomials[triples[extra, 2]])
        left, right = _without(left, right), _without(right, left)
        counts = np.stack([np.count_nonzero(left, axis=1), np.count_nonzero(right, axis=1)], axis=1)
        wrong = counts.any(axis=1)
        if not wrong.any():
            return False
        extra, left, right, counts = extra[wrong], left[wrong], right[wrong], counts[wrong]
        alone = ~counts.all(axis=1)
        over = np.concatenate([left, right], axis=1)[alone]
        self._freeze(first[over], self.products[extra[alone], 0][:, None])
        single = (counts == 1).all(axis=1)
        self._equate(first[left[single, 0]], first[right[single, 0]])
        rest = np.flatnonzero(~alone & ~single)
        for group in np.unique(self.groups[extra[rest]]):
            rows = rest[self.groups[extra[rest]] == group]
            for x, y in np.unique(counts[rows], axis=0):
                same = rows[(counts[rows] == (x, y)).all(axis=1)]
                self._refine(left[same, :x], right[same, :y], first)
        return True

    def _refine(self, left: Vector, right: Vector, first: Vector) -> None:
        """left[:, 0] left[:, 1] ... = right[:, 0] right[:, 1] ..., position by position."""
        parts: dict[tuple[int, int], Vector] = {}
        count = 0
        for k in range(left.shape[1]):
            for m in range(right.shape[1]):
                joint = _joint(left[:, k], right[:, m])
                if joint.any():
                    parts[k, m] = self.size + count + joint
                    count += int(joint.max()) + 1
        if count >= len(np.unique(left)) + len(np.unique(right)):  # no structure to keep: one by one
            for k in range(max(left.shape[1], right.shape[1])):
                one, other = left[:, min(k, left.shape[1] - 1)], right[:, min(k, right.shape[1] - 1)]
                self._equate(first[one], first[other])
            return
        self.size += count
        group = int(self.groups.max()) + 1
        for side, atoms in ((0, left), (1, right)):
            for k in range(atoms.shape[1]):
                found = [part for pair, part in parts.items() if pair[side] == k]
                if found:
                    group = self._define(first[atoms[:, k]], found, group)
                else:
                    self._must_stay(first[np.unique(atoms[:, k])])

    def _define(self, whole: Vector, parts: list[Vector], group: int) -> int:
        """whole = product of the parts; returns the next free group."""
        while len(parts) > 2:
            outer = np.arange(self.size, self.size + len(whole))
            self.size += len(whole)
            self._state(whole, outer, parts.pop(), group)
            whole, group = outer, group + 1
        self._state(whole, parts[0], parts[1] if len(parts) > 1 else np.zeros_like(whole), group)
        return group + 1

    def _state(self, whole: Vector, outer: Vector, inner: Vector, group: int) -> None:
        rows = np.unique(np.stack([whole, outer, inner], axis=1), axis=0)
        self.products = np.concatenate([self.products, rows])
        self.groups = np.concatenate([self.groups, np.full(len(rows), group)])

    def _spare_axes(self, component: Vector, monomials: Vector, first: Vector) -> bool:
        """Freeze atoms without which an axis of a box would be empty."""
        found = [_everywhere(monomials[component[vector]]) for vector in self.axes]
        atoms = np.unique(np.concatenate([*found, np.empty(0, dtype=np.int64)]))
        if len(atoms):
            self._must_stay(first[atoms])
        return len(atoms) > 0

    # Stating ---------------------------------------------------------------------------------------------------------

    def _equate(self, left: Vector, right: Vector) -> None:
        self.equal = np.concatenate([self.equal, np.stack([left, right], axis=1)])

    def _merge(self, labels: Vector) -> None:
        self._equate(labels, np.roll(labels, 1))

    def _freeze(self, labels: Vector, cause: Vector) -> None:
        labels, cause = (a.ravel() for a in np.broadcast_arrays(labels, cause))
        cause, labels = cause[labels != 0], labels[labels != 0]
        self.causes.append(np.stack([labels, cause], axis=1))
        self.frozen = np.concatenate([self.frozen, labels])

    def _must_stay(self, labels: Vector) -> None:
        """An axis would be empty without them."""
        self.emptying.append(labels)
        self.frozen = np.concatenate([self.frozen, labels])

    def _causes(self, definition: Vector, monomials: Vector, first: Vector) -> Vector:
        """Also: a product of labels that are never removed is never removed."""
        gone = np.flatnonzero((definition >= 0) & ~monomials.any(axis=1))
        parts = self.products[definition[gone], 1:]
        whole = np.broadcast_to(first[gone][:, None], parts.shape)
        own = np.stack([whole.ravel(), parts.ravel()], axis=1)
        return np.concatenate([*self.causes, own])


def _components(size: int, equal: Vector) -> Vector:
    """Class of each label, classes numbered in the order of their first labels."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(equal), dtype=np.int8), (equal[:, 0], equal[:, 1])), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    first = np.unique(component, return_index=True)[1]
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[component]


def _joint(left: Vector, right: Vector) -> Vector:
    """By position: which connected set it belongs to, if equal values on either side connect positions."""
    _, one = np.unique(left, return_inverse=True)
    _, other = np.unique(right, return_inverse=True)
    nodes = int(one.max()) + 1
    component = _components(nodes + int(other.max()) + 1, np.stack([one, other + nodes], axis=1))
    return component[one]


def _definitions(triples: Vector, stuck: Mask) -> Vector:
    """The product that defines each class, the first that is stated and not about itself; -1 where there is none."""
    whole, outer, inner = triples.T
    usable = np.flatnonzero(~stuck[whole] & (whole != outer) & (whole != inner))[::-1]
    definition = np.full(len(stuck), -1, dtype=np.int64)
    definition[whole[usable]] = usable
    return definition


def _expand(triples: Vector, definition: Vector, stuck: Mask) -> tuple[Vector, Vector]:
    """Monomials of all classes, and the classes whose definitions lead back to themselves."""
    known = definition < 0
    monomials = np.where(known & ~stuck, np.arange(len(stuck)), 0)[:, None]
    open_ = np.flatnonzero(~known)
    while len(open_):
        _, outer, inner = triples[definition[open_]].T
        ready = known[outer] & known[inner]
        if not ready.any():
            inside = np.zeros(len(known), dtype=bool)
            inside[open_] = True
            # Only what lies on a cycle or behind one is left; merging the first with its open part breaks it.
            part = outer[0] if inside[outer[0]] else inner[0]
            return monomials, np.stack([open_[0], part])
        now = open_[ready]
        found = _union(monomials[outer[ready]], monomials[inner[ready]])
        width = max(found.shape[1], monomials.shape[1])
        monomials = np.pad(monomials, ((0, 0), (0, width - monomials.shape[1])))
        monomials[now] = np.pad(found, ((0, 0), (0, width - found.shape[1])))
        known[now] = True
        open_ = open_[~ready]
    return monomials, np.empty(0, dtype=np.int64)


def _union(left: Vector, right: Vector) -> Vector:
    """Row by row the union of two sets of positive numbers: ascending, then zeros, no wider than needed."""
    last = np.iinfo(np.int64).max
    rows = np.concatenate([left, right], axis=1)
    rows = np.sort(np.where(rows == 0, last, rows), axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = last
    return _packed(np.where(rows == last, 0, rows))


def _without(left: Vector, right: Vector) -> Vector:
    """Row by row the elements of one set that are not in the other."""
    shared = (left[:, :, None] == right[:, None, :]).any(axis=2)
    return _packed(np.where(shared, 0, left))


def _packed(rows: Vector) -> Vector:
    """Rows with their zeros behind, the order of the others kept, no wider than needed."""
    order = np.argsort(rows == 0, axis=1, kind="stable")
    width = max(int(np.count_nonzero(rows, axis=1).max(initial=0)), 1)
    return np.take_along_axis(rows, order, axis=1)[:, :width]


def _everywhere(rows: Vector) -> Vector:
    """Atoms that are in every row."""
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    candidates = rows[0][rows[0] != 0]
    return np.asarray([atom for atom in candidates if (rows == atom).any(axis=1).all()], dtype=np.int64)
