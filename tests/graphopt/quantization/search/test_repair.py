"""Layers go back to float by noise and by drop: the noise and the drop are sums that the test makes up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from graphopt.progress import Silent
from graphopt.quantization.search.repair import LEAST, LEAST_SETS, Repair, repair


class Sums:
    """A model is its assignment; noise adds up over the layers that are not in float."""

    samples = 16

    def __init__(self, noise: Mapping[str, float]) -> None:
        self.powers = noise

    def noise(self, model: Any) -> float:
        return sum(self.powers[key] for key, format in model.items() if format != "float")


def run(noise: Mapping[str, float], drops: Mapping[str, float] | None, limit: float = 0.01) -> tuple[Repair, list[Any]]:
    asked: list[Any] = []

    def drop(model: Any) -> float | None:
        asked.append(model)
        return None if drops is None else sum(drops[key] for key, format in model.items() if format != "float")

    result = repair(
        dict.fromkeys(noise, "int8"), dict, Sums(noise), dict.fromkeys(noise, 1.0), 2.5, drop, limit, Silent()  # type: ignore[arg-type]
    )  # fmt: skip
    return result, asked


def test_an_accurate_mixture_stays() -> None:
    noise = {f"layer{i}": 1e-7 for i in range(20)}
    found, asked = run(noise, dict.fromkeys(noise, 1e-6))
    assert found.returned == [] and set(found.assignment.values()) == {"int8"}
    assert found.before == found.after == pytest.approx(2e-6)
    assert found.drop == pytest.approx(2e-5) and len(asked) == 1
    assert found.told == "signal to noise of the worst output on 16 calibration samples: 57.0 dB"


def test_what_dominates_the_noise_goes_back_whatever_the_drop_says() -> None:
    noise = {f"layer{i}": 1e-6 for i in range(20)} | {"loud": 0.3}
    found, _ = run(noise, dict.fromkeys(noise, 0.0))
    assert found.returned == ["loud"] and found.assignment["loud"] == "float"
    assert list(found.assignment.values()).count("int8") == 20
    assert "1 layers back in float: 47.0 dB" in found.told


@pytest.mark.parametrize("harmful", [0, 1, 5, 17, 39])
def test_the_fewest_layers_go_back_that_the_bound_asks_for(harmful: int) -> None:
    """Noise ranks the layers as the drop does; those that go back are the first, and none more."""
    noise = {f"layer{i}": 1e-9 * (1 - i / 100) for i in range(40)}
    drops = {f"layer{i}": 0.02 if i < harmful else 1e-5 for i in range(40)}
    found, asked = run(noise, drops)
    assert found.returned == [f"layer{i}" for i in range(harmful)]
    assert found.drop is not None and found.drop <= 0.01
    assert len(asked) <= 2 + 2 * math.ceil(math.log2(40))


def test_a_model_that_no_layer_may_leave_ends_in_float() -> None:
    noise = dict.fromkeys(("a", "b", "c"), 1e-6)
    found, _ = run(noise, dict.fromkeys(noise, 1.0))
    assert set(found.assignment.values()) == {"float"} and found.drop == 0


def test_without_time_neighbours_are_measured_together() -> None:
    noise = {f"layer{i:02}": 1e-6 for i in range(200)} | {"loud": 0.3}
    measured: list[Any] = []

    class Counted(Sums):
        def noise(self, model: Any) -> float:
            measured.append(model)
            return super().noise(model)

    found = repair(
        dict.fromkeys(noise, "int8"), dict, Counted(noise), dict.fromkeys(noise, 1.0), 2.5,  # type: ignore[arg-type]
        lambda model: 0.0, 0.01, Silent(), 0.0,
    )  # fmt: skip
    assert "loud" in found.returned and len(measured) <= LEAST + LEAST_SETS + 2


def test_a_drop_that_cannot_be_measured_does_not_decide() -> None:
    noise = dict.fromkeys(("a", "b", "c"), 1e-6)
    found, _ = run(noise, None)
    assert found.returned == [] and found.drop is None


def test_a_drop_that_is_no_number_is_none_that_is_allowed() -> None:
    noise = dict.fromkeys(("a", "b"), 1e-6)
    found, _ = run(noise, {"a": math.nan, "b": 0.0})
    assert found.assignment["a"] == "float"
