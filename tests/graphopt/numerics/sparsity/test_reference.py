"""Textbook versions of the solvers, one row and one column at a time in float64, agree with the fast ones."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from graphopt.numerics.metric import damped, error, inverse_root
from graphopt.numerics.sparsity.armor import armor, armor_shared
from graphopt.numerics.sparsity.blocks import Blocks, left_update, right_update
from graphopt.numerics.sparsity.descent import coordinate_descent
from graphopt.numerics.sparsity.one_shot import magnitude, nowag, sparsegpt, wanda
from graphopt.numerics.sparsity.patterns import Pattern, mask, parse

Matrix = np.ndarray
PATTERNS = ["2:4", "1:4", "4:8"]


def layer(m: int, n: int, seed: int = 0) -> tuple[Matrix, Matrix]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(3 * n, n)) @ (random.normal(size=(n, n)) * np.geomspace(3, 0.3, n))
    return random.normal(size=(m, n)), damped(x.T @ x / len(x))


def groups(n: int, pattern: Pattern) -> list[list[int]]:
    return [list(range(start, min(start + pattern.of, n))) for start in range(0, n, pattern.of)]


def kept(scores: list[float], keep: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def textbook_mask(scores: Matrix, pattern: Pattern) -> Matrix:
    found = np.zeros(scores.shape, bool)
    for row in range(len(scores)):
        for group in groups(scores.shape[1], pattern):
            for place in kept([float(scores[row, j]) for j in group], pattern.keep):
                found[row, group[place]] = True
    return found


def textbook_sparsegpt(weight: Matrix, metric: Matrix, pattern: Pattern) -> Matrix:
    """Optimal brain surgeon from left to right: H^-1 of the columns still to come is computed anew each time."""
    weight, n = weight.copy(), weight.shape[1]
    for row in weight:
        stays: set[int] = set()
        for j in range(n):
            inverse = np.linalg.inv(metric[j:, j:])
            if j % pattern.of == 0:
                group = list(range(j, min(j + pattern.of, n)))
                left = [np.linalg.inv(metric[k:, k:])[0, 0] for k in group]
                scores = [float(row[k] ** 2 / pivot) for k, pivot in zip(group, left, strict=True)]
                stays = {group[place] for place in kept(scores, pattern.keep)}
            if j not in stays:
                row[j:] -= row[j] / inverse[0, 0] * inverse[0]
                row[j] = 0.0
    return weight


def textbook_descent(weight: Matrix, metric: Matrix, pattern: Pattern, core: Matrix, sweeps: int) -> Matrix:
    """Every group in turn by trying all its supports on the whole loss."""
    core, n = core.copy(), weight.shape[1]
    for _ in range(sweeps):
        for row in range(len(core)):
            for group in groups(n, pattern):
                others = core[row].copy()
                others[group] = 0
                pull = (metric @ (weight[row] - others))[group]
                best: tuple[float, Any] = (-np.inf, None)
                for support in combinations(range(len(group)), min(pattern.keep, len(group))):
                    at = [group[place] for place in support]
                    values = np.linalg.solve(metric[np.ix_(at, at)], pull[list(support)])
                    best = max(best, (float(values @ pull[list(support)]), (at, values)), key=lambda pair: pair[0])
                core[row] = others
                core[row, best[1][0]] = best[1][1]
    return core


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("n", [4, 21, 30])
def test_masks(text: str, n: int) -> None:
    weight, metric = layer(7, n)
    pattern = parse(text)
    scores = np.round(weight**2 * np.diag(metric), 1)  # with equals
    assert np.array_equal(mask(scores, pattern), textbook_mask(scores, pattern))
    assert np.array_equal(magnitude(weight, pattern) != 0, textbook_mask(abs(weight), pattern))
    assert np.array_equal(
        wanda(weight, np.diag(metric), pattern) != 0, textbook_mask(weight**2 * np.diag(metric), pattern)
    )
    columns = np.linalg.norm(weight, axis=0)
    scaled = weight / columns / np.linalg.norm(weight / columns, axis=1)[:, None]
    assert np.array_equal(
        nowag(weight, np.diag(metric), pattern) != 0, textbook_mask(scaled**2 * np.diag(metric), pattern)
    )


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("n", [3, 22, 70])
def test_sparsegpt(text: str, n: int) -> None:
    weight, metric = layer(3, n)
    assert np.allclose(sparsegpt(weight, metric, parse(text)), textbook_sparsegpt(weight, metric, parse(text)))


@pytest.mark.parametrize("n", [1, 5, 64, 65, 300])
def test_the_root_of_the_inverse(n: int) -> None:
    metric = layer(1, n)[1]
    root = inverse_root(metric)
    assert np.array_equal(root, np.triu(root))
    assert np.allclose(root.T @ root @ metric, np.eye(n), atol=1e-8)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("n", [3, 22, 70])
def test_coordinate_descent(text: str, n: int) -> None:
    weight, metric = layer(3, n)
    pattern = parse(text)
    start = wanda(weight, np.diag(metric), pattern)
    found = coordinate_descent(weight, metric, pattern, sweeps=3, start=start, tolerance=0.0)
    expected = textbook_descent(weight, metric, pattern, start, sweeps=3)
    assert np.array_equal(found != 0, expected != 0)
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("taps", [1, 3])
def test_the_right_wrapper_is_the_least_squares_solution(taps: int) -> None:
    """All entries of B as unknowns of one dense least-squares problem."""
    size, count = 3, 2
    weight, metric = layer(11, taps * count * size, 5)
    core = magnitude(weight, Pattern(2, 3, 2 / 3))
    blocks, root = Blocks(size, count, taps), np.linalg.cholesky(metric)
    columns = []
    for place in range(count * size * size):
        unit = np.zeros((count, size, size))
        unit.flat[place] = 1.0
        columns.append((blocks.right(core, unit) @ root).ravel())
    expected = np.linalg.lstsq(np.array(columns).T, (weight @ root).ravel(), rcond=None)[0].reshape(count, size, size)
    eye = np.tile(np.eye(size), (count, 1, 1))
    found = eye + right_update(core, weight @ metric, eye, metric, blocks, steps=60)
    assert np.allclose(found, expected, atol=1e-6)


def test_the_left_wrapper_is_the_least_squares_solution() -> None:
    weight, metric = layer(12, 20, 6)
    made = magnitude(weight, parse("2:4"))
    root = np.linalg.cholesky(metric)
    eye = np.tile(np.eye(4), (3, 1, 1))
    found = eye + left_update(made, weight @ metric, eye, metric, Blocks(4, 3))
    for i, block in enumerate(found):
        rows = slice(4 * i, 4 * i + 4)
        expected = np.linalg.lstsq((made[rows] @ root).T, (weight[rows] @ root).T, rcond=None)[0].T
        assert np.allclose(block, expected, atol=1e-4)


@pytest.mark.parametrize("text", [*PATTERNS, "40%"])
def test_torch_gives_the_same(text: str) -> None:
    torch = pytest.importorskip("torch")
    weight, metric = layer(9, 70, 4)
    pattern = parse(text)
    tensors = torch.tensor(weight), torch.tensor(metric)
    diagonal, tensor = np.diag(metric), torch.diagonal(tensors[1])
    pairs = [
        (magnitude(weight, pattern), magnitude(tensors[0], pattern)),
        (wanda(weight, diagonal, pattern), wanda(tensors[0], tensor, pattern)),
        (nowag(weight, diagonal, pattern), nowag(tensors[0], tensor, pattern)),
        (sparsegpt(weight, metric, pattern), sparsegpt(*tensors, pattern)),
        (coordinate_descent(weight, metric, pattern), coordinate_descent(*tensors, pattern)),
    ]
    for expected, found in pairs:
        assert isinstance(found, torch.Tensor)
        assert np.allclose(found.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("wrappers", ["in", "out", "both", "none"])
@pytest.mark.parametrize("objective", ["hessian", "paper"])
def test_torch_factorises_the_same(wrappers: str, objective: str) -> None:
    torch = pytest.importorskip("torch")
    weight, metric = layer(10, 22, 4)
    options: dict[str, Any] = {"block": 4, "wrappers": wrappers, "objective": objective, "cycles": 4}
    expected = armor(weight, metric, parse("2:4"), **options)
    found = armor(torch.tensor(weight), torch.tensor(metric), parse("2:4"), **options)
    assert isinstance(found.core, torch.Tensor)
    assert np.allclose(found.losses, expected.losses, rtol=1e-6)
    assert np.allclose(found.dense().numpy(), expected.dense(), atol=1e-6)
    assert found.overhead() == expected.overhead()
    assert found.largest() == pytest.approx(expected.largest())


def test_torch_shares_the_same() -> None:
    torch = pytest.importorskip("torch")
    first, metric = layer(10, 22, 4)
    weights = [first, layer(5, 22, 5)[0]]
    expected = armor_shared(weights, metric, parse("2:4"), block=4, cycles=4)
    found = armor_shared([torch.tensor(w) for w in weights], torch.tensor(metric), parse("2:4"), block=4, cycles=4)
    for one, two in zip(found, expected, strict=True):
        assert np.allclose(one.dense().numpy(), two.dense(), atol=1e-6)


def test_an_exact_factorisation_is_found() -> None:
    """W = S B: nothing is left of the error, though the start is far from it."""
    random = np.random.default_rng(0)
    core = magnitude(random.normal(size=(40, 16)), parse("2:4"))
    right = np.eye(4) + 0.2 * random.normal(size=(4, 4, 4))
    weight = Blocks(4, 4).right(core, right)
    metric = layer(1, 16)[1]
    found = armor(weight, metric, parse("2:4"), block=4, cycles=60)
    assert error(weight, found.dense(), metric) < 1e-3 * found.losses[0]
