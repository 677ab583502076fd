"""The search over mixtures of formats: with a clock and with noise that the test makes up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from graphopt.quantization.search.choice import Compare, Mixture, Ratio, search

FORMATS = dict.fromkeys(("conv", "depthwise", "product"), ("float", "int8", "int8-dynamic"))
BASE = dict.fromkeys(FORMATS, "float")
STARTS = {
    "int8": dict.fromkeys(FORMATS, "int8"),
    "int8-dynamic": dict.fromkeys(FORMATS, "int8-dynamic"),
}
BOUND = 1.02


def even(group: str, format: str) -> float:
    """The noise of classes where it decides nothing."""
    return 0.0


def clock(
    costs: Mapping[str, Mapping[str, float | tuple[float, ...]]],
    *,
    shapes: int = 1,
    spread: float = 0.002,
    borders: float = 0.0,
    log: list[Mixture] | None = None,
) -> Compare:
    """Layers take their costs, one after the other; whole models are measured within a spread of the truth.

    `borders` is what it costs where a class in int8 stands beside one that is not.
    """
    draw = random.Random(0)

    def time(mixture: Mixture, shape: int) -> float:
        total = 0.0
        for name, by_format in costs.items():
            cost = by_format[mixture[name]]
            total += cost[shape] if isinstance(cost, tuple) else cost
        kinds = [mixture[name] == "int8" for name in costs]
        return total + borders * sum(a != b for a, b in itertools.pairwise(kinds))

    def compare(first: Mixture, others: Sequence[Mixture]) -> list[Ratio]:
        if log is not None:
            log.extend(others)
        found = []
        for mixture in others:
            values = [time(mixture, s) / time(first, s) * draw.uniform(1 - spread, 1 + spread) for s in range(shapes)]
            widths = 1 + 2 * spread
            found.append(Ratio(tuple(values), tuple(v / widths for v in values), tuple(v * widths for v in values)))
        return found

    return compare


def test_each_class_gets_what_is_fastest() -> None:
    costs = {
        "conv": {"float": 10, "int8": 3, "int8-dynamic": 100},
        "depthwise": {"float": 2, "int8": 4, "int8-dynamic": 50},
        "product": {"float": 8, "int8": 5, "int8-dynamic": 3},
    }
    result = search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND)
    assert result.found[0][0] == {"conv": "int8", "depthwise": "float", "product": "int8-dynamic"}
    assert result.starts["int8-dynamic"].mean > 7
    assert not result.stopped


def test_where_nothing_is_faster_nothing_is_found() -> None:
    costs = {name: {"float": 2.0, "int8": 2.6, "int8-dynamic": 9.0} for name in FORMATS}
    result = search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND)
    assert result.found == []
    assert result.starts["int8"].mean == pytest.approx(1.3, rel=0.01)


def test_a_class_that_gains_alone_is_found_where_all_together_lose() -> None:
    costs = {
        "conv": {"float": 10, "int8": 7, "int8-dynamic": 100},
        "depthwise": {"float": 2, "int8": 30, "int8-dynamic": 50},
        "product": {"float": 8, "int8": 20, "int8-dynamic": 30},
    }
    result = search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND)
    assert result.found[0][0] == {"conv": "int8", "depthwise": "float", "product": "float"}


def test_gains_within_the_noise_are_none() -> None:
    costs = {name: {"float": 2.0, "int8": 1.99, "int8-dynamic": 1.995} for name in FORMATS}
    log: list[Mixture] = []
    result = search(FORMATS, BASE, STARTS, clock(costs, spread=0.05, log=log), even, bound=BOUND)
    changes = [trial for trial in result.trials if trial.ratio.certainly_below < 0.99]
    assert not changes
    # both starts, and at most one round from either end, in two parts with float beside each
    assert len(log) <= 2 + 2 * (2 + 6)


def test_what_is_as_fast_and_quieter_is_taken() -> None:
    costs = {
        "conv": {"float": 10, "int8": 3, "int8-dynamic": 100},
        "depthwise": {"float": 0.5, "int8": 0.5, "int8-dynamic": 50},
        "product": {"float": 8, "int8": 3, "int8-dynamic": 2.99},
    }
    noise = dict.fromkeys(itertools.product(FORMATS, ("int8", "int8-dynamic")), 1e-2)
    noise["product", "int8-dynamic"] = 1e-3
    found = search(FORMATS, BASE, STARTS, clock(costs), lambda *pair: noise[pair], bound=BOUND).found[0][0]
    assert found["product"] == "int8-dynamic"
    noise["product", "int8-dynamic"] = 1e-2
    without = search(FORMATS, BASE, STARTS, clock(costs), lambda *pair: noise[pair], bound=BOUND).found[0][0]
    assert without["product"] == "int8"


def test_no_shape_may_become_slower() -> None:
    costs = {
        "conv": {"float": (1, 1), "int8": (1, 1), "int8-dynamic": (9, 9)},
        "depthwise": {"float": (1, 1), "int8": (1, 1), "int8-dynamic": (9, 9)},
        "product": {"float": (1, 20), "int8": (1.5, 9), "int8-dynamic": (1.4, 6)},
    }
    clocks = {shapes: clock(costs, shapes=shapes) for shapes in (1, 2)}
    assert search(FORMATS, BASE, STARTS, clocks[2], even, bound=BOUND).found == []
    allowed = search(FORMATS, BASE, STARTS, clocks[2], even, bound=float("inf")).found[0][0]
    assert allowed["product"] == "int8-dynamic"


def test_changes_that_hinder_each_other_are_not_made_together() -> None:
    """A border between integers and floats costs more than a class in float gains, unless both its sides are float."""
    costs = {
        "conv": {"float": 9.0, "int8": 10.0, "int8-dynamic": 90.0},
        "depthwise": {"float": 12.0, "int8": 4.0, "int8-dynamic": 90.0},
        "product": {"float": 9.0, "int8": 10.0, "int8-dynamic": 90.0},
    }
    assert search(FORMATS, BASE, STARTS, clock(costs, borders=3), even, bound=BOUND).found[0][0] == dict.fromkeys(
        FORMATS, "int8"
    )
    free = search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND).found[0][0]
    assert free == {"conv": "float", "depthwise": "int8", "product": "float"}


def test_a_gain_that_was_luck_is_not_believed() -> None:
    """One measurement of many shows a gain that is none; the next shows it."""
    costs = {
        "conv": {"float": 10.0, "int8": 3.0, "int8-dynamic": 100.0},
        "depthwise": {"float": 2.0, "int8": 2.0, "int8-dynamic": 50.0},
        "product": {"float": 8.0, "int8": 4.0, "int8-dynamic": 4.0},
    }
    honest, lucky = clock(costs), {"conv": "int8", "depthwise": "int8", "product": "int8-dynamic"}
    luck = [0.8]

    def compare(first: Mixture, others: Sequence[Mixture]) -> list[Ratio]:
        found = list(honest(first, others))
        for i, mixture in enumerate(others):
            if mixture == lucky and luck:
                value = luck.pop()
                found[i] = Ratio((value,), (value,), (value,))
        return found

    assert search(FORMATS, BASE, STARTS, compare, even, bound=BOUND).found[0][0] == dict.fromkeys(FORMATS, "int8")
    assert not luck


def test_the_same_times_give_the_same_choice() -> None:
    costs = {
        "conv": {"float": 10, "int8": 3, "int8-dynamic": 100},
        "depthwise": {"float": 2, "int8": 2.01, "int8-dynamic": 50},
        "product": {"float": 8, "int8": 5, "int8-dynamic": 4.99},
    }
    first, second = (search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND) for _ in range(2))
    assert first == second


def test_out_of_time_keeps_the_best_start() -> None:
    costs = {
        "conv": {"float": 10, "int8": 3, "int8-dynamic": 100},
        "depthwise": {"float": 2, "int8": 4, "int8-dynamic": 50},
        "product": {"float": 8, "int8": 5, "int8-dynamic": 3},
    }
    result = search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND, expired=lambda: True)
    assert [m for m, _ in result.found] == [dict.fromkeys(FORMATS, "int8")] and result.stopped and not result.trials


def test_slower_ones_follow_the_fastest_for_when_it_is_refused() -> None:
    costs = {
        "conv": {"float": 10, "int8": 3, "int8-dynamic": 5},
        "depthwise": {"float": 2, "int8": 1, "int8-dynamic": 1},
        "product": {"float": 8, "int8": 5, "int8-dynamic": 6},
    }
    result = search(FORMATS, BASE, STARTS, clock(costs), even, bound=BOUND)
    assert [m for m, _ in result.found] == [dict.fromkeys(FORMATS, name) for name in ("int8", "int8-dynamic")]
    assert [mean for _, mean in result.found] == pytest.approx([0.45, 0.6], rel=0.01)


def test_nothing_to_choose_is_not_timed() -> None:
    log: list[Mixture] = []
    result = search(
        {"conv": ("float",)},
        {"conv": "float"},
        {"int8": {"conv": "float"}},
        clock({"conv": {"float": 1}}, log=log),
        {},
        bound=1,
    )
    assert result.found == [] and not log


def test_operators_that_follow_their_neighbours_are_no_layers() -> None:
    """A connecting operator is int8 in the float model too, where it changes nothing; in float it parts two layers."""
    costs = {
        "conv": {"float": 10.0, "int8": 3.0},
        "add": {"float": 1.0, "int8": 0.5},
        "product": {"float": 8.0, "int8": 3.0},
    }
    formats = dict.fromkeys(costs, ("float", "int8"))
    base = {"conv": "float", "add": "int8", "product": "float"}
    result = search(formats, base, {"int8": dict.fromkeys(costs, "int8")}, clock(costs), even, bound=BOUND)
    assert [m for m, _ in result.found] == [dict.fromkeys(costs, "int8")]
    slow = {**costs, "conv": {"float": 10.0, "int8": 13.0}, "product": {"float": 8.0, "int8": 9.0}}
    assert search(formats, base, {"int8": dict.fromkeys(costs, "int8")}, clock(slow), even, bound=BOUND).found == []


def test_intervals_of_shapes_add_up_as_squares() -> None:
    one = Ratio((0.8,), (0.78,), (0.82,))
    two = Ratio((0.8, 0.8), (0.78, 0.78), (0.82, 0.82))
    assert one.certainly_below == pytest.approx(0.82)
    assert 0.8 < two.certainly_below < 0.82
    assert two.shown_above(0.77) and not two.shown_above(0.78)
    assert str(two) == "0.80/0.80"
