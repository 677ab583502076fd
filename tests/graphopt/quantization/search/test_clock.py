"""Shapes of the data that stand for it, and ratios of whole models from what a backend measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from text_graph import graph

from graphopt import calibration, registry
from graphopt.backend import BenchResult
from graphopt.errors import UsageError
from graphopt.quantization.search import clock
from graphopt.quantization.search.clock import TOGETHER, comparer, described, shapes
from graphopt.target import Target


def product() -> Any:
    return graph("(float[N, T, 4] x) => (float[N, T, 3] y)", "y = MatMul (x, w)", w=(4, 3))


def data(lengths: Sequence[int], rows: int = 1) -> calibration.Calibration:
    return calibration.load([{"x": np.ones((rows, n, 4), np.float32)} for n in lengths], product())


def test_a_short_and_a_long_sample_where_they_differ() -> None:
    short, long = shapes(data([*range(10, 110), 100000, 1]))
    assert 10 <= short["x"].shape[1] <= 20 and 100 <= long["x"].shape[1] < 110
    assert described(long) == f"x [1,{long['x'].shape[1]},4]"


def test_calls_of_as_many_samples_as_are_asked_for() -> None:
    held = calibration.load({"x": np.ones((40, 5, 4), np.float32)}, product())
    (call,) = shapes(held, 16)
    assert call["x"].shape == (16, 5, 4)
    with pytest.raises(UsageError, match="no call of the calibration data holds 41 samples"):
        shapes(held, 41)
    with pytest.raises(UsageError, match="holds 16 samples"):
        shapes(data([4, 40]), 16)


def test_one_sample_where_all_are_alike() -> None:
    (only,) = shapes(data([40, 44, 50], rows=8))
    assert only["x"].shape == (1, 44, 4)


class FakeBackend:
    """Times are what is noted on the models."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def bench(self, models: Any, target: Any, feeds: Any, *, threads: int, seconds: float) -> BenchResult:
        assert threads == 1 and seconds == pytest.approx(0.1 * len(models))
        self.calls.append((len(models), feeds["x"].shape))
        ratios = tuple(m / models[0] for m in models)
        return BenchResult(ratios, ratios, tuple(r - 0.02 for r in ratios), tuple(r + 0.02 for r in ratios), 100, 1)


def test_many_mixtures_are_timed_in_parts_beside_the_same_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, told = FakeBackend(), []
    monkeypatch.setattr(registry, "backend", lambda name: backend)
    monkeypatch.setattr(clock, "weight_bytes", lambda model: 1 << 20)
    times = {"float": 2.0, "int8": 1.0}
    compare = comparer(
        lambda mixture: times[mixture["a"]],  # type: ignore[arg-type,return-value]
        Target("board", "fake"), shapes(data([4, 40])), told.append,
    )  # fmt: skip
    found = compare({"a": "float"}, [{"a": "int8"}] * (TOGETHER + 1))
    assert [count for count, _ in backend.calls] == [TOGETHER + 1] * 2 + [2] * 2
    assert {shape for _, shape in backend.calls} == {(1, 4, 4), (1, 40, 4)}
    assert len(found) == TOGETHER + 1 and told == [TOGETHER, TOGETHER + 1]
    assert found[0].values == (0.5, 0.5)
    # 1.57 IQR / sqrt(rounds) on either side
    assert found[0].highs[0] == pytest.approx(0.5 + 1.57 * 0.04 / 10)
    assert found[0].lows[0] == pytest.approx(0.5 - 1.57 * 0.04 / 10)


def test_of_large_models_fewer_are_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    monkeypatch.setattr(registry, "backend", lambda name: backend)
    monkeypatch.setattr(clock, "weight_bytes", lambda model: clock.MEMORY // 3)
    compare = comparer(lambda mixture: 1.0, Target("board", "fake"), shapes(data([4])), lambda count: None)  # type: ignore[arg-type,return-value]
    assert len(compare({}, [{}] * 5)) == 5
    assert [count for count, _ in backend.calls] == [3, 3, 2]
