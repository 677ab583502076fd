"""Streaming moments equal those of the whole array, however it is cut; merging is associative."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics import moments
from graphopt.numerics.moments import Moments


def data(seed: int, n: int, d: int, mean: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + mean


def collect(x: np.ndarray, y: np.ndarray | None, cuts: list[int], *, full: bool, exact: bool = True) -> Moments:
    m = Moments(full=full, exact=exact)
    edges = sorted({0, len(x), *(c % len(x) for c in cuts)})
    for a, b in itertools.pairwise(edges):
        m.update(x[a:b], None if y is None else y[a:b])
    return m


def assert_same(m: Moments, x: np.ndarray, y: np.ndarray | None, scale: float, rtol: float = 1e-10) -> None:
    centred = x - x.mean(0)
    tolerance = rtol * scale
    assert m.n == len(x)
    np.testing.assert_allclose(m.mean, x.mean(0), atol=tolerance)
    np.testing.assert_allclose(m.variance, x.var(0), atol=tolerance)
    if m.full:
        np.testing.assert_allclose(m.covariance, centred.T @ centred / len(x), atol=tolerance)
        np.testing.assert_allclose(m.second, x.T @ x / len(x), atol=tolerance * (1 + np.abs(x.mean(0)).max()))
    if y is not None:
        np.testing.assert_allclose(m.mean_y, y.mean(0), atol=tolerance)
        np.testing.assert_allclose(m.variance_y, y.var(0), atol=tolerance)
        np.testing.assert_allclose(m.cross, (y - y.mean(0)).T @ centred / len(x), atol=tolerance)


CUTS = st.lists(st.integers(0, 200), max_size=6)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 200),
    d=st.integers(1, 6),
    e=st.integers(0, 4),
    mean=st.sampled_from([0.0, 100.0]),
    full=st.booleans(),
    cuts=CUTS,
)
@settings(max_examples=60, deadline=None)
def test_streaming_equals_batch(seed: int, n: int, d: int, e: int, mean: float, full: bool, cuts: list[int]) -> None:
    x = data(seed, n, d, mean)
    y = data(seed + 1, n, e, -mean) + x[:, :1] if e else None
    assert_same(collect(x, y, cuts, full=full), x, y, scale=max(1.0, mean) * 30)


@given(seed=st.integers(0, 1000), sizes=st.tuples(*[st.integers(1, 40)] * 3), full=st.booleans())
@settings(max_examples=40, deadline=None)
def test_merge_is_associative_and_equals_one_stream(seed: int, sizes: tuple[int, int, int], full: bool) -> None:
    parts = [data(seed + i, n, 4, 10.0 * i) for i, n in enumerate(sizes)]
    targets = [p[:, :2] * 3 + data(seed + 9, len(p), 2) for p in parts]

    def make(i: int) -> Moments:
        return collect(parts[i], targets[i], [], full=full)

    left, right, tail, empty = make(0), make(0), make(1), Moments(full=full)
    left.merge(make(1))
    left.merge(make(2))
    tail.merge(make(2))
    right.merge(tail)
    empty.merge(left)
    x, y = np.concatenate(parts), np.concatenate(targets)
    for m in (left, right, empty):
        assert_same(m, x, y, scale=3000)


def test_merging_leaves_the_other_alone() -> None:
    a, b = collect(data(0, 9, 3), None, [], full=True), collect(data(1, 9, 3, 5), None, [], full=True)
    before = b.covariance.copy()
    fresh = Moments(full=True)
    fresh.merge(b)
    fresh.update(data(2, 9, 3))
    a.merge(b)
    np.testing.assert_array_equal(b.covariance, before)
    assert (a.n, b.n, fresh.n) == (18, 9, 18)


def test_float32_products_are_as_exact_as_stated() -> None:
    x = data(0, 60_000, 16, 3.0).astype(np.float32)
    m = Moments(full=True)
    m.update(x)
    truth = np.cov(x.astype(np.float64).T, bias=True)
    spread = np.sqrt(np.outer(np.diag(truth), np.diag(truth)))
    assert (np.abs(m.covariance - truth) / spread).max() < 1e-5


def test_a_large_mean_does_not_cost_the_variance() -> None:
    x = np.random.default_rng(0).normal(1e6, 1.0, size=(5000, 3))
    naive = (x.astype(np.float32) ** 2).mean(0) - x.astype(np.float32).mean(0) ** 2
    assert not np.allclose(naive, 1.0, atol=0.5)  # plain sums fail here, so the test can
    m = Moments(full=True)
    for part in np.array_split(x, 7):
        m.update(part)
    np.testing.assert_allclose(m.variance, x.var(0), rtol=1e-9)


def test_constant_channels_have_no_variance_at_all() -> None:
    m = Moments(full=True)
    for _ in range(3):
        m.update(np.full((1000, 2), 0.1, np.float32))
    assert (m.covariance == 0).all()
    assert (m.variance == 0).all()


def test_channels_first_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "CHUNK", 17)
    x, y = data(0, 100, 5), data(1, 100, 2)
    m = Moments(full=True, exact=True)
    m.update(np.ascontiguousarray(x.T), np.ascontiguousarray(y.T), axis=0)
    assert_same(m, x, y, scale=30)


def test_low_precision_input_is_widened() -> None:
    x = data(0, 100, 3).astype(np.float16)
    m = Moments(full=True)
    m.update(x)
    np.testing.assert_allclose(m.mean, x.astype(np.float64).mean(0), atol=1e-4)


def test_misuse_is_refused() -> None:
    m = Moments()
    with pytest.raises(ValueError, match="no observations"):
        _ = m.mean
    m.update(data(0, 5, 3))
    with pytest.raises(ValueError, match="no second stream"):
        _ = m.cross
    with pytest.raises(ValueError, match="full=True"):
        _ = m.covariance
    with pytest.raises(ValueError, match="always or never"):
        m.update(data(0, 5, 3), data(0, 5, 3))
    with pytest.raises(ValueError, match="4 channels after 3"):
        m.update(data(0, 5, 4))
    with pytest.raises(ValueError, match="5 and 6 observations"):
        Moments().update(data(0, 5, 3), data(0, 6, 3))
    with pytest.raises(ValueError, match="full and diagonal"):
        m.merge(collect(data(0, 5, 3), None, [], full=True))
    with pytest.raises(ValueError, match="matrix"):
        m.update(np.zeros((2, 2, 2)))


def test_torch_tensors_give_the_same() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, y = data(0, 100, 4).astype(np.float32), data(1, 100, 2).astype(np.float32)
    a, b = Moments(full=True), Moments(full=True)
    a.update(x, y)
    b.update(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(b.cross.numpy(), a.cross, atol=1e-5)
    np.testing.assert_allclose(b.covariance.numpy(), a.covariance, atol=1e-4)
