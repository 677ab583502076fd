"""Reshape blocks: as fine as the sizes prove, never finer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.analysis.shapes import reshape_blocks


def blocks(source: list, result: list) -> list[tuple[list[int], list[int]]]:
    return [(list(a), list(b)) for a, b in reshape_blocks(source, result)]


@pytest.mark.parametrize(
    ("source", "result", "expected"),
    [
        (["n", 64, 4, 4], ["n", 1024], [([0], [0]), ([1, 2, 3], [1])]),
        (["B", "T", 64], ["B", "T", 4, 16], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        (["n", 12, 5, 5], ["n", 3, 4, 5, 5], [([0], [0]), ([1], [1, 2]), ([2], [3]), ([3], [4])]),
        ([8, "B", 16], ["B", 128], [([0, 1, 2], [0, 1])]),
        (["n", 64, 1, 1], [None, 64], [([0], [0]), ([1, 2, 3], [1])]),
    ],
)
def test_blocks(source: list, result: list, expected: list) -> None:
    assert blocks(source, result) == expected


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms())
def test_blocks_cover_both_sides_with_equal_products(sizes: list[int], random) -> None:
    merged, k = [], 0
    while k < len(sizes):
        step = random.randint(1, 3)
        merged.append(int(np.prod(sizes[k : k + step])))
        k += step
    found = blocks(sizes, merged)
    assert [a for block, _ in found for a in block] == list(range(len(sizes)))
    assert [b for _, block in found for b in block] == list(range(len(merged)))
    for one, two in found:
        assert np.prod([sizes[a] for a in one]) == np.prod([merged[b] for b in two])
