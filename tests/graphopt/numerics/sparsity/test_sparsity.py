"""Guarantees of the sparse solvers: the pattern holds, the loss never rises, no start is made worse, torch agrees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.metric import damped, error, relative_error
from graphopt.numerics.sparsity.armor import armor, armor_shared, block_size
from graphopt.numerics.sparsity.blocks import CONDITION
from graphopt.numerics.sparsity.descent import Sweep, coordinate_descent
from graphopt.numerics.sparsity.one_shot import magnitude, normalise, nowag, sparsegpt, wanda
from graphopt.numerics.sparsity.patterns import holds, mask, parse

TWO_OF_FOUR = parse("2:4")
PATTERNS = ["2:4", "1:4", "4:8", "8:16", "50%"]


def layer(m: int, n: int, seed: int = 0, samples: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the second moments of correlated inputs with a few loud channels."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(n, n)) * np.geomspace(3, 0.1, n)
    x = random.normal(size=(samples, n)) @ mixing
    x[:, :: max(1, n // 3)] *= 4
    return random.normal(size=(m, n)), x.T @ x / samples


@pytest.mark.parametrize("text", ["", "4:2", "0:4", "4:4", "2:32", "0%", "100%", "half"])
def test_a_pattern_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse(text)


@settings(deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 6),
    st.integers(1, 19),
    st.integers(0, 2**31),
)
def test_a_mask_keeps_the_largest_of_every_group(text: str, m: int, n: int, seed: int) -> None:
    pattern = parse(text)
    scores = np.random.default_rng(seed).permutation(m * n).reshape(m, n).astype(np.float64)
    kept = mask(scores, pattern)
    assert holds(np.where(kept, scores + 1, 0), pattern)
    if pattern.of:
        for start in range(0, n, pattern.of):
            group, chosen = scores[:, start : start + pattern.of], kept[:, start : start + pattern.of]
            assert (chosen.sum(axis=1) == min(pattern.keep, group.shape[1])).all()
            cut = np.where(chosen, -np.inf, group).max(axis=1)
            assert (np.where(chosen, group, np.inf).min(axis=1) > cut).all()
    else:
        assert kept.sum() == round(pattern.density * m * n)


def test_a_full_group_does_not_hold() -> None:
    assert not holds(np.ones((2, 8)), TWO_OF_FOUR)
    assert not holds(np.array([[1.0, 1, 1, 0, 0]]), TWO_OF_FOUR)
    assert holds(np.array([[1.0, 1, 0, 0, 1, 1]]), TWO_OF_FOUR)


def test_wanda_and_nowag_weigh_by_their_inputs() -> None:
    weight, second = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([0.0, 1.0, 1.0, 100.0])
    assert np.array_equal(magnitude(weight, TWO_OF_FOUR), [[4, 3, 0, 0]])
    assert np.array_equal(wanda(weight, second, TWO_OF_FOUR), [[0, 3, 0, 1]])
    two_rows = np.array([[4.0, 3.0, 2.0, 1.0], [40.0, 1.0, 1.0, 1.0]])
    assert np.array_equal(nowag(two_rows, np.ones(4), TWO_OF_FOUR)[0], [0, 3, 2, 0])


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_is_better_than_cutting_and_exact_for_what_it_cannot_cut(text: str) -> None:
    weight, second = layer(12, 150)
    metric, pattern = damped(second), parse(text)
    cut = wanda(weight, np.diag(second), pattern)
    found = sparsegpt(weight, metric, pattern)
    assert holds(found, pattern)
    assert error(weight, found, metric) < error(weight, cut, metric)
    assert np.allclose(sparsegpt(cut, metric, pattern), cut)


def test_sparsegpt_of_one_group_solves_for_what_is_left() -> None:
    """Where the columns that are cut come first, the update is the least-squares refit of the others."""
    weight, second = np.array([[0.01, 0.02, 3.0, 4.0]]), layer(1, 4)[1]
    metric = damped(second)
    found = sparsegpt(weight, metric, TWO_OF_FOUR)
    assert np.array_equal(found != 0, [[False, False, True, True]])
    refit = np.linalg.solve(metric[2:, 2:], (metric @ weight[0])[2:])
    assert np.allclose(found[0, 2:], refit)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(1, 9), st.integers(4, 90), st.integers(0, 1000))
def test_coordinate_descent_never_loses_to_its_start(text: str, m: int, n: int, seed: int) -> None:
    weight, second = layer(m, n, seed)
    metric, pattern = damped(second), parse(text)
    start = sparsegpt(weight, metric, pattern)
    found = coordinate_descent(weight, metric, pattern, sweeps=3)
    assert holds(found, pattern)
    assert error(weight, found, metric) <= error(weight, start, metric) * (1 + 1e-12)


def test_a_sweep_of_one_group_finds_the_best_of_all_supports() -> None:
    weight, second = layer(5, 4, 3)
    metric = damped(second)
    found = coordinate_descent(weight, metric, TWO_OF_FOUR, sweeps=1)
    for row in range(5):
        best = np.inf
        for support in TWO_OF_FOUR.supports():
            at = list(support)
            value = np.zeros((1, 4))
            value[0, at] = np.linalg.solve(metric[np.ix_(at, at)], (metric @ weight[row])[at])
            best = min(best, error(weight[row : row + 1], value, metric))
        assert error(weight[row : row + 1], found[row : row + 1], metric) == pytest.approx(best)


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16", "50%"])
def test_a_sweep_says_what_it_gained(text: str) -> None:
    weight, second = layer(6, 140)
    metric, pattern = damped(second), parse(text)
    core = sparsegpt(weight, metric, pattern)
    before = error(weight, core, metric)
    gained = Sweep(metric, pattern)(core, (weight - core) @ metric)
    assert gained > 0
    assert before - gained == pytest.approx(error(weight, core, metric))


@pytest.mark.parametrize("wrappers", ["in", "out", "both", "none"])
@pytest.mark.parametrize(("m", "n"), [(16, 24), (10, 22), (7, 33)])
def test_armor_only_gets_better_and_keeps_the_pattern(wrappers: str, m: int, n: int) -> None:
    weight, second = layer(m, n, 1)
    found = armor(weight, damped(second), TWO_OF_FOUR, block=8, wrappers=wrappers, cycles=8)
    metric = damped(second)
    assert holds(found.core, TWO_OF_FOUR)
    assert found.core.shape == weight.shape
    assert (np.diff(found.losses) <= 0).all()
    assert found.losses[0] == pytest.approx(error(weight, sparsegpt(weight, metric, TWO_OF_FOUR), metric))
    assert found.losses[-1] < found.losses[0]
    assert error(weight, found.dense(), metric) == pytest.approx(found.losses[-1])
    for blocks in (found.left, found.right):
        if blocks is not None:
            assert np.linalg.cond(blocks).max() <= CONDITION * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["2:4", "1:4", "4:8", "1:2"]),
    st.sampled_from(["in", "out", "both", "none"]),
    st.sampled_from(["hessian", "paper"]),
    st.sampled_from([np.float32, np.float64]),
    st.integers(1, 21),
    st.integers(1, 43),
    st.integers(0, 1000),
)
def test_any_shape_any_pattern(
    text: str, wrappers: str, objective: str, dtype: type, m: int, n: int, seed: int
) -> None:
    weight, second = layer(m, n, seed, samples=max(4, n // 2))  # fewer samples than inputs
    pattern, metric = parse(text), damped(second)
    options = {"block": 8, "wrappers": wrappers, "objective": objective, "cycles": 6}
    found = armor(weight.astype(dtype), metric, pattern, **options)
    dense = found.dense().astype(np.float64)
    assert found.core.dtype == dtype
    for start in range(0, n, pattern.of):
        group = found.core[:, start : start + pattern.of]
        assert ((group != 0).sum(axis=1) == min(pattern.keep, group.shape[1])).all()
    assert np.isfinite(dense).all()
    assert (np.diff(found.losses) <= 0).all()
    if objective == "hessian":
        start = error(weight, sparsegpt(weight.astype(dtype), metric, pattern).astype(np.float64), metric)
        signal = error(weight, 0 * weight, metric)
        assert error(weight, dense, metric) <= start + signal * (1e-12 if dtype is np.float64 else 1e-5)
        for blocks in (found.left, found.right):
            if blocks is not None:
                assert np.linalg.cond(blocks.astype(np.float64)).max() <= 1.01 * CONDITION


def test_wrappers_help() -> None:
    weight, second = layer(32, 64)
    metric = damped(second)
    bare = coordinate_descent(weight, metric, TWO_OF_FOUR, sweeps=20)
    found = armor(weight, damped(second), TWO_OF_FOUR, block=16, cycles=20)
    assert found.losses[-1] < 0.8 * error(weight, bare, metric)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["in", "out", "both"]), st.integers(4, 20), st.integers(4, 40), st.integers(0, 1000))
def test_the_papers_objective_never_loses_to_nowag(wrappers: str, m: int, n: int, seed: int) -> None:
    """Theorem 3.1 of the paper, for its own proxy: sum_ij (V_ij - Vhat_ij)^2 h_j on the normalised weight."""
    weight, second = layer(m, n, seed)
    found = armor(weight, damped(second), TWO_OF_FOUR, block=4, wrappers=wrappers, objective="paper", cycles=5)
    scaled, rows, columns = normalise(weight)
    diagonal = np.diag(damped(second))

    def proxy(dense: np.ndarray) -> float:
        return float((((dense / rows[:, None] / columns[None, :]) - scaled) ** 2 * diagonal).sum())

    baseline = proxy(nowag(weight, diagonal, TWO_OF_FOUR))
    assert proxy(found.dense()) <= baseline * (1 + 1e-9) + 1e-12
    assert holds(found.core, TWO_OF_FOUR)


def test_a_shared_wrapper_of_taps_is_one_for_all_of_them() -> None:
    weight, second = layer(12, 3 * 10, 5)
    found = armor(weight, damped(second), TWO_OF_FOUR, block=4, taps=3, cycles=6)
    assert found.right.shape == (3, 4, 4)
    full = np.zeros((10, 10))
    for j, block in enumerate(found.right):
        size = min(4, 10 - 4 * j)
        full[4 * j : 4 * j + size, 4 * j : 4 * j + size] = block[:size, :size]
    assert np.allclose(found.dense(), found.core @ np.kron(np.eye(3), full))
    for tap in range(3):
        assert holds(found.core[:, 10 * tap : 10 * tap + 10], TWO_OF_FOUR)


@pytest.mark.parametrize("wrappers", ["in", "out", "both", "none"])
def test_scales_of_the_papers_objective_come_back_for_every_tap(wrappers: str) -> None:
    random = np.random.default_rng(0)
    weight = magnitude(random.standard_normal((8, 24)) * np.exp(random.standard_normal(24)), TWO_OF_FOUR)
    found = armor(weight, np.eye(24), TWO_OF_FOUR, block=4, wrappers=wrappers, objective="paper", taps=3, cycles=3)
    assert relative_error(weight, found.dense(), np.eye(24)) < 1e-9


@pytest.mark.parametrize("wrappers", ["in", "both"])
@pytest.mark.parametrize("objective", ["hessian", "paper"])
def test_weights_that_read_the_same_share_one_wrapper(wrappers: str, objective: str) -> None:
    first, second = layer(10, 22, 1)
    weights = [first, 0.01 * layer(13, 22, 2)[0], layer(8, 22, 3)[0]]
    metric = damped(second)
    found = armor_shared(weights, metric, TWO_OF_FOUR, block=8, wrappers=wrappers, objective=objective, cycles=12)
    assert len(found) == 3
    for weight, factors in zip(weights, found, strict=True):
        assert factors.core.shape == weight.shape
        assert holds(factors.core, TWO_OF_FOUR)
        assert np.array_equal(factors.right, found[0].right)
        assert (factors.left is None) == (wrappers == "in")
        if objective == "hessian":  # each counts the same, however small
            start = sparsegpt(weight, metric, TWO_OF_FOUR)
            assert error(weight, factors.dense(), metric) < error(weight, start, metric)
    if objective == "hessian":
        relative = [
            relative_error(weight, factors.dense(), metric) for weight, factors in zip(weights, found, strict=True)
        ]
        assert sum(relative) == pytest.approx(found[0].losses[-1])


def test_a_time_budget_ends_the_cycles() -> None:
    weight, second = layer(16, 24)
    found = armor(weight, damped(second), TWO_OF_FOUR, block=8, cycles=10**9, seconds=0.0)
    assert len(found.losses) == 1
    bare = coordinate_descent(weight, damped(second), TWO_OF_FOUR, sweeps=10**9, seconds=0.0)
    assert np.array_equal(bare, sparsegpt(weight, damped(second), TWO_OF_FOUR))


def test_float32_reaches_what_float64_reaches() -> None:
    weight, second = layer(24, 48, 2)
    exact = armor(weight, damped(second), TWO_OF_FOUR, block=8, cycles=12).losses[-1]
    single = armor(weight.astype(np.float32), damped(second), TWO_OF_FOUR, block=8, cycles=12)
    assert single.core.dtype == np.float32
    assert error(weight, single.dense().astype(np.float64), damped(second)) < 1.1 * exact


def test_the_overhead_is_what_was_asked_for() -> None:
    weight, second = layer(48, 64)
    for wrappers in ("in", "out", "both"):
        size = block_size(384, 1536, 0.085, wrappers, TWO_OF_FOUR)
        block = block_size(48, 64, 0.2, wrappers, TWO_OF_FOUR)
        found = armor(weight, damped(second), TWO_OF_FOUR, block=block, wrappers=wrappers, cycles=1)
        assert size % 4 == 0
        assert 0.1 < found.overhead() <= 0.2
    assert block_size(8, 8, 0.05, "in", TWO_OF_FOUR) == 0
    assert block_size(64, 9 * 64, 0.05, "in", TWO_OF_FOUR, taps=9) == 28
