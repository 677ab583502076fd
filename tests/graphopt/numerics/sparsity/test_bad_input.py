"""What cannot be solved is refused with the reason; what merely looks odd gives finite weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphopt.numerics.metric import damped, error, relative_error
from graphopt.numerics.sparsity.armor import armor, armor_shared
from graphopt.numerics.sparsity.descent import coordinate_descent
from graphopt.numerics.sparsity.one_shot import sparsegpt
from graphopt.numerics.sparsity.patterns import holds, parse

TWO_OF_FOUR = parse("2:4")
RANDOM = np.random.default_rng(0)


def solve_armor(weight: Any, metric: Any) -> Any:
    return armor(weight, metric, TWO_OF_FOUR, block=4).core


def solve_shared(weight: Any, metric: Any) -> Any:
    return armor_shared([weight, weight], metric, TWO_OF_FOUR, block=4)[0].core


def solve_descent(weight: Any, metric: Any) -> Any:
    return coordinate_descent(weight, metric, TWO_OF_FOUR)


@pytest.mark.parametrize("solve", [solve_armor, solve_shared, solve_descent])
@pytest.mark.parametrize(
    ("weight", "metric", "why"),
    [
        (np.zeros((4, 8)), np.eye(8), "weights are all zero"),
        (np.full((4, 8), np.nan), np.eye(8), "weights are not finite"),
        (np.full((4, 8), np.inf), np.eye(8), "weights are not finite"),
        (np.ones((4, 8)), np.full((8, 8), np.nan), "moments of its inputs are not finite"),
        (np.ones((4, 8)), np.zeros((8, 8)), "not positive definite"),
        (np.ones((4, 8)), -np.eye(8), "not positive definite"),
        (np.ones((4, 8)), np.ones((8, 8)) - 0.5 * np.eye(8), "not positive definite"),
        (np.ones((4, 8)), np.eye(7), "shape"),
    ],
)
def test_hopeless_layers_are_refused_with_the_reason(
    solve: Callable[[Any, Any], Any], weight: np.ndarray, metric: np.ndarray, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        solve(weight, metric)


def test_torch_refuses_for_the_same_reason() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="not positive definite"):
        sparsegpt(torch.ones((4, 8)), torch.ones((8, 8)) - 0.5 * torch.eye(8), TWO_OF_FOUR)


@pytest.mark.parametrize(("second", "why"), [(np.zeros((8, 8)), "all zero"), (np.full((8, 8), np.inf), "not finite")])
def test_moments_that_cannot_be_damped(second: np.ndarray, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        damped(second)


@pytest.mark.parametrize(("pattern", "block"), [("50%", 4), ("2:4", 0), ("2:4", 6)])
def test_blocks_must_hold_whole_groups(pattern: str, block: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        armor(np.ones((4, 8)), np.eye(8), parse(pattern), block=block)


def test_no_weights_share_nothing() -> None:
    with pytest.raises(ValueError, match="no weights"):
        armor_shared([], np.eye(8), TWO_OF_FOUR, block=4)


ODD = {
    "rank one": np.outer(RANDOM.normal(size=12), RANDOM.normal(size=16)),
    "rows of zeros": RANDOM.normal(size=(12, 16)) * (np.arange(12) % 2)[:, None],
    "columns of zeros": RANDOM.normal(size=(12, 16)) * (np.arange(16) % 4 > 0),
    "sparse enough already": RANDOM.normal(size=(12, 16)) * (np.arange(16) % 2),
    "a single weight": np.eye(12, 16) * (np.arange(12) == 3)[:, None],
    "one row": RANDOM.normal(size=(1, 4)),
    "less than a group": RANDOM.normal(size=(3, 3)),
    "one column": RANDOM.normal(size=(3, 1)),
    "very small": 1e-30 * RANDOM.normal(size=(12, 16)),
    "very large": 1e12 * RANDOM.normal(size=(12, 16)),
    "very different rows": RANDOM.normal(size=(12, 16)) * np.geomspace(1e-6, 1e6, 12)[:, None],
}


@pytest.mark.parametrize("wrappers", ["in", "out", "both", "none"])
@pytest.mark.parametrize("objective", ["hessian", "paper"])
@pytest.mark.parametrize("name", ODD)
def test_odd_weights_give_finite_ones(name: str, wrappers: str, objective: str) -> None:
    weight = ODD[name]
    n = weight.shape[1]
    x = np.random.default_rng(1).normal(size=(5, n))  # fewer samples than inputs
    x[:, 0] = 0.0  # an input that is never there
    if n > 2:
        x[:, 2] = x[:, 1]  # and one that is there twice
    metric = damped(x.T @ x) if n > 1 else np.ones((1, 1))
    found = armor(weight, metric, TWO_OF_FOUR, block=4, wrappers=wrappers, objective=objective, cycles=8)
    assert np.isfinite(found.dense()).all()
    assert np.isfinite(found.losses).all()
    assert holds(found.core, TWO_OF_FOUR)
    if objective == "hessian":
        start = error(weight, sparsegpt(weight, metric, TWO_OF_FOUR), metric)
        assert error(weight, found.dense(), metric) <= start * (1 + 1e-9)


def test_singular_moments_and_short_rows_give_finite_weights() -> None:
    second = np.zeros((6, 6))
    second[0, 0] = 1.0
    weight = np.random.default_rng(0).normal(size=(3, 6))
    found = armor(weight, damped(second), TWO_OF_FOUR, block=4, cycles=4)
    assert np.isfinite(found.dense()).all()
    assert relative_error(weight, found.dense(), damped(second)) < 0.05


def test_factors_that_half_precision_does_not_hold_can_be_told() -> None:
    weight = 1e6 * np.random.default_rng(0).normal(size=(8, 8))
    found = armor(weight, np.eye(8), TWO_OF_FOUR, block=4, cycles=2)
    assert found.largest() == max(abs(found.core).max(), abs(found.right).max())
    assert found.largest() > float(np.finfo(np.float16).max)
