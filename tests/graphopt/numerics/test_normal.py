"""Moments carried through functions, sums and products, beside those of samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graphopt.numerics.normal import CARRIED, REACH, Normal, linear, union

RNG = np.random.default_rng(0)


def drawn(n: Normal, count: int = 400_000) -> np.ndarray:
    return n.mean + np.sqrt(n.variance) * RNG.standard_normal((count, *n.mean.shape))


def agree(found: Normal, samples: np.ndarray) -> None:
    spread = samples.std(axis=0).max()
    np.testing.assert_allclose(found.mean, samples.mean(axis=0), atol=0.02 * spread)
    np.testing.assert_allclose(np.sqrt(found.variance), samples.std(axis=0), atol=0.03 * spread)
    assert (found.low <= samples.min(axis=0) + 0.01 * spread).all()
    assert (samples.max(axis=0) <= found.high + 0.01 * spread).all()


X = Normal.of([0.0, -1.0, 2.0], [1.0, 4.0, 0.25])


@pytest.mark.parametrize(
    "f",
    [lambda a: np.maximum(a, 0), np.tanh, np.abs, lambda a: np.clip(a, -0.5, 1), lambda a: a / (1 + np.exp(-a))],
    ids=["relu", "tanh", "abs", "clip", "silu"],
)
def test_functions(f: Callable[[np.ndarray], np.ndarray]) -> None:
    agree(X.through(f), f(drawn(X)))


def test_relu_cuts_the_interval() -> None:
    found = X.through(lambda a: np.maximum(a, 0))
    assert found.low.tolist() == [0, 0, 0]
    np.testing.assert_allclose(found.high, X.high)


def test_sums_and_products() -> None:
    y = Normal.of([1.0, 3.0, -2.0], [0.5, 1.0, 2.0])
    a, b = drawn(X), drawn(y)
    agree(X.plus(y), a + b)
    agree(X.times(y), a * b)


def test_linear_layers_with_groups() -> None:
    weight, bias = RNG.standard_normal((2, 3, 4)), RNG.standard_normal(6)
    x = Normal.of(RNG.standard_normal(4), RNG.uniform(0.1, 2, 4))
    # two channels of a group, two kernel positions each: independent draws of one distribution
    columns = np.repeat(drawn(x, 200_000)[:, :, None], 2, axis=2)
    columns[:, :, 1] = drawn(x, 200_000)
    y = np.einsum("grc,ngc->ngr", weight, columns.reshape(-1, 2, 4)).reshape(-1, 6) + bias
    agree(linear(weight, bias, x, 2), y)


def test_mixtures() -> None:
    samples = drawn(X)
    agree(X.mixed(), samples.reshape(-1))
    y = Normal.of(5.0, 1.0)
    agree(union([X, y]), np.concatenate([samples[:100_000].reshape(-1), drawn(y, 300_000)]))
    grid = Normal.of(RNG.standard_normal((1, 2, 3)), RNG.uniform(0.5, 1, (1, 2, 3)))
    found = grid.along(1, 2, 3)
    each = drawn(grid, 50_000)[:, 0].transpose(0, 2, 1).reshape(-1, 2)
    agree(found, each)


def test_intervals() -> None:
    assert Normal.of(1.0, 4.0).range == (1 - 2 * REACH, 1 + 2 * REACH)
    assert Normal.of(1.0, 4.0, CARRIED).range[1] == 1 + 2 * CARRIED
    assert Normal.uniform(0, 1).range == (0, 1)
    assert Normal.uniform(0, 1).plus(Normal.uniform(0, 1)).range == (0, 2), "no wider than both together"
    assert Normal.of(9.0, 0.0).range == (0, 9)
