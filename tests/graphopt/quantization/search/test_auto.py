"""scheme=auto with a clock that the test makes up: what is chosen, refused, repaired and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import calibration, registry
from graphopt.backend import BenchResult
from graphopt.base import Context, PassResult
from graphopt.errors import UsageError
from graphopt.executor import Session
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.quantization.search.auto import quantise_auto
from graphopt.quantization.static.scheme import StaticOptions
from graphopt.spec import parse
from graphopt.target import Target

TARGET = Target("cpu", "ort")
PLAIN = StaticOptions()
RNG = np.random.default_rng(0)


def has_scaled_weight(node: ir.Node) -> bool:
    producer = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


class Clock:
    """A backend whose times follow from the operators: a layer costs what its operator does, in float or behind scales.

    Args:
        costs: of one node, by operator type; `Conv int8` is one whose weight has scales.
        here: why models cannot run here.
    """

    name = "clock"

    def __init__(self, costs: dict[str, float], *, here: str | None = None) -> None:
        self.costs, self.here, self.benched = costs, here, 0

    def unavailable(self, target: Target) -> str | None:
        return self.here

    def bench(
        self, models: Sequence[ir.Model], target: Target, feeds: Any, *, threads: int, seconds: float
    ) -> BenchResult:
        assert self.here is None
        self.benched += 1
        times = [self._time(model) for model in models]
        ratios = tuple(t / times[0] for t in times)
        return BenchResult(
            tuple(times), ratios, tuple(r * 0.999 for r in ratios), tuple(r * 1.001 for r in ratios), 40, 1
        )

    def _time(self, model: ir.Model) -> float:
        return 1.0 + sum(self._cost(node) for node in model.graph)

    def _cost(self, node: ir.Node) -> float:
        kind = f"{node.op_type} int8" if has_scaled_weight(node) else node.op_type
        return self.costs.get(kind, self.costs.get(node.op_type, 0.0))


def cnn() -> ir.Model:
    weights = {"w1": RNG.normal(size=(8, 3, 3, 3)) / 5, "w2": RNG.normal(size=(8, 8, 3, 3)) / 8}
    weights |= {"w3": RNG.normal(size=(1152, 64)) / 33, "depthwise": RNG.normal(size=(8, 1, 3, 3)) / 3}
    return graph(
        "(float[N, 3, 12, 12] x) => (float[N, 64] y)",
        """c1 = Conv <pads = [1, 1, 1, 1]> (x, w1)
        r1 = Relu (c1)
        d = Conv <group = 8, pads = [1, 1, 1, 1]> (r1, depthwise)
        r2 = Relu (d)
        c2 = Conv <pads = [1, 1, 1, 1]> (r2, w2)
        r3 = Relu (c2)
        f = Flatten (r3)
        y = MatMul (f, w3)""",
        **{name: w.astype(np.float32) for name, w in weights.items()},
    )


def mlp() -> ir.Model:
    weights = {"w1": RNG.normal(size=(32, 64)) / 6, "w2": RNG.normal(size=(64, 16)) / 8}
    return graph(
        "(float[N, 32] x) => (float[N, 16] y)", "h = MatMul (x, w1)  r = Relu (h)  y = MatMul (r, w2)",
        **{name: w.astype(np.float32) for name, w in weights.items()},
    )  # fmt: skip


def quantised(
    model: ir.Model, clock: Clock, monkeypatch: pytest.MonkeyPatch, *,
    given: Sequence[str] = (), target: Target = TARGET, options: StaticOptions = PLAIN, **context: Any,
) -> PassResult:  # fmt: skip
    monkeypatch.setattr(registry, "backend", lambda name: clock)
    shape = [v if isinstance(v, int) else 48 for v in model.graph.inputs[0].shape]
    data = calibration.load({"x": RNG.normal(size=shape).astype(np.float32)}, model)
    ctx = replace(Context(target, data, None, 0, 1, Silent()), **context)
    return quantise_auto(model, ctx, options, given)


def run(model: ir.Model) -> np.ndarray[Any, Any]:
    shape = [v if isinstance(v, int) else 4 for v in model.graph.inputs[0].shape]
    x = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    return next(iter(Session(model, optimize=True).run({"x": x}).values()))


def scaled(model: ir.Model, op: str) -> list[bool]:
    """For each node of a type: whether it has integers for a weight."""
    return [has_scaled_weight(node) for node in model.graph if node.op_type == op]


FAST_INTEGERS = {"Conv": 10, "Conv int8": 3, "MatMul": 10, "MatMul int8": 4, "MatMulInteger": 3, "QuantizeLinear": 0.1}


def test_convolutions_static_and_products_dynamic_where_that_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cnn()
    before = run(model)
    result = quantised(model, Clock(FAST_INTEGERS), monkeypatch)
    assert result.changed
    assert scaled(model, "Conv") == [True] * 3
    assert [n.op_type for n in model.graph if "MatMul" in n.op_type] == ["MatMulInteger"]
    np.testing.assert_allclose(run(model), before, atol=0.1)
    rows = {(r["class"], r["format"]): r for r in result.details["formats by class"]}
    assert rows["Conv 3x3, up to 4k weights", "int8"]["chosen for"] == 2
    assert rows["MatMul, 64k to 1M weights", "int8-dynamic"]["chosen for"] == 1
    assert any("of the time of the model before the pass, on x [1,3,12,12]" in note for note in result.notes)


def test_operators_between_int8_layers_follow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph(
        "(float[N, 8, 12, 12] x) => (float[N, 8, 12, 12] y)",
        """a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        b = Conv <pads = [1, 1, 1, 1]> (a, w2)
        s = Add (a, b)
        y = Conv <pads = [1, 1, 1, 1]> (s, w3)""",
        **{f"w{i}": (RNG.normal(size=(8, 8, 3, 3)) / 8).astype(np.float32) for i in (1, 2, 3)},
    )
    result = quantised(model, Clock(FAST_INTEGERS), monkeypatch)
    assert scaled(model, "Conv") == [True] * 3
    assert any("'op:Add=int8'" in note for note in result.notes)
    add = next(node for node in model.graph if node.op_type == "Add")
    assert {value.producer().op_type for value in add.inputs} == {"DequantizeLinear"}  # type: ignore[union-attr]


def test_a_class_that_integers_slow_down_stays_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    class Depthwise(Clock):
        def _cost(self, node: ir.Node) -> float:
            slow = node.op_type == "Conv" and node.attributes.get_int("group", 1) > 1 and super()._cost(node) == 3
            return 40.0 if slow else super()._cost(node)

    model = cnn()
    result = quantised(model, Depthwise(FAST_INTEGERS), monkeypatch)
    assert result.changed and scaled(model, "Conv") == [True, False, True]


def test_a_model_that_every_format_slows_down_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = str(model.graph)
    clock = Clock({"MatMul": 2, "MatMul int8": 3, "MatMulInteger": 5, "MatMulNBits": 5, "QuantizeLinear": 1})
    result = quantised(model, clock, monkeypatch)
    assert not result.changed and str(model.graph) == before
    (note,) = (n for n in result.notes if "stays in float" in n)
    assert "int8 1." in note and "int8-dynamic 2.20" in note and "on x [1,32]" in note


def test_what_no_layer_may_lose_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    result = quantised(
        model, Clock(FAST_INTEGERS), monkeypatch, max_drop=0.0, drop=lambda m: 1e-9 if len(m.graph) > 3 else 0.0
    )
    assert not result.changed
    assert any("a drop of more than 0 whatever goes back to float" in n for n in result.notes)


def test_gains_that_the_last_comparison_does_not_confirm_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search sees a fast model, but against the input of the pass it is slower."""

    class Fickle(Clock):
        def _time(self, model: ir.Model) -> float:
            return 0.5 if model is source else super()._time(model)

    source = mlp()
    result = quantised(source, Fickle(FAST_INTEGERS), monkeypatch)
    assert not result.changed
    assert any("with 0 in float for accuracy: " in n and "not shown to be faster" in n for n in result.notes)


def unequal() -> ir.Model:
    """Two convolutions; the channels between them have unlike ranges."""
    spread = np.exp2(np.arange(8) * 1.5)
    first, second = RNG.normal(size=(8, 3, 3, 3)) / 5, RNG.normal(size=(8, 8, 3, 3)) / 8
    return graph(
        "(float[N, 3, 12, 12] x) => (float[N, 8, 12, 12] y)",
        """c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        r = Relu (c)
        y = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)""",
        w1=(first * spread[:, None, None, None]).astype(np.float32),
        w2=(second / spread[:, None, None]).astype(np.float32),
        b1=np.zeros(8, np.float32), b2=np.zeros(8, np.float32),
    )  # fmt: skip


def signal_to_noise(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(np.sum(before**2) / np.sum((after - before) ** 2)))


def test_int8_layers_are_equalised_where_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unequal()
    plain, before = model.clone(), run(model)
    options = StaticOptions(prepare="auto", sensitive="none")
    result = quantised(model, Clock(FAST_INTEGERS), monkeypatch, options=options, max_drop=1.0)
    assert any(note.startswith("equalize before") for note in result.notes), result.notes
    quantised(plain, Clock(FAST_INTEGERS), monkeypatch, options=replace(options, prepare="none"), max_drop=1.0)
    assert scaled(model, "Conv") == [True, True] and signal_to_noise(before, run(model)) > 30
    assert scaled(plain, "Conv") == [False, False], "int8 as it is ruins this model"
    again = unequal()
    (note,) = (n for n in result.notes if "the same again" in n)
    (repeated,) = parse(note.partition("the same again: ")[2])
    told = quantised(again, Clock({}), monkeypatch, options=options, given=repeated.assignment)  # type: ignore[attr-defined]
    assert any(note.startswith("equalize before") for note in told.notes), told.notes


def test_biases_are_corrected_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    result = quantised(
        unequal(), Clock(FAST_INTEGERS), monkeypatch, options=StaticOptions(prepare="auto", correct_bias=True)
    )
    assert any("bias" in note for note in result.notes)
    assert not any("bias" in note for note in quantised(unequal(), Clock(FAST_INTEGERS), monkeypatch).notes)


def test_a_choice_is_repeated_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cnn()
    second = first.clone()
    told = quantised(first, Clock(FAST_INTEGERS), monkeypatch)
    (note,) = (n for n in told.notes if "the same again" in n)
    clock = Clock({})
    (again,) = parse(note.partition("the same again: ")[2])
    assert isinstance(again, Quantize) and again.scheme == "auto"
    result = quantised(second, clock, monkeypatch, given=again.assignment)
    assert result.changed and clock.benched == 0
    assert [n.op_type for n in second.graph] == [n.op_type for n in first.graph]


def test_an_entry_that_fits_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="fits no layer"):
        quantised(mlp(), Clock({}), monkeypatch, given=["op:LSTM=int8"])


def test_a_target_that_cannot_run_here_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    clock = Clock({}, here="no such device")
    result = quantised(model, clock, monkeypatch)
    assert result.changed and clock.benched == 0 and scaled(model, "MatMul") == [True, True]
    assert any("nothing was timed, because target 'cpu' cannot run here (no such device)" in n for n in result.notes)


def test_a_target_of_floats_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    result = quantised(mlp(), Clock({}), monkeypatch, target=Target("fp", "ort", quant=None))
    assert not result.changed and "computes in floating point only" in result.notes[0]


def test_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "y = Softmax (x)")
    clock = Clock({})
    result = quantised(model, clock, monkeypatch)
    assert not result.changed and clock.benched == 0
    assert result.notes == ["no layer has another format on the target"]


@pytest.mark.parametrize("make", [cnn, mlp])
def test_on_this_machine_nothing_gets_slower_unseen(make: Any) -> None:
    """With the real clock: whatever is chosen, the outputs stay close, and a model left alone says why."""
    model = make()
    before = run(model)
    shape = [v if isinstance(v, int) else 16 for v in model.graph.inputs[0].shape]
    data = calibration.load({"x": RNG.normal(size=shape).astype(np.float32)}, model)
    result = quantise_auto(model, Context(TARGET, data, None, 0, 1, Silent()), StaticOptions())
    if not result.changed:
        assert any("stays in float" in n for n in result.notes)
    after = run(model)
    assert np.sum(before * after) / np.sqrt(np.sum(before**2) * np.sum(after**2)) > 0.99
