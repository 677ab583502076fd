"""GPTQ, descent on integers and the search for scales: never worse than what they start from, and exact where small."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.gptq import gptq
from graphopt.numerics.levels import Levels
from graphopt.numerics.metric import damped, error, inverse_root
from graphopt.numerics.rounding_descent import descend
from graphopt.numerics.scale_search import searched

RNG = np.random.default_rng(0)


def problem(m: int, n: int, seed: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the damped moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((rank or n, n)) * rng.uniform(0.1, 3, n)
    x = rng.standard_normal((4 * n, rank or n)) @ mixing
    return rng.standard_normal((m, n)), damped(x.T @ x / len(x))


def levels_of(weight: np.ndarray, block: int, bits: int = 3, *, symmetric: bool = True) -> Levels:
    n = weight.shape[1]
    low, high = (-(1 << bits - 1) + 1, (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    starts = range(0, n, block)
    peak = np.stack([np.abs(weight[:, s : s + block]).max(1) for s in starts], axis=1)
    if symmetric:
        return Levels(np.where(peak > 0, peak / high, 1.0), np.zeros_like(peak), low, high, block)
    return Levels(np.where(peak > 0, 2 * peak / high, 1.0), np.full_like(peak, high // 2), low, high, block)


def loss(weight: np.ndarray, levels: Levels, steps: np.ndarray, metric: np.ndarray) -> float:
    return error(weight, levels.values(steps), metric)


def gptq_by_definition(weight: np.ndarray, metric: np.ndarray, levels: Levels) -> np.ndarray:
    """Column by column with the inverse of what is left, as in the paper's equations 2 and 3."""
    order = list(np.argsort(-np.diagonal(metric), kind="stable"))
    left, found = weight.copy(), np.zeros_like(weight)
    while order:
        inverse = np.linalg.inv(metric[np.ix_(order, order)])
        j = order[0]
        found[:, j] = levels.column(j).nearest(left[:, j])
        gap = (left[:, j] - found[:, j]) / inverse[0, 0]
        left[:, order] -= gap[:, None] * inverse[0][None, :]
        order = order[1:]
    return levels.steps(found)


@pytest.mark.parametrize("block", [4, 7, 70])
@pytest.mark.parametrize("symmetric", [True, False])
def test_is_the_surgeon_column_by_column(block: int, symmetric: bool) -> None:
    weight, metric = problem(5, 70, 1)
    levels = levels_of(weight, block, symmetric=symmetric)
    assert np.array_equal(gptq(weight, metric, levels), gptq_by_definition(weight, metric, levels))


def test_the_order_is_that_of_the_moments_and_scales_stay_with_their_columns() -> None:
    weight, metric = problem(3, 70, 2)
    levels = levels_of(weight, 10)
    shuffled = RNG.permutation(70)
    single = Levels(np.repeat(levels.scale, 10, 1), np.repeat(levels.zero, 10, 1), levels.low, levels.high, 1)
    moved = Levels(single.scale[:, shuffled], single.zero[:, shuffled], levels.low, levels.high, 1)
    there = gptq(weight[:, shuffled], metric[np.ix_(shuffled, shuffled)], moved)
    assert np.array_equal(there, gptq(weight, metric, levels)[:, shuffled])
    assert not np.array_equal(gptq(weight, metric, levels, ordered=False), gptq(weight, metric, levels))


def test_beats_the_nearest_on_correlated_inputs() -> None:
    weight, metric = problem(64, 96, 3)
    levels = levels_of(weight, 32)
    nearest = loss(weight, levels, levels.steps(weight), metric)
    assert loss(weight, levels, gptq(weight, metric, levels), metric) < 0.8 * nearest


def test_is_the_nearest_where_inputs_are_not_correlated() -> None:
    weight = RNG.standard_normal((4, 9))
    levels = levels_of(weight, 9)
    assert np.array_equal(gptq(weight, np.diag(RNG.uniform(1, 2, 9)), levels), levels.steps(weight))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 80), st.integers(0, 10**6), st.sampled_from([1, 3, 16, 200]), st.booleans())
def test_descent_never_raises_the_loss(m: int, n: int, seed: int, block: int, symmetric: bool) -> None:
    weight, metric = problem(m, n, seed, rank=max(1, n // 3))
    weight[np.random.default_rng(seed).random((m, n)) < 0.3] = 0
    levels = levels_of(weight, block, symmetric=symmetric)
    start = levels.steps(weight)
    before = loss(weight, levels, start, metric)
    for rescale in (False, True):
        steps, after = descend(weight, metric, levels, start, rescale=rescale)
        assert loss(weight, after, steps, metric) <= before * (1 + 1e-9)
        assert steps.min() >= levels.low and steps.max() <= levels.high
        assert not after.values(steps)[weight == 0].any(), "zeros stay zeros"
    assert not levels.values(gptq(weight, metric, levels))[weight == 0].any()


def test_descent_ends_where_no_single_step_helps_and_near_the_best_of_all() -> None:
    weight, metric = problem(1, 5, 7)
    levels = levels_of(weight, 5, bits=2)
    steps, _ = descend(weight, metric, levels, levels.steps(weight), rescale=False, tolerance=0.0)
    found = loss(weight, levels, steps, metric)
    for j, q in itertools.product(range(5), range(levels.low, levels.high + 1)):
        other = steps.copy()
        other[0, j] = q
        assert loss(weight, levels, other, metric) >= found * (1 - 1e-9)
    choices = itertools.product(range(levels.low, levels.high + 1), repeat=5)
    best = min(loss(weight, levels, np.array([c], float), metric) for c in choices)
    nearest = loss(weight, levels, levels.steps(weight), metric)
    assert best <= found < best + 0.5 * (nearest - best)


def test_scales_of_least_error_for_given_integers() -> None:
    """One row, two blocks: the normal equations of both scales."""
    weight, metric = problem(1, 8, 11)
    levels = levels_of(weight, 4, bits=2)
    steps, after = descend(weight, metric, levels, levels.steps(weight), tolerance=0.0, sweeps=200)
    counts = after.counts(steps)[0]
    parts = np.stack([np.where(np.arange(8) // 4 == b, counts, 0) for b in range(2)])
    exact = np.linalg.solve(parts @ metric @ parts.T, parts @ metric @ weight[0])
    assert after.scale[0] == pytest.approx(exact, rel=1e-3)


def test_shared_scales_keep_their_lower_bound_and_sign() -> None:
    weight, metric = problem(6, 10, 12)
    levels = Levels(np.array([[-1.0]]), np.array([[0.0]]), -8, 7, 10)
    _, after = descend(weight, metric, levels, levels.steps(weight), least_scale=0.9)
    assert after.scale.shape == (1, 1)
    assert -1.0 <= after.scale[0, 0] <= -0.9


def test_the_same_on_torch() -> None:
    weight, metric = problem(5, 70, 13)
    levels = levels_of(weight, 10)
    there = Levels(torch.tensor(levels.scale), torch.tensor(levels.zero), levels.low, levels.high, 10)
    steps = gptq(torch.tensor(weight), torch.tensor(metric), there)
    assert np.array_equal(steps.numpy(), gptq(weight, metric, levels))
    moved, _ = descend(torch.tensor(weight), torch.tensor(metric), there, steps)
    assert np.array_equal(moved.numpy(), descend(weight, metric, levels, steps.numpy())[0])


def test_what_cannot_be_factorised_is_refused() -> None:
    weight, metric = problem(2, 4, 14)
    levels = levels_of(weight, 4)
    with pytest.raises(ValueError, match="columns"):
        gptq(weight, metric[:3, :3], levels)
    with pytest.raises(ValueError, match="positive definite"):
        gptq(weight, np.zeros((4, 4)), levels)
    with pytest.raises(ValueError, match="not finite"):
        descend(weight, metric * np.nan, levels, levels.steps(weight))
    assert inverse_root(metric).shape == (4, 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_searched_scales_are_never_worse_than_the_extremes(blocks: int, size: int, seed: int, shifts: bool) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.standard_t(2, (blocks, size)).astype(np.float32)
    importance = rng.uniform(0, 1, (blocks, size)).astype(np.float32)
    low, high = (0, 15) if shifts else (-7, 7)
    reach = np.maximum(np.abs(parts).max(1), 1e-6)
    scale = (reach * (2 if shifts else 1) / high).astype(np.float32)
    zero = np.full(blocks, 8 if shifts else 0)

    def weighted(scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        steps = np.clip(np.rint(parts / scale[:, None]), (low - zero)[:, None], (high - zero)[:, None])
        return (importance * (steps * scale[:, None] - parts) ** 2).sum(1)

    found, moved = searched(parts, importance, scale, zero, low, high, shifts=shifts)
    assert (weighted(found, moved) <= weighted(scale, zero) * (1 + 1e-5) + 1e-12).all()
    assert (found > 0).all() and (moved >= low).all() and (moved <= high).all()


def test_an_outlier_that_nothing_reads_is_clipped() -> None:
    parts = np.array([[1.0, -0.9, 0.8, 2.0]], np.float32)
    silent = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)
    scale, zero = np.array([2 / 7], np.float32), np.array([0])
    blind, _ = searched(parts, np.ones_like(parts), scale, zero, -7, 7, shifts=False)
    seen, _ = searched(parts, silent, scale, zero, -7, 7, shifts=False)
    assert seen[0] < blind[0]
