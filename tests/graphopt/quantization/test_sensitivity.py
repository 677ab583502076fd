"""Which parts of a rewrite are left out because of the noise they make."""

from __future__ import annotations

import math

from graphopt.quantization.sensitivity import Rule, culprits, decibel


def _choose(noise, work=None):
    runs = []

    def without(left_out):
        runs.append(len(left_out))
        return sum(power for key, power in noise.items() if key not in set(left_out))

    work = work or dict.fromkeys(noise, 1.0)
    return culprits(noise, work, sum(noise.values()), without, Rule()), runs


def test_accurate_models_are_left_alone():
    chosen, runs = _choose({f"l{i}": 1e-5 for i in range(20)})
    assert chosen == [] and runs == []


def test_one_culprit_is_found():
    noise = {f"l{i}": 1e-6 for i in range(20)} | {"bad": 0.1}
    assert _choose(noise)[0] == ["bad"]


def test_what_dominates_the_rest_goes_along():
    noise = {f"l{i}": 1e-7 for i in range(20)} | {"bad": 0.1, "second": 1e-3}
    assert _choose(noise)[0] == ["bad", "second"]


def test_spread_noise_has_no_culprits():
    assert _choose({f"l{i}": 2e-4 for i in range(40)})[0] == []  # 21 dB: acceptable, and a quarter gains 1 dB


def test_poor_models_are_lifted_if_that_suffices():
    noise = {f"l{i}": 0.99e-3 for i in range(12)}
    chosen, _ = _choose(noise)
    assert len(chosen) == 2  # 1.2e-2 -> 1e-2
    assert _choose({f"l{i}": 1e-2 for i in range(12)})[0] == []  # a quarter left out stays poor


def test_the_budget_of_work_holds():
    noise = {"big": 0.1, "small": 0.05} | {f"l{i}": 1e-6 for i in range(8)}
    work = {"big": 90.0, "small": 1.0} | {f"l{i}": 1.0 for i in range(8)}
    assert "big" not in _choose(noise, work)[0]


def test_bisection_takes_few_runs():
    noise = {f"l{i}": 0.1 if i < 20 else 1e-7 for i in range(200)}
    chosen, runs = _choose(noise)
    assert 18 <= len(chosen) <= 20
    assert len(runs) <= 8


def test_decibel():
    assert decibel(1e-2) == 20
    assert decibel(0) == math.inf and decibel(math.inf) == -math.inf
