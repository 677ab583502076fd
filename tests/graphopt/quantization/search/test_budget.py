"""Formats within budgets: optimal on the table, and corrected by what is measured on the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.quantization.search.budget import Budget, Cost, best, total, within

FORMATS = {"float": (0.0, 4.0, 1.0), "int8": (1.0, 1.0, 0.4), "int4-weights": (16.0, 0.5, 0.8)}


def _table(layers: int, seed: int = 0) -> dict[str, dict[str, Cost]]:
    rng = np.random.default_rng(seed)
    table = {}
    for index in range(layers):
        noise, size, time = 10 ** rng.uniform(-6, -3), rng.uniform(10, 1000), rng.uniform(0.1, 1)
        table[f"l{index}"] = {f: Cost(noise * n, size * b, time * t) for f, (n, b, t) in FORMATS.items()}
    return table


def _assignments(table):
    for picks in itertools.product(*(list(c) for c in table.values())):
        yield dict(zip(table, picks, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_least_noise_within_bytes_and_time_is_the_one_brute_force_finds(seed):
    table = _table(6, seed)
    everything = total(table, dict.fromkeys(table, "float"))
    size, time = 0.4 * everything.bytes, 0.7 * everything.time
    wanted = min(
        (t for f in _assignments(table) if (t := total(table, f)).bytes <= size and t.time <= time),
        key=lambda t: t.noise,
    )
    found = within(table, Budget(bytes=size, time=time), lambda formats: pytest.fail("nothing to measure"))
    assert found is not None
    assert found.cost.noise == pytest.approx(wanted.noise)
    assert found.cost.bytes <= size and found.cost.time <= time


def test_budgets_that_nothing_keeps():
    table = _table(3)
    assert within(table, Budget(bytes=1.0), lambda f: 0.0) is None
    assert within(table, Budget(bytes=1.0, drop=0.1), lambda f: 0.0) is None


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_a_drop_is_kept_by_what_is_measured_not_by_the_table(factor):
    """Errors that add up to a multiple of their sum, with a part that two layers make only together."""
    table = _table(7, 3)

    def measured(formats):
        together = 1e-4 if formats["l0"] != "float" and formats["l1"] != "float" else 0.0
        return factor * total(table, formats).noise + together

    limit = 3e-4
    found = within(table, Budget(drop=limit), measured)
    assert found is not None and found.drop is not None
    assert found.drop == measured(found.formats) <= limit
    fastest = min(total(table, f).time for f in _assignments(table) if measured(f) <= limit)
    assert found.cost.time <= 1.15 * fastest
    assert found.measured <= 10


def test_everything_is_quantised_where_the_drop_allows_it():
    table = _table(5)
    found = within(table, Budget(drop=1.0), lambda f: total(table, f).noise)
    assert found is not None and set(found.formats.values()) == {"int8"}
    assert found.measured == 1


def test_without_times_the_bytes_are_made_least():
    table = {k: {f: Cost(c.noise, c.bytes, 0.0) for f, c in t.items()} for k, t in _table(5).items()}
    found = within(table, Budget(drop=1.0), lambda f: 0.0)
    assert found is not None and set(found.formats.values()) == {"int4-weights"}


def test_of_equal_goals_the_quieter_is_taken():
    table = {"l": {"loud": Cost(2e-3, 8.0, 1.0), "quiet": Cost(1e-3, 8.0, 1.0), "float": Cost(0.0, 32.0, 2.0)}}
    assert best(table, "time", noise=None, bytes=None, time=None) == {"l": "quiet"}
