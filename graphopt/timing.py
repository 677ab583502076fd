"""Paired timing: several things measured in turn, so that whatever disturbs the machine disturbs all of them alike.

One round runs all in a random order and the next in its reverse; what counts is the ratio within a round. Medians and
quartiles over rounds are robust against the bursts of a shared machine; absolute times are not, and no verdict rests on
them.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

MIN_SAMPLE = 2e-3
"""Seconds that one sample lasts at least, by repeating the call; its median forgets a call that was interrupted."""
MIN_ROUNDS = 5
MAX_ROUNDS = 2000
WARM_UP = 3
TURNS = 4
"""Rounds of `in_turns`."""
QUIET_ROUNDS = 30
"""Rounds at least where the shortest tenth of the times counts."""


@dataclass(frozen=True)
class Paired:
    """What `paired` measured; index i is the i-th call, 0 the reference.

    Attributes:
        milliseconds: median time of one call.
        ratios: median over rounds of time_i / time_0.
        low, high: quartiles of these ratios.
        rounds: number of rounds.
        within_noise: True where the 95 % interval of the median ratio (median +- 1.57 IQR / sqrt(rounds), McGill, Tukey
            and Larsen 1978) holds 1: no difference was shown. True for the reference.
    """

    milliseconds: tuple[float, ...]
    ratios: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    rounds: int
    within_noise: tuple[bool, ...]


def paired(
    calls: Sequence[Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Paired:
    """Time calls, interleaved.

    Args:
        calls: what to time; the first is the reference of the ratios.
        seconds: time for the measured rounds; at least `MIN_ROUNDS` rounds are run, whatever they take.
        clock: seconds, rising.

    Raises:
        ValueError: there is nothing to time.
    """
    if not calls:
        raise ValueError("nothing to time")
    repeats = [_repeats(call, clock) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    draw = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        rounds = 0
        # Rounds come in pairs, an order and its reverse, so that a steady drift cancels. The order is drawn anew for
        # each pair: whatever runs twice in a row finds warm caches, and that must not be the same call every time.
        while rounds < MIN_ROUNDS or rounds % 2 or (clock() - start < seconds and rounds < MAX_ROUNDS):
            if rounds % 2 == 0:
                draw.shuffle(order)
            for i in order if rounds % 2 == 0 else reversed(order):
                samples[i].append(_sample(calls[i], repeats[i], clock))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return _paired(samples)


def _paired(samples: Sequence[Sequence[float]]) -> Paired:
    """Medians and intervals of samples, one row a call, one column a round."""
    times = np.array(samples)
    rounds = times.shape[1]
    ratios = times / times[0]
    low, middle, high = np.percentile(ratios, [25, 50, 75], axis=1)
    margin = 1.57 * (high - low) / np.sqrt(rounds)
    noise = (middle - margin <= 1) & (middle + margin >= 1)
    return Paired(
        milliseconds=tuple(float(t) for t in np.median(times, axis=1) * 1e3),
        ratios=tuple(float(r) for r in middle),
        low=tuple(float(r) for r in low),
        high=tuple(float(r) for r in high),
        rounds=rounds,
        within_noise=tuple(bool(n) for n in noise),
    )


def in_turns(
    calls: Sequence[Callable[[], AbstractContextManager[Callable[[], object]]]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Time calls of which only one can be in memory at a time: each is made ready, timed for a while, and put away.

    Rounds alternate between an order and its reverse, so that a call that ends a round begins the next one and need not
    be made ready again.

    Args:
        calls: make a call ready and put it away; the first is the reference of the ratios.
        seconds: time to measure, in all; at least one sample is taken in each turn.
        clock: seconds, rising.

    Raises:
        ValueError: there is nothing to time.
    """
    if not calls:
        raise ValueError("nothing to time")
    turn = seconds / (TURNS * len(calls))
    samples: list[list[float]] = [[] for _ in calls]
    order = [i for k in range(TURNS) for i in (range(len(calls)) if k % 2 == 0 else reversed(range(len(calls))))]
    for i, turns in itertools.groupby(order):
        with calls[i]() as call:
            repeats = _repeats(call, clock)
            for _ in turns:
                start, found = clock(), [_sample(call, repeats, clock)]
                while clock() - start < turn:
                    found.append(_sample(call, repeats, clock))
                samples[i].append(float(np.median(found)))
        del call  # it holds what was put away
    return _paired(samples)


def undisturbed(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    warm: bool = False,
) -> list[float]:
    """Seconds that each call takes while nothing else runs, as far as a busy machine lets it be seen.

    The calls run in turn, in random order, and of each the tenth of its times that is shortest bounds the result: what
    other processes take from some runs does not count, and what the machine's clock does to all of them hits all alike.
    Medians of paired ratios (`paired`) tell what a user of this machine sees; this tells what a kernel costs.

    Args:
        calls: what to time.
        seconds: time for all; at least `QUIET_ROUNDS` rounds are run.
        clock: seconds, rising.
        warm: run each call once more before it is timed, so that it finds its own data in the caches, as a model that
            runs again and again does; without, it finds those of the others.
    """
    for call in calls:
        for _ in range(WARM_UP):
            call()
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    draw = random.Random(0)
    start = clock()
    while len(times[0]) < QUIET_ROUNDS or (clock() - start < seconds and len(times[0]) < MAX_ROUNDS):
        draw.shuffle(order)
        for i in order:
            if warm:
                calls[i]()
            begin = clock()
            calls[i]()
            times[i].append(clock() - begin)
    return [float(np.percentile(each, 10)) for each in times]


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    durations = []
    for _ in range(repeats):
        begin = clock()
        call()
        durations.append(clock() - begin)
    return float(np.median(durations))


def _repeats(call: Callable[[], object], clock: Callable[[], float]) -> int:
    """Warm up, and find how often to call so that one sample lasts long enough."""
    best = float("inf")
    for _ in range(WARM_UP):
        begin = clock()
        call()
        best = min(best, clock() - begin)
    return min(1000, max(1, round(MIN_SAMPLE / best))) if best > 0 else 1000
