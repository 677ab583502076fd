"""Which layers stay in float for the noise they make, on noises that add up."""

from __future__ import annotations

import pytest

from graphopt.quantization.search.tradeoff import Price, kept_in_float


def _choose(noise, work=None, runs=32):
    measured = []

    def without(left_out):
        measured.append(tuple(left_out))
        return sum(power for key, power in noise.items() if key not in set(left_out))

    work = work or dict.fromkeys(noise, 1.0)
    return kept_in_float(noise, work, sum(noise.values()), without, runs=runs), measured


@pytest.mark.parametrize("each", [1e-6, 1e-5, 1e-4, 2e-4])
@pytest.mark.parametrize("layers", [5, 20, 55])
def test_noise_that_is_spread_leaves_nothing_in_float(each, layers):
    """Up to 20 dB in all."""
    assert _choose({f"l{i}": each * (1 + i % 3) / 2 for i in range(layers)})[0] == []


@pytest.mark.parametrize("rest", [1e-7, 1e-5])
def test_a_culprit_is_found(rest):
    assert _choose({f"l{i}": rest for i in range(20)} | {"bad": 0.1})[0] == ["bad"]


def test_what_dominates_the_rest_goes_along():
    noise = {f"l{i}": 1e-7 for i in range(40)} | {"bad": 0.1, "second": 1e-3}
    assert set(_choose(noise)[0]) == {"bad", "second"}


def test_layers_without_work_go_for_little():
    noise = {f"l{i}": 1e-6 for i in range(10)} | {"head": 1e-4}
    work = {f"l{i}": 1.0 for i in range(10)} | {"head": 1e-4}
    assert _choose(noise, work)[0] == ["head"]


def test_a_ruined_model_goes_back_to_float_whole():
    noise = {f"l{i}": 0.05 for i in range(6)}
    assert set(_choose(noise)[0]) == set(noise)


def test_expensive_layers_stay_where_they_cost_more_than_they_gain():
    noise = {"big": 1e-4} | {f"l{i}": 1e-6 for i in range(8)}
    work = {"big": 90.0} | {f"l{i}": 1.0 for i in range(8)}
    assert "big" not in _choose(noise, work)[0]


def test_a_layer_that_showed_the_noise_of_another_returns_to_integers():
    """Both round one tensor; with the cheap one in float the noise is gone."""
    noise = {"writer": 0.01, "reader": 0.011, "rest": 1e-7}

    def without(left_out):
        return 1e-7 if "writer" in left_out else 0.012

    work = {"writer": 1.0, "reader": 1.0, "rest": 20.0}
    assert kept_in_float(noise, work, 0.012, without) == ["writer"]


def test_measurements_are_few():
    noise = {f"l{i:03}": 0.01 if i < 20 else 1e-8 for i in range(400)}
    chosen, measured = _choose(noise)
    assert {f"l{i:03}" for i in range(20)} == set(chosen)
    assert len(measured) <= 32


def test_infinite_noise_is_left_out():
    noise = {"bad": float("inf"), "fine": 1e-5}

    def without(left_out):
        return 1e-5 if "bad" in left_out else float("inf")

    assert kept_in_float(noise, dict.fromkeys(noise, 1.0), float("inf"), without) == ["bad"]


def test_price_falls_with_the_noise():
    price = Price()
    values = [price.of_noise(n) for n in (float("inf"), 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0


def test_an_island_that_costs_more_to_reach_than_it_gains_stays_in_integers():
    """Conversions at its borders count; where the whole model is in float there are none."""
    noise = {f"l{i}": 1e-7 for i in range(8)} | {"loud": 2e-5}
    work = dict.fromkeys(noise, 1.0)

    def chosen(conversion, power):
        noises = {**noise, "loud": power}
        return kept_in_float(
            noises, work, sum(noises.values()), lambda keys: sum(p for k, p in noises.items() if k not in set(keys)),
            borders=lambda keys: conversion if 0 < len(keys) < len(noises) else 0.0,
        )  # fmt: skip

    assert chosen(0.0, 2e-3) == ["loud"]
    assert chosen(9.0, 2e-3) == []
    assert chosen(9.0, 1.0) == ["loud"]


def test_a_ruined_model_goes_back_whole_past_islands_that_cost_more():
    noise = {f"l{i}": 0.05 for i in range(6)}
    found = kept_in_float(
        noise, dict.fromkeys(noise, 1.0), 0.3, lambda keys: 0.05 * (6 - len(keys)),
        borders=lambda keys: 20.0 * (len(keys) % 6 > 0),
    )  # fmt: skip
    assert set(found) == set(noise)
