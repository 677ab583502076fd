"""Random graphs with sparse and factorised layers; tools/fuzz/sparse.py runs more of them, and all steps on each."""

from __future__ import annotations

import pytest
from sparse_fuzz import wrong


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_what_must_hold_holds_for_random_graphs(first: int) -> None:
    found = {seed: reason for seed in range(first, first + 10) if (reason := wrong(seed, quick=True))}
    assert not found
