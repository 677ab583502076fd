from __future__ import annotations

import numpy as np
import pytest

from graphopt.rewriting import row_blocks
from graphopt.rewriting.row_blocks import Rows, finite_in, rounded


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (6, 2, 2), (0, 4), (5, 100)])
def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK", 8 * 6)
    counts = np.zeros(shape, np.int64)
    for rows in row_blocks.row_blocks(shape):
        assert counts[rows].size * 8 <= max(48, counts[:1].size * 8 if shape else 8)
        counts[rows] += 1
    assert (counts == 1).all()


def test_the_same_bits_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).normal(size=(7, 5, 3))
    whole = (data * 3 + 1).astype(np.float16)
    taken: list[Rows] = []

    def exact(rows: Rows) -> row_blocks.Float64:
        taken.append(rows)
        values: row_blocks.Float64 = data[rows] * 3 + 1
        return values

    monkeypatch.setattr(row_blocks, "BLOCK", 8 * 30)
    assert rounded(data.shape, np.dtype(np.float16), exact).tobytes() == whole.tobytes()
    assert len(taken) == 4


@pytest.mark.parametrize("row", [0, 6])
def test_a_number_too_large_for_the_type_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK", 8 * 4)
    data = np.ones((7, 2))
    assert finite_in(data, np.dtype(np.float16))
    data[row, 1] = 1e6
    assert not finite_in(data, np.dtype(np.float16))
    assert finite_in(data, np.dtype(np.float32))
