"""Cross-layer equalisation in the log domain."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.equalization import Magnitudes, equalised


def rows(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int64)[:, None]


def test_one_pair_is_the_closed_form() -> None:
    one = Magnitudes.of(np.array([[8.0, -1.0], [0.5, 0.25]]), rows([1, 2]), rows([0]))
    two = Magnitudes.of(np.array([[2.0, -8.0]]), rows([0]), rows([1, 2]).T)
    found = np.exp2(equalised([one, two], [np.array([1, 2])], limit=20, least_gain=0))
    np.testing.assert_allclose(found, [1, 2 / np.sqrt(0.5), 0.25 / np.sqrt(0.5)])  # mean one


def test_channels_that_nothing_writes_or_reads_keep_their_scale() -> None:
    one = Magnitudes.of(np.array([[8.0], [0.0], [4.0], [16.0]]), rows([1, 2, 3, 4]), rows([0]))
    two = Magnitudes.of(np.array([[0.0, 2.0, 4.0, 1.0]]), rows([0]), rows([1, 2, 3, 4]).T)
    found = equalised([one, two], [np.array([1, 2, 3, 4])], limit=20, least_gain=0)
    np.testing.assert_array_equal(found, [0, 0, 0, -1, 1])


def test_scales_stay_within_the_limit() -> None:
    one = Magnitudes.of(np.array([[1e30], [1.0]]), rows([1, 2]), rows([0]))
    two = Magnitudes.of(np.array([[1e-30, 1.0]]), rows([0]), rows([1, 2]).T)
    np.testing.assert_array_equal(equalised([one, two], [np.array([1, 2])], limit=3), [0, 3, -3])


def test_no_offset_grows_beyond_the_largest() -> None:
    one = Magnitudes.of(np.array([[8.0], [1e-9]]), rows([1, 2]), rows([0]))
    two = Magnitudes.of(np.array([[1.0, 8.0]]), rows([0]), rows([1, 2]).T)
    bias = Magnitudes.of(np.array([4.0, 2.0]), np.array([1, 2]), np.array([0]))
    assert equalised([one, two], [np.array([1, 2])], [bias], limit=50, least_gain=-np.inf)[2] == -1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_every_group_of_a_chain_ends_even(seed: int, layers: int) -> None:
    """Rows and columns of all channels have one ratio, however badly a chain is scaled; its function stays."""
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(4, 4)) * np.exp2(random.uniform(-8, 8, (4, 1))) for _ in range(layers)]
    numbers = [np.zeros((1, 1), np.int64)]
    numbers += [rows([4 * k + i for i in range(1, 5)]) for k in range(layers - 1)]
    numbers += [np.zeros((1, 1), np.int64)]
    groups = [n.ravel() for n in numbers[1:-1]]
    stated = [Magnitudes.of(w, numbers[k + 1], numbers[k].T) for k, w in enumerate(weights)]
    scales = np.exp2(equalised(stated, groups, limit=40, sweeps=500, tolerance=1e-6, least_gain=-np.inf))
    after = [w * scales[m.multiply] / scales[m.divide] for w, m in zip(weights, stated, strict=True)]
    for left, right in itertools.pairwise(after):
        common = np.abs(left).max(axis=1) / np.abs(right).max(axis=0)
        np.testing.assert_allclose(common, common[0], rtol=1e-3)
    before, now = np.linalg.multi_dot(weights[::-1]), np.linalg.multi_dot(after[::-1])
    np.testing.assert_allclose(now, before, rtol=1e-6, atol=1e-9 * np.abs(before).max())


def test_channels_that_gain_nothing_keep_their_scale() -> None:
    """One channel has the largest magnitudes on both sides: whatever one side gains the other loses."""
    one = Magnitudes.of(np.array([[8.0], [1.0]]), rows([1, 2]), rows([0]))
    two = Magnitudes.of(np.array([[1.0, 1.0]]), rows([0]), rows([1, 2]).T)
    assert not equalised([one, two], [np.array([1, 2])], limit=20).any()
