"""graphopt.collector: the collector's threshold is raised for a block, and is afterwards what it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from graphopt.collector import THRESHOLD, seldom_collected


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_nested_blocks_restore_what_the_first_found() -> None:
    gc.set_threshold(500, 7, 9)
    with seldom_collected:
        with seldom_collected:
            assert gc.get_threshold() == (THRESHOLD, 7, 9)
        assert gc.get_threshold() == (THRESHOLD, 7, 9)
    assert gc.get_threshold() == (500, 7, 9)


def test_an_error_restores() -> None:
    gc.set_threshold(500)
    with pytest.raises(RuntimeError), seldom_collected:
        raise RuntimeError
    assert gc.get_threshold()[0] == 500


@pytest.mark.parametrize("threshold", [0, 5 * THRESHOLD])
def test_a_collector_that_runs_less_often_is_left_alone(threshold: int) -> None:
    gc.set_threshold(threshold)
    with seldom_collected:
        assert gc.get_threshold()[0] == threshold
