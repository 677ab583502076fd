"""Workers: results in order, bounded lookahead, linear algebra on one thread while they last, errors come through."""

from __future__ import annotations

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from graphopt.parallel import Workers


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_results_come_in_the_order_of_the_pieces(jobs: int) -> None:
    with Workers(jobs) as workers:
        assert list(workers.map(lambda k: time.sleep(0.001 * (5 - k)) or k * k, range(6))) == [0, 1, 4, 9, 16, 25]


def test_pieces_are_drawn_only_as_far_ahead_as_there_are_threads() -> None:
    drawn = []

    def pieces() -> object:
        for k in range(20):
            drawn.append(k)
            yield k

    with Workers(3) as workers:
        results = workers.map(abs, pieces())
        assert next(results) == 0
        assert len(drawn) == 4
        results.close()


def test_several_pieces_are_in_work_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)
    with Workers(2) as workers:
        assert sorted(workers.map(lambda _: meeting.wait(), range(2))) == [0, 1]


def test_linear_algebra_has_one_thread_as_long_as_they_last() -> None:
    before = [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
    with Workers(2):
        assert {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"} == {1}
    assert [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"] == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_comes_through(jobs: int) -> None:
    with Workers(jobs) as workers, pytest.raises(ZeroDivisionError):
        list(workers.map(lambda k: 1 // k, [1, 0, 2]))
