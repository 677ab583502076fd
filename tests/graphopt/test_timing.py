"""Paired timing, on a clock of our own: ratios, drift, interruptions, noise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest

from graphopt import timing


class Clock:
    """Time that passes only in calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        count = 0

        def run() -> None:
            nonlocal count
            self.now += seconds(count)
            count += 1
            self.log.append(name)

        return run


def test_ratios_and_order() -> None:
    clock = Clock()
    calls = [clock.work("a", lambda _: 0.01), clock.work("b", lambda _: 0.02), clock.work("c", lambda _: 0.005)]
    found = timing.paired(calls, 1.0, clock)
    assert found.ratios == pytest.approx((1, 2, 0.5))
    assert found.milliseconds == pytest.approx((10, 20, 5))
    assert found.within_noise == (True, False, False)
    assert found.rounds >= timing.MIN_ROUNDS
    assert found.rounds % 2 == 0
    rounds = "".join(clock.log)[3 * timing.WARM_UP :]
    pairs = [rounds[i : i + 6] for i in range(0, len(rounds) - 5, 6)]
    assert all(pair[:3] == pair[:2:-1] and set(pair) == set("abc") for pair in pairs), "an order and its reverse"
    assert {pair[2] for pair in pairs} == set("abc"), "each has its turn of running twice in a row"


def test_a_drift_of_the_machine_cancels() -> None:
    clock = Clock()

    def slower(_: int) -> float:
        return 0.01 * (1 + clock.now)

    found = timing.paired([clock.work("a", slower), clock.work("b", slower)], 4.0, clock)
    assert found.ratios[1] == pytest.approx(1, abs=0.02)
    assert found.within_noise[1]


def test_interrupted_calls_do_not_count() -> None:
    clock = Clock()
    burst = clock.work("b", lambda i: 0.001 * (50 if i % 9 == 4 else 1))
    found = timing.paired([clock.work("a", lambda _: 0.001), burst], 1.0, clock)
    assert found.ratios[1] == pytest.approx(1)


def test_slow_calls_get_the_least_number_of_rounds() -> None:
    clock = Clock()
    found = timing.paired([clock.work("a", lambda _: 30.0)], 1.0, clock)
    assert timing.MIN_ROUNDS <= found.rounds <= timing.MIN_ROUNDS + 1


def test_short_calls_are_repeated() -> None:
    clock = Clock()
    timing.paired([clock.work("a", lambda _: 1e-5)], 0.05, clock)
    assert len(clock.log) > 100 * timing.MIN_ROUNDS


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="nothing"):
        timing.paired([], 1.0)


@pytest.mark.parametrize("warm", [False, True])
def test_undisturbed_forgets_what_others_took(warm: bool) -> None:
    clock = Clock()
    # two runs of three are interrupted, for a while that differs
    burst = [clock.work(str(s), lambda n, s=s: s * (1 if n % 3 == 0 else 5 + n % 7)) for s in (1e-3, 3e-3)]
    assert timing.undisturbed(burst, 0.5, clock, warm=warm) == pytest.approx([1e-3, 3e-3])
    assert clock.log.count("0.001") == clock.log.count("0.003") >= timing.QUIET_ROUNDS


def test_one_is_ready_at_a_time_and_orders_alternate() -> None:
    clock, open_now, opened, calls = Clock(), [], [], []

    def ready(name: str, seconds: float):
        @contextmanager
        def within():
            open_now.append(name)
            opened.append(name)
            assert len(open_now) == 1
            gone = [reference() is None for reference in calls]
            assert all(gone), "what was put away is freed before the next is made ready"
            call = clock.work(name, lambda _: seconds * (1 + clock.now / 100))
            calls.append(weakref.ref(call))
            yield call
            open_now.remove(name)

        return within

    found = timing.in_turns([ready("a", 0.01), ready("b", 0.02)], 1.0, clock)
    assert "".join(opened) == "ababababababa"[: timing.TURNS + 1]
    assert found.rounds == timing.TURNS
    assert found.ratios == pytest.approx((1, 2), rel=0.01)
    assert found.within_noise == (True, False)
    assert not open_now


def test_what_takes_longer_than_its_turn_is_timed_once_a_round() -> None:
    clock = Clock()
    call = clock.work("a", lambda _: 5.0)
    found = timing.in_turns([lambda: nullcontext(call)], 1.0, clock)
    assert found.milliseconds == (5000,)
    assert len(clock.log) == timing.WARM_UP + timing.TURNS
