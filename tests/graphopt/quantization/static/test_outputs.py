"""outputs: the cheapest candidates join as long as their noise fits."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.quantization.static.outputs import MORE_NOISE, affordable


def additive(costs: dict[str, float], total: float, together: float = 1.0):
    """Noise that adds up; `together`: by what factor more than one candidate costs more than their sum."""

    def noise(some: Sequence[str]) -> float:
        return total + sum(costs[key] for key in some) * (together if len(some) > 1 else 1.0)

    return noise


def test_the_cheapest_join_in_the_order_of_the_keys() -> None:
    costs = {"dear": 1.0, "b": 0.02, "free": 0.0, "a": 0.01, "c": 0.2}
    assert affordable(list(costs), 1.0, additive(costs, 1.0)) == ["b", "free", "a", "c"]
    assert affordable(list(costs), 0.1, additive(costs, 0.1)) == ["free", "a"]  # 0.01 + 0.02 > 0.026
    assert affordable([], 1.0, additive(costs, 1.0)) == []


def test_what_costs_more_together_than_alone_is_halved_until_it_fits() -> None:
    costs = dict.fromkeys("abcd", 0.06)
    noise = additive(costs, 1.0, together=2.0)
    chosen = affordable(list(costs), 1.0, noise)
    assert chosen == ["a", "b"] and noise(chosen) <= MORE_NOISE < noise(list(costs))


def test_without_noise_only_what_adds_none_joins() -> None:
    costs = {"a": 0.0, "b": 1e-9}
    assert affordable(list(costs), 0.0, additive(costs, 0.0)) == ["a"]


def test_less_noise_than_before_is_no_credit_for_others() -> None:
    costs = {"better": -0.5, "worse": 0.4}
    assert affordable(list(costs), 1.0, additive(costs, 1.0)) == ["better"]
