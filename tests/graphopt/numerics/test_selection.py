"""Multiple-choice knapsack: equal to brute force on small problems, within its bounds and near the bound on large."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.numerics import selection
from graphopt.numerics.selection import select


def _random(rng, items, choices, resources):
    costs = [rng.exponential(size=choices) for _ in range(items)]
    uses = [rng.exponential(size=(choices, resources)) for _ in range(items)]
    return costs, uses


def _brute(costs, uses, bounds):
    best = np.inf
    for picks in itertools.product(*(range(len(c)) for c in costs)):
        used = sum(u[p] for u, p in zip(uses, picks, strict=True))
        if (used <= np.asarray(bounds) * (1 + 1e-9)).all():
            best = min(best, sum(c[p] for c, p in zip(costs, picks, strict=True)))
    return best


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("tightness", [0.3, 0.6, 1.0])
def test_equals_brute_force(resources, tightness):
    rng = np.random.default_rng(resources)
    for _ in range(12):
        costs, uses = _random(rng, 6, 3, resources)
        bounds = [tightness * sum(u[:, r].mean() for u in uses) for r in range(resources)]
        found = select(costs, uses, bounds)
        wanted = _brute(costs, uses, bounds)
        if found is None:
            assert not np.isfinite(wanted)
            continue
        assert sum(c[p] for c, p in zip(costs, found, strict=True)) == pytest.approx(wanted)
        assert (sum(u[p] for u, p in zip(uses, found, strict=True)) <= np.array(bounds) * (1 + 1e-9)).all()


def test_without_bounds_each_item_takes_its_cheapest():
    costs = [np.array([2.0, 1.0]), np.array([0.0, 3.0])]
    assert select(costs, [np.zeros((2, 0))] * 2, []) == [1, 0]
    assert select(costs, [np.array([[0.0], [9.0]])] * 2, [np.inf]) == [1, 0]


def test_nothing_fits():
    assert select([np.array([1.0])], [np.array([[2.0]])], [1.0]) is None


def test_no_items():
    assert select([], [], [1.0]) == []


@pytest.mark.parametrize("resources", [1, 2])
def test_large_problems_keep_their_bounds_and_come_near_the_bound_of_lagrange(resources, monkeypatch):
    monkeypatch.setattr(selection, "STATES", 2500)
    rng = np.random.default_rng(7)
    costs, uses = _random(rng, 150, 4, resources)
    bounds = [0.6 * sum(u[:, r].mean() for u in uses) for r in range(resources)]
    found = select(costs, uses, bounds)
    used = sum(u[p] for u, p in zip(uses, found, strict=True))
    assert (used <= np.array(bounds) * (1 + 1e-9)).all()
    value = sum(c[p] for c, p in zip(costs, found, strict=True))
    assert value <= 1.03 * _lagrange(costs, uses, np.array(bounds))


def _lagrange(costs, uses, bounds):
    """A lower bound: the best of the dual over multipliers."""
    grid = np.linspace(0, 2, 21)
    best = 0.0
    for prices in itertools.product(grid, repeat=len(bounds)):
        p = np.array(prices)
        best = max(best, sum((c + u @ p).min() for c, u in zip(costs, uses, strict=True)) - p @ bounds)
    return best
