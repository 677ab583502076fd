"""Removal with exact downdates against refitting from scratch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.obs import Elimination

TINY = 1e-13


def problem(seed, d=9, e=4):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d + 3))
    return root @ root.T / d, rng.normal(size=(e, d))


def groups_of(seed, d=9):
    """A random partition of some of the columns into groups of random sizes."""
    rng = np.random.default_rng(seed)
    columns, groups = rng.permutation(d)[: d - 1], []
    while len(columns):
        size = int(rng.integers(1, 4))
        groups.append(columns[:size])
        columns = columns[size:]
    return groups


def refit(covariance, weight, keep):
    """Best weights on `keep` for the outputs W x, and the squared error that is left."""
    new = np.zeros_like(weight)
    new[:, keep] = np.linalg.solve(covariance[np.ix_(keep, keep)], (weight @ covariance)[:, keep].T).T
    lost = weight - new
    return new, np.trace(lost @ covariance @ lost.T)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_downdates_equal_refits(seed):
    covariance, weight = problem(seed)
    groups = groups_of(seed)
    elimination = Elimination(covariance, weight, groups, ridge=TINY)
    gone, total = [], 0.0
    order = np.random.default_rng(seed).permutation(len(groups))
    for group in order[: max(1, len(order) - 1)]:
        alive = [g for g in range(len(groups)) if g not in gone]
        costs = elimination.costs(alive)
        for place, candidate in enumerate(alive):
            dead = np.concatenate([groups[g] for g in [*gone, candidate]])
            _, error = refit(covariance, weight, np.setdiff1d(np.arange(9), dead))
            assert total + costs[place] == pytest.approx(error, rel=1e-6, abs=1e-8)
        total += costs[alive.index(group)]
        elimination.remove(int(group))
        gone.append(int(group))
        dead = np.concatenate([groups[g] for g in gone])
        best, _ = refit(covariance, weight, np.setdiff1d(np.arange(9), dead))
        np.testing.assert_allclose(elimination.weight, best, rtol=1e-6, atol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_scaling_an_input_changes_no_cost(seed, factor):
    covariance, weight = problem(seed)
    groups = [np.array([i]) for i in range(9)]
    scale = np.ones(9)
    scale[3] = factor
    one = Elimination(covariance, weight, groups, ridge=TINY).costs(range(9))
    other = Elimination(covariance * np.outer(scale, scale), weight / scale, groups, ridge=TINY).costs(range(9))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-8)


def test_a_duplicated_input_costs_nothing_until_its_twin_is_gone():
    covariance, weight = problem(1, d=5)
    double = np.block([[covariance, covariance], [covariance, covariance]])
    both = np.hstack([weight, weight])
    elimination = Elimination(double, both, [np.array([i]) for i in range(10)], ridge=1e-9)
    signal = elimination.signal
    assert elimination.costs([2])[0] < 1e-6 * signal
    elimination.remove(2)
    assert elimination.costs([7])[0] > 1e-3 * signal
    assert elimination.costs([3])[0] < 1e-6 * signal


def test_outputs_that_go_with_an_input_do_not_count():
    covariance, weight = problem(2, d=4, e=4)
    groups = [np.array([i]) for i in range(4)]
    plain = Elimination(covariance, weight, groups, ridge=TINY)
    tied = Elimination(covariance, weight, groups, own=groups, ridge=TINY)
    rows = [Elimination(covariance, np.delete(weight, i, 0), groups, ridge=TINY).costs([i])[0] for i in range(4)]
    np.testing.assert_allclose(tied.costs(range(4)), rows, rtol=1e-9)
    assert (tied.costs(range(4)) < plain.costs(range(4))).all()
    tied.remove(1)
    assert not tied.weight[1].any()
    assert not tied.weight[:, 1].any()


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_together_or_one_by_one_is_the_same(seed):
    covariance, weight = problem(seed)
    groups = groups_of(seed)
    one, other = (Elimination(covariance, weight, groups, ridge=TINY) for _ in range(2))
    one.remove(0, 1)
    other.remove(1)
    other.remove(0)
    np.testing.assert_allclose(one.weight, other.weight, rtol=1e-7, atol=1e-9)
    rest = range(2, len(groups))
    np.testing.assert_allclose(one.costs(rest), other.costs(rest), rtol=1e-7, atol=1e-9)


def test_removing_twice_is_refused():
    elimination = Elimination(*problem(0), [np.array([0])])
    elimination.remove(0)
    with pytest.raises(ValueError, match="before"):
        elimination.remove(0)


def test_inputs_that_never_vary_cost_no_more_than_the_ridge():
    covariance, weight = problem(4)
    covariance[2, :] = covariance[:, 2] = 0.0
    cost = Elimination(covariance, weight, [np.array([2])], ridge=1e-3).costs([0])[0]
    assert cost == pytest.approx(1e-3 * np.diag(covariance).mean() * (weight[:, 2] ** 2).sum())
