"""The effect of each of many parts in few measurements, and decibels."""

from __future__ import annotations

import math

import pytest

from graphopt.progress import Silent
from graphopt.quantization.search.sensitivity import by_halves, decibel


def _measured(effects, most):
    runs = []

    def effect(group):
        runs.append(group)
        return sum(effects[key] for key in group)

    return by_halves(list(effects), effect, Silent(), most=most), runs


def test_each_alone_where_measurements_suffice():
    effects = {f"l{i}": float(i) for i in range(20)}
    found, runs = _measured(effects, 20)
    assert found == effects
    assert len(runs) == 20


@pytest.mark.parametrize("most", [8, 16, 33])
def test_the_large_ones_among_many_are_told_apart(most):
    effects = {f"l{i}": 1e-6 for i in range(200)} | {"l77": 1.0}
    found, runs = _measured(effects, most)
    assert len(runs) <= most
    assert set(found) == set(effects)
    assert sum(found.values()) == pytest.approx(sum(effects.values()))
    assert found["l77"] == max(found.values())
    if most >= 33:
        assert found["l77"] == pytest.approx(1.0, rel=1e-3)


def test_negative_effects_count_as_large():
    effects = {f"l{i}": 0.0 for i in range(64)} | {"l40": -1.0}
    assert _measured(effects, 20)[0]["l40"] == pytest.approx(-1.0)


def test_nothing_to_measure():
    assert _measured({}, 4) == ({}, [])


def test_decibel():
    assert decibel(1e-2) == 20
    assert decibel(0) == math.inf and decibel(math.inf) == -math.inf
