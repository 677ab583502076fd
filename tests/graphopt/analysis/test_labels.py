"""Labels and the solution of their equations: as many units as products of sets allow, never more."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.labels import LabelTable, Solution


def units(solution: Solution, *factors: np.ndarray) -> set[int]:
    return {int(u) for vector in solution.units(factors) for u in vector} - {0}


def test_a_box_has_units_along_each_of_its_axes() -> None:
    table = LabelTable()
    labels = table.fresh(12)
    axes = table.box(labels.reshape(2, 6), "node")
    solution = table.solve()
    assert solution.count == 2 + 6
    assert units(solution, *axes[0]) & units(solution, *axes[1]) == set()
    outer, inner = solution.units((labels,))
    assert outer.tolist() == np.repeat(outer[::6], 6).tolist()
    assert inner.tolist() == np.tile(inner[:6], 2).tolist()


def test_a_box_that_keeps_one_axis_ties_the_others() -> None:
    table = LabelTable()
    labels = table.fresh(12).reshape(2, 6)
    assert list(table.box(labels, "node", keep=0)) == [0]
    assert table.solve().count == 2


def test_a_box_of_three_axes() -> None:
    table = LabelTable()
    labels = table.fresh(24)
    table.box(labels.reshape(2, 3, 4), "node")
    solution = table.solve()
    assert solution.count == 2 + 3 + 4
    assert [len(set(vector.tolist())) for vector in solution.units((labels,))] == [2, 3, 4]


def test_the_same_split_twice_is_one_split() -> None:
    table = LabelTable()
    labels = table.fresh(12).reshape(2, 6)
    table.box(labels, "one")
    table.box(labels, "other")
    assert table.solve().count == 2 + 6


def test_nested_splits_agree_with_flat_ones() -> None:
    table = LabelTable()
    labels = table.fresh(24)
    first = table.box(labels.reshape(6, 4), "one")
    table.box(first[0][0].reshape(2, 3), "one again")
    table.box(labels.reshape(2, 3, 4), "other")
    assert table.solve().count == 2 + 3 + 4


def test_a_shuffle_between_two_groupings_is_refined() -> None:
    """12 channels as (6, 2) on one side and (2, 6) on the other: (2, 3, 2)."""
    table = LabelTable()
    labels = table.fresh(12)
    table.box(labels.reshape(6, 2), "shuffle")
    table.box(labels.reshape(2, 6), "groups")
    solution = table.solve()
    assert solution.count == 2 + 3 + 2
    assert [len(set(vector.tolist())) for vector in solution.units((labels,))] == [2, 3, 2]


def test_splits_without_a_common_part_freeze() -> None:
    table = LabelTable()
    labels = table.fresh(6)
    table.box(labels.reshape(2, 3), "one")
    table.box(labels.reshape(3, 2), "other")
    solution = table.solve()
    assert solution.count == 0
    assert solution.why((labels,))


def test_one_frozen_element_freezes_its_row_and_column() -> None:
    table = LabelTable()
    labels = table.fresh(6)
    axes = table.box(labels.reshape(2, 3), "node")
    table.freeze((labels[:1],), "because")
    solution = table.solve()
    assert solution.count == 1 + 2
    assert solution.units(axes[1])[0].tolist()[0] == 0
    assert "because" in solution.why((axes[1][0][:1],))


def test_a_copy_multiplies() -> None:
    """Two heads of keys, each read by three heads of queries."""
    table = LabelTable()
    keys, copies, queries = table.fresh(2), table.axis(3, "copy"), table.fresh(6)
    table.define(queries, (np.repeat(keys, 3), np.tile(copies, 2)), "heads meet")
    solution = table.solve()
    assert solution.count == 2 + 3
    assert units(solution, queries) == units(solution, keys) | units(solution, copies)


def test_labels_that_imply_each_other_are_one() -> None:
    table = LabelTable()
    a, b, c, d = (table.fresh(2) for _ in range(4))
    table.define(a, (b, c), "a = b c")
    table.define(b, (a, d), "b = a d")
    solution = table.solve()
    assert units(solution, a[:1]) == units(solution, b[:1])


def test_a_tie_to_a_frozen_label_freezes_with_its_reason() -> None:
    table = LabelTable()
    labels = table.fresh(3)
    table.equate(labels[:2], labels[1:], "tied")
    table.freeze((labels[2:],), "because")
    solution = table.solve()
    assert solution.monomials[labels].ravel().tolist() == [0, 0, 0]
    assert solution.why((labels[:1],)) == ["because"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_random_equations_hold_whatever_dies(seed: int) -> None:
    """Any set of units may die: all that was stated holds for what is left."""
    random = np.random.default_rng(seed)
    table = LabelTable()
    vectors = [table.fresh(12)]
    stated: list[tuple[np.ndarray, tuple[np.ndarray, ...]]] = []
    frozen: list[np.ndarray] = []
    for _ in range(int(random.integers(1, 8))):
        labels = vectors[int(random.integers(len(vectors)))]
        kind = int(random.integers(5))
        if kind == 0:
            vectors.append(table.fresh(12))
        elif kind == 1:
            other = random.permutation(vectors[int(random.integers(len(vectors)))])
            table.equate(labels, other, "equal")
            stated.append((labels, (other,)))
        elif kind == 2:
            rows = int(random.choice([2, 3, 4, 6]))
            axes = table.box(labels.reshape(rows, -1), "split")
            outer, inner = (axes.get(a, (np.zeros(n, dtype=np.int64),))[0] for a, n in ((0, rows), (1, 12 // rows)))
            parts = np.repeat(outer, 12 // rows), np.tile(inner, rows)
            stated.append((labels, parts))
            vectors.append(parts[int(random.integers(2))])
        elif kind == 3:
            parts = tuple(vectors[int(random.integers(len(vectors)))] for _ in range(int(random.integers(2, 4))))
            table.define(labels, parts, "product")
            stated.append((labels, parts))
        else:
            frozen.append(random.choice(labels, 1))
            table.freeze((frozen[-1],), "frozen")
    solution = table.solve()
    alive = np.r_[True, random.random(solution.count) < 0.7]

    def lives(*factors: np.ndarray) -> np.ndarray:
        return np.logical_and.reduce([alive[solution.monomials[f]].all(axis=1) for f in factors])

    for whole, parts in stated:
        assert (lives(whole) == lives(*parts)).all()
    for labels in frozen:
        assert lives(labels).all()
