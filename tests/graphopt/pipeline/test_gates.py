"""Gates and the warnings that stand in for them: measured, undone, and never silently passed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import pytest
from manager_passes import DropIdentity, Grow, Noise, feeds, small_model

from graphopt import calibration, optimize, registry
from graphopt.backend import BenchResult
from graphopt.base import Context, Pass
from graphopt.errors import MissingBackendError, UsageError
from graphopt.manager import PassManager
from graphopt.pipeline.gates import DropGate, LatencyGate, Regressions, parse_bound
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.measure import Measures
from graphopt.progress import Silent
from graphopt.report.data import Latency, PassRecord
from graphopt.target import Target

TARGET = Target(name="board", backend="fake")


class FakeBackend:
    """A clock that reads what the test says: the time of a model with n nodes and weights of so many bytes."""

    name = "fake"

    def __init__(
        self, ratios: Sequence[float], *, spread: float | Sequence[float] = 0.01, missing: str | None = None
    ) -> None:
        self.ratios = list(ratios)
        self.spreads = [spread] * len(ratios) if isinstance(spread, (int, float)) else list(spread)
        self.missing = missing
        self.seconds: list[float] = []

    def unavailable(self, target: Target) -> str | None:
        return self.missing

    def bench(
        self, models: Sequence[Any], target: Target, feeds: Any = None, *, threads: int = 1, seconds: float = 2.0
    ) -> BenchResult:
        self.seconds.append(seconds)
        ratio, spread = self.ratios.pop(0), self.spreads.pop(0)
        low, high = ratio - spread, ratio + spread
        return BenchResult((2.0, 2.0 * ratio), (1.0, ratio), (1.0, low), (1.0, high), rounds=100, threads=threads)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        raise MissingBackendError("a fake")

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        raise MissingBackendError("a fake")


class FakeEvaluation:
    """Scores the model by the sum of its weights, so that disturbed weights score worse or better."""

    def __init__(self, metric: str = "score", higher_is_better: bool = True) -> None:
        self.metric, self.higher_is_better, self.name = metric, higher_is_better, "fake"
        self.calls = 0

    def score(self, model: Any) -> float:
        self.calls += 1
        return float(model.graph.initializers["w"].const_value.numpy().sum())


def fake(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> FakeBackend:
    monkeypatch.setattr(registry, "backend", lambda name: backend)
    return backend


def run(
    passes: Sequence[Pass],
    gates: Any,
    *,
    data: Any = None,
    evaluation: Any = None,
) -> tuple[list[PassRecord], ir.Model, ir.Model, Measures]:
    model = small_model()
    loaded = None if data is None else calibration.load(data, model)
    ctx = Context(TARGET, loaded, evaluation, 3, 1, Silent())
    measures = Measures(model, ctx)
    made: list[Instrument] = gates(measures)
    manager = PassManager(passes, made)
    result = manager.run(model, ctx)
    return manager.records, model, result, measures


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.01", 0.01), ("1%", 0.01), (" 1.5 % ".replace(" %", "%"), 0.015), ("1e-3", 1e-3), ("inf", math.inf),
        ("0", 0.0), (".5", 0.5), (0.2, 0.2), (1, 1.0), (None, None),
    ],
)  # fmt: skip
def test_bounds(text: Any, value: float | None) -> None:
    assert parse_bound(text, "--max-drop") == pytest.approx(value)


def test_no_model_takes_no_time() -> None:
    with pytest.raises(UsageError, match="max-latency: no model takes 0x the time"):
        parse_bound("0", "max-latency", positive=True)
    assert parse_bound("0", "max-drop") == 0


@pytest.mark.parametrize("text", ["", "x", "-1", "1 2", "%", "nan", "1%%", -0.5, math.nan, True, [1]])
def test_wrong_bounds(text: Any) -> None:
    with pytest.raises(UsageError, match="--max-drop"):
        parse_bound(text, "--max-drop")


# --- drop -------------------------------------------------------------------------------------------------------------


def test_a_drop_of_fidelity_undoes_the_pass() -> None:
    records, model, result, _ = run([Noise(0.9), Noise(1e-4)], lambda m: [DropGate(1e-3, m)], data=feeds())
    assert [r.status for r in records] == ["undone", "applied"]
    (gate,) = records[0].gates
    assert gate.gate == "max-drop" and gate.passed is False
    assert gate.value is not None and gate.value > 1e-3
    assert records[0].reason == gate.detail and "output fidelity" in gate.detail
    assert records[1].gates[0].passed is True
    assert result is not model


def test_passes_know_the_gates_and_measure_a_drop_as_they_do() -> None:
    seen: dict[str, Any] = {}

    @dataclass(frozen=True)
    class Looks(Noise):
        """Notes what the gate would say of its result."""

        def run(self, model: ir.Model, ctx: Context) -> Any:
            result = super().run(model, ctx)
            assert ctx.drop is not None
            seen.update(drop=ctx.drop(model), max_drop=ctx.max_drop, max_latency=ctx.max_latency)
            return result

    model = small_model()
    report = optimize(model, [Looks(0.1)], calib=feeds(), max_drop="90%", max_latency="inf", bench=False).report
    (gate,) = (g for g in report.passes[0].gates if g.gate == "max-drop")
    assert seen == {"drop": gate.value, "max_drop": 0.9, "max_latency": math.inf}
    assert gate.value is not None and gate.value > 1e-4
    assert Measures(model, Context(TARGET, None, None, 0, 1, Silent())).drop(model) is None


def test_the_drop_is_against_the_input_model_not_the_pass_before() -> None:
    class Worse(Noise):
        """The score falls by a hundredth each time."""

        def run(self, model: ir.Model, ctx: Context) -> Any:
            from manager_passes import PassResult, scale

            scale(model, "w", 0.99)
            return PassResult(changed=True)

    records, _, _, measures = run([Worse()] * 4, lambda m: [DropGate(0.25, m)], evaluation=FakeEvaluation())
    # The weights sum to 11: two steps lose 0.22, a third would lose 0.33.
    assert [r.status for r in records] == ["applied", "applied", "undone", "undone"]
    assert measures.baseline() == pytest.approx(11.0)
    assert records[1].gates[0].value == pytest.approx(11 * (1 - 0.99**2), rel=1e-3)
    assert "score 10.78" in records[1].gates[0].detail


def test_errors_are_judged_relative_to_the_input_model() -> None:
    evaluation = FakeEvaluation("mse", higher_is_better=False)

    class Up(Noise):
        def run(self, model: ir.Model, ctx: Context) -> Any:
            from manager_passes import PassResult, scale

            scale(model, "w", 1.05)
            return PassResult(changed=True)

    records, *_ = run([Up()], lambda m: [DropGate(0.06, m)], evaluation=evaluation)
    assert records[0].gates[0].value == pytest.approx(0.05, rel=1e-3)
    assert records[0].status == "applied"


def test_exact_passes_are_not_measured_for_drop() -> None:
    evaluation = FakeEvaluation()
    records, *_ = run([DropIdentity()], lambda m: [DropGate(0.0, m)], evaluation=evaluation)
    assert records[0].status == "applied" and records[0].gates == [] and evaluation.calls == 0


def test_without_data_the_drop_gate_says_that_it_cannot_decide() -> None:
    records, *_ = run([Noise(0.9)], lambda m: [DropGate(0.01, m)])
    assert records[0].status == "applied"
    assert records[0].gates[0].passed is None and records[0].gates[0].value is None
    assert any(n.startswith("warning: the max-drop gate did not decide") for n in records[0].notes)


def test_an_infinite_bound_lets_everything_pass() -> None:
    records, *_ = run([Noise(0.9)], lambda m: [DropGate(math.inf, m), LatencyGate(math.inf, m)], data=feeds())
    assert records[0].status == "applied" and [g.passed for g in records[0].gates] == [True, True]


# --- latency ----------------------------------------------------------------------------------------------------------


def latency(monkeypatch: pytest.MonkeyPatch, limit: float, ratios: Sequence[float], count: int, **kw: Any) -> Any:
    backend = fake(monkeypatch, FakeBackend(ratios, **kw))
    records, model, result, _ = run([Noise(0.01 * (i + 1)) for i in range(count)], lambda m: [LatencyGate(limit, m)])
    assert not backend.ratios, "the test planned more measurements than were made"
    return records, model, result, backend


def test_a_slower_model_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    records, *_ = latency(monkeypatch, 1.0, [1.2, 0.8], 2)
    assert [r.status for r in records] == ["undone", "applied"]
    assert "1.200x the time of the input model, above 1x" in (records[0].reason or "")


def test_noise_above_the_bound_is_measured_again_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    records, _, _, backend = latency(monkeypatch, 1.0, [1.05, 0.99], 1, spread=0.2)
    assert records[0].status == "applied"
    assert backend.seconds[1] == 4 * backend.seconds[0]
    assert records[0].gates[0].value == 0.99


def test_what_a_longer_measurement_shows_to_be_slower_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    records, *_ = latency(monkeypatch, 1.0, [1.05, 1.05], 1, spread=[0.2, 0.02])
    assert records[0].status == "undone"


def test_noise_is_not_held_against_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 95 % interval of the median holds the bound after the longer measurement too."""
    records, *_ = latency(monkeypatch, 1.0, [1.05, 1.05], 1, spread=0.2)
    assert records[0].status == "applied" and records[0].gates[0].passed is True
    assert "1.050x the time of the input model, not measurably above 1x" in records[0].gates[0].detail


@pytest.mark.parametrize(
    ("limit", "ratio", "status"),
    [(1.0, 1.001, "applied"), (1.0, 1.019, "applied"), (1.0, 1.03, "undone"), (1.5, 1.51, "undone")],
)
def test_two_per_cent_count_as_equal_where_the_bound_is_no_slower(
    monkeypatch: pytest.MonkeyPatch, limit: float, ratio: float, status: str
) -> None:
    """However well the ratio is known; a single measurement decides."""
    records, *_ = latency(monkeypatch, limit, [ratio], 1, spread=1e-4)
    assert records[0].status == status


def test_steps_towards_a_demand_do_not_add_up_to_a_slower_model(monkeypatch: pytest.MonkeyPatch) -> None:
    records, *_ = latency(monkeypatch, 0.5, [1.019, 1.03], 2, spread=1e-4)
    assert [r.status for r in records] == ["applied", "undone"]


def test_a_demand_below_one_may_be_met_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.9 is not 0.5 yet, but progress; 0.95 is a step back; 0.45 is there.
    records, *_ = latency(monkeypatch, 0.5, [0.9, 0.95, 0.45], 3)
    assert [r.status for r in records] == ["applied", "undone", "applied"]


def test_where_the_target_cannot_run_the_gate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    records, *_ = latency(monkeypatch, 1.0, [], 1, missing="no such board")
    assert records[0].status == "applied"
    assert records[0].gates[0].passed is None
    (note,) = [n for n in records[0].notes if n.startswith("warning: ")]
    assert "the max-latency gate did not decide" in note and "'board' cannot run here: no such board" in note


def test_the_interval_of_a_ratio() -> None:
    assert Latency(1.1, 1.0, 1.2, rounds=100).certain_low == pytest.approx(1.1 - 1.57 * 0.2 / 10)
    assert Latency(None).certain_low is None
    assert Latency(1.1).certain_low == 1.1


# --- no gate, but a warning -------------------------------------------------------------------------------------------


def warnings(records: list[PassRecord]) -> list[str]:
    return [n for r in records for n in r.notes if n.startswith("warning: ")]


def test_a_lossy_pass_without_gates_that_makes_things_worse_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FakeBackend([1.3, 1.0]))
    records, *_ = run([Noise(0.9), Grow()], lambda m: [Regressions(m, drop=True, latency=True)], data=feeds())
    assert [r.status for r in records] == ["applied", "applied"]
    first, second = warnings(records[:1]), warnings(records[1:])
    assert any("mean cosine of 0.9" in w for w in first)
    assert any("noise made the model slower: 1.30x" in w for w in first)
    assert any("grow made the weights larger: 60 -> 1084 bytes" in w for w in second)
    assert not any("slower" in w for w in second)


def test_a_slower_model_is_told_with_what_the_pass_advises(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FakeBackend([1.3]))

    class Advising(Noise):
        def if_slower(self) -> str:
            return "make less of it"

    records, *_ = run([Advising(0.01)], lambda m: [Regressions(m, drop=True, latency=True)], data=feeds())
    (told,) = (w for w in warnings(records) if "slower" in w)
    assert told.endswith("no gate was set (--max-latency 1); make less of it")


def test_where_noise_hides_that_a_model_is_slower_it_is_timed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend([1.2, 1.2, 1.2, 1.0], spread=[2.0, 0.01, 2.0, 2.0])
    fake(monkeypatch, backend)
    slower, *_ = run([Noise(0.01)], lambda m: [Regressions(m, drop=True, latency=True)], data=feeds())
    assert any("slower: 1.20x" in w for w in warnings(slower))
    unclear, *_ = run([Noise(0.01)], lambda m: [Regressions(m, drop=True, latency=True)], data=feeds())
    assert not any("slower" in w for w in warnings(unclear))
    assert backend.seconds[1] == 4 * backend.seconds[0]


def test_a_lower_score_without_a_gate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FakeBackend([0.9]))

    class Half(Noise):
        def run(self, model: ir.Model, ctx: Context) -> Any:
            from manager_passes import PassResult, scale

            scale(model, "w", 0.5)
            return PassResult(changed=True)

    gates = lambda m: [Regressions(m, drop=True, latency=True)]  # noqa: E731
    records, *_ = run([Half()], gates, evaluation=FakeEvaluation())
    assert warnings(records) == [
        "warning: score is 5.5 after noise, 11 before the pipeline; no gate was set (--max-drop 1%)"
    ]


def test_harmless_passes_are_not_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FakeBackend([0.9]))
    gates = lambda m: [Regressions(m, drop=True, latency=True)]  # noqa: E731
    records, *_ = run([DropIdentity(), Noise(1e-4)], gates, data=feeds())
    assert [r.status for r in records] == ["applied", "applied"]
    assert warnings(records) == []
