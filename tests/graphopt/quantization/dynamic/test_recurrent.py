"""LSTM as DynamicQuantizeLSTM: close to the float layer in all its forms, and reasons where there is no such form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.executor import Session
from graphopt.quantization.dynamic.scheme import dynamic_layers, write_dynamic
from graphopt.quantization.rounding.interface import Rounded, WeightGrid, nearest
from graphopt.rewriting.scopes import graphs
from graphopt.target import QuantScheme

RNG = np.random.default_rng(0)
HIDDEN, INPUTS = 16, 12


def uniform(*shape: int) -> np.ndarray:
    return RNG.uniform(-0.5, 0.5, size=shape).astype(np.float32)


def lstm(
    *, directions: int = 1, extra: str = "", attributes: str = "", outputs: str = "y, h, c", **given: Any
) -> ir.Model:
    """An LSTM of 12 inputs and 16 states; `extra` are its inputs after the recurrence weight."""
    direction = ', direction="bidirectional"' if directions == 2 else ""
    return graph(
        f"(float[t,n,{INPUTS}] x) => (float[t,{directions},n,{HIDDEN}] y)",
        f"{outputs} = LSTM<hidden_size={HIDDEN}{direction}{attributes}>(x, w, r{extra})",
        w=uniform(directions, 4 * HIDDEN, INPUTS), r=uniform(directions, 4 * HIDDEN, HIDDEN), **given,
    )  # fmt: skip


def distance(model: ir.Model, per_channel: bool = True, **more: Any) -> float:
    """How far the output y is after quantisation, relative to it."""
    feeds = {"x": uniform(7, 3, INPUTS), **more}
    before = Session(model).run(feeds)["y"]
    keys, _ = dynamic_layers(model)
    assert list(keys) == ["y"]
    assert write_dynamic(model, keys, per_channel=per_channel) == []
    assert [n.op_type for n in model.graph] == ["DynamicQuantizeLSTM"]
    after = Session(model, optimize=True).run(feeds)["y"]
    assert after.shape == before.shape
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"directions": 2},
    "reverse": {"attributes": ', direction="reverse"'},
    "bias": {"extra": ", b", "b": (1, 8 * HIDDEN)},
    "lengths": {"extra": ", b, l", "b": (1, 8 * HIDDEN), "l": np.array([7, 4, 2], np.int32)},
    "states": {"extra": ", , , h0, c0", "h0": (1, 3, HIDDEN), "c0": (1, 3, HIDDEN)},
    "peepholes": {"extra": ", , , , , p", "p": (1, 3 * HIDDEN)},
    "activations": {"attributes": ', activations=["Sigmoid", "Tanh", "Relu"], clip=0.4, input_forget=1'},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_form_is_close_to_float(form: str, per_channel: bool) -> None:
    assert 1e-5 < distance(lstm(**FORMS[form]), per_channel) < 0.03


def test_gates_in_another_order_would_be_far_away() -> None:
    model = lstm()
    feeds = {"x": uniform(7, 3, INPUTS)}
    before = Session(model).run(feeds)["y"]
    write_dynamic(model, ["y"])
    stored = model.graph.initializers["w_quantized"]
    data = stored.const_value.numpy()  # type: ignore[union-attr]
    stored.const_value = ir.tensor(np.roll(data, HIDDEN, axis=2), name="w_quantized")
    assert np.linalg.norm(Session(model).run(feeds)["y"] - before) / np.linalg.norm(before) > 0.1


def test_golden() -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def rounding(key: str, weight: Any, grid: WeightGrid, least_scale: Any = 0.0) -> Rounded:
        asked.append((key, weight.shape))
        return nearest(key, weight, grid, least_scale)

    model = lstm(directions=2, outputs="y")
    write_dynamic(model, ["y"], rounding)
    assert asked == [("y.W", (2, 64, 12)), ("y.R", (2, 64, 16))]
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "DynamicQuantizeLSTM")
    assert [v.name if v else "" for v in node.inputs] == [
        "x", "w_quantized", "r_quantized", "", "", "", "", "", "w_scale", "w_zero_point", "r_scale", "r_zero_point"
    ]  # fmt: skip
    shapes = {name: tuple(v.const_value.shape) for name, v in model.graph.initializers.items() if v.const_value}
    assert shapes["w_quantized"] == (2, INPUTS, 4 * HIDDEN)
    assert shapes["w_scale"] == shapes["w_zero_point"] == (2, 4 * HIDDEN)
    assert model.graph.opset_imports["com.microsoft"] == 1


def test_layers_in_branches_share_a_weight_of_the_main_graph() -> None:
    body = f"LSTM<hidden_size={HIDDEN}>(x, w, r)"
    model = graph(
        f"(bool a, float[t,n,{INPUTS}] x) => (float[t,1,n,{HIDDEN}] y)",
        f"y = If (a) <then_branch = one () => (float[t,1,n,{HIDDEN}] p) {{ p = {body} }}, "
        f"else_branch = two () => (float[t,1,n,{HIDDEN}] q) {{ u, v = {body} q = Neg(u) }}>",
        w=uniform(1, 4 * HIDDEN, INPUTS), r=uniform(1, 4 * HIDDEN, HIDDEN),
    )  # fmt: skip
    x = uniform(5, 2, INPUTS)
    feeds = [{"a": np.array(a), "x": x} for a in (True, False)]
    before = [Session(model).run(f)["y"] for f in feeds]
    keys, _ = dynamic_layers(model)
    assert sorted(keys) == ["p", "u"]
    assert write_dynamic(model, keys) == []
    assert [n.op_type for g in list(graphs(model))[1:] for n in g] == ["DynamicQuantizeLSTM"] * 2 + ["Neg"]
    assert len(model.graph.initializers) == 6
    for f, want in zip(feeds, before, strict=True):
        assert np.abs(Session(model, optimize=True).run(f)["y"] - want).max() < 0.02


def test_weights_in_constant_nodes_and_an_absent_first_output() -> None:
    model = graph(
        f"(float[t,n,{INPUTS}] x) => (float[1,n,{HIDDEN}] h)", f", h = LSTM<hidden_size={HIDDEN}>(x, w, r)",
        w=uniform(1, 4 * HIDDEN, INPUTS), r=uniform(1, 4 * HIDDEN, HIDDEN),
    )  # fmt: skip
    node = next(iter(model.graph))
    for index, name in ((1, "w"), (2, "r")):
        tensor = model.graph.initializers.pop(name).const_value
        held = ir.node("Constant", [], {"value": tensor})
        held.outputs[0].name = name
        model.graph.insert_before(node, held)
        node.replace_input_with(index, held.outputs[0])
    feeds = {"x": uniform(5, 2, INPUTS)}
    before = Session(model).run(feeds)["h"]
    keys, _ = dynamic_layers(model)
    assert list(keys) == ["h"]
    write_dynamic(model, keys)
    assert [n.op_type for n in model.graph] == ["DynamicQuantizeLSTM"]
    assert np.abs(Session(model).run(feeds)["h"] - before).max() < 0.02


def test_reasons() -> None:
    computed = graph(
        f"(float[t,n,{INPUTS}] x, float[1,{4 * HIDDEN},{INPUTS}] w) => (float[t,1,n,{HIDDEN}] y)",
        f"y = LSTM<hidden_size={HIDDEN}>(x, w, r)", r=uniform(1, 4 * HIDDEN, HIDDEN),
    )  # fmt: skip
    assert dynamic_layers(computed)[1][0].reason == "its weight is computed: fold first"
    assert "layout=1" in dynamic_layers(lstm(attributes=", layout=1"))[1][0].reason
    assert "no kernel for LSTM" in dynamic_layers(lstm(), scheme=QuantScheme(dynamic=("MatMul",)))[1][0].reason
    broken = lstm()
    broken.graph.initializers["r"].const_value = ir.tensor(np.full((1, 64, 16), np.nan, np.float32), name="r")
    assert dynamic_layers(broken)[1][0].reason == "its recurrence weight holds inf or nan"
