"""Hidden positions of recurrent operators are units, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import Coupling, analyse
from graphopt.base import Context
from graphopt.model import fix_dims
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.target import Target
from graphopt.verify import compare, random_feeds

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def tagger(op: str, directions: int, hidden: int = 6, extra: str = "", **attributes: str) -> ir.Model:
    """Embedding-like projection -> recurrent layer -> classifier on every step."""
    gates = GATES[op]
    direction = "bidirectional" if directions == 2 else "forward"
    body = f"""p = MatMul(x, wp)
        r, last = {op}<hidden_size={hidden}, direction="{direction}"{extra}>(p, w, rec, b)
        t = Transpose<perm=[0, 2, 1, 3]>(r)  f = Reshape(t, shape)  y = MatMul(f, wo)"""
    return graph(
        "(float[5,n,3] x) => (float[5,n,2] y)",
        body,
        wp=(3, 4),
        w=(directions, gates * hidden, 4),
        rec=(directions, gates * hidden, hidden),
        b=(directions, 2 * gates * hidden),
        shape=np.array([5, -1, directions * hidden]),
        wo=(directions * hidden, 2),
    )


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("directions", [1, 2])
def test_hidden_positions_and_input_features_are_exact_units(op: str, directions: int) -> None:
    model = tagger(op, directions)
    coupling = analyse(model)
    assert len(coupling.units) == 4 + 6  # projected features; hidden positions, shared by the directions
    assert all(unit.exact for unit in coupling.units)
    certificate = certify(model, coupling, choose(coupling, 0.5, 3))
    assert certificate.holds
    assert certificate.control is not None
    assert certificate.control > 1e-3


def test_an_activation_that_does_not_map_zero_to_zero_is_approximate() -> None:
    coupling = analyse(tagger("LSTM", 1, extra=', activations=["Sigmoid", "Sigmoid", "Tanh"]'))
    hidden = [u for u in coupling.units if any(m.parameter == "rec" for m in u.members)]
    assert len(hidden) == 6
    assert not any(unit.exact for unit in hidden)


def test_a_state_that_is_a_graph_input_freezes_the_hidden_positions() -> None:
    model = graph(
        "(float[5,n,3] x, float[1,n,6] h0) => (float[5,1,n,6] y)",
        "y, last = GRU<hidden_size=6>(x, w, rec, b, '', h0)".replace("''", ""),
        w=(1, 18, 3),
        rec=(1, 18, 6),
        b=(1, 36),
    )
    coupling = analyse(model)
    assert not coupling.units
    assert any("initial state" in frozen.reason for frozen in coupling.frozen)


FEATURES = "(float[5,n,3] x) => (float[5,n,2] y)"


def layered(op: str, attributes: str, operands: str, seed: int = 0, **more: Any) -> ir.Model:
    """A recurrent layer on projected features; its operands behind W and R are given."""
    gates = GATES[op]
    body = f"""p = MatMul(x, wp)  r, last = {op}<hidden_size=6{attributes}>(p, w, rec{operands})
        t = Transpose<perm=[0, 2, 1, 3]>(r)  f = Reshape(t, shape)  y = MatMul(f, wo)"""
    weights = {"wp": (3, 4), "w": (1, gates * 6, 4), "rec": (1, gates * 6, 6), "wo": (6, 2)}
    return graph(FEATURES, body, seed=seed, shape=np.array([5, -1, 6]), **weights, **more)


def certified(model: ir.Model, units: int) -> Coupling:
    """The analysis of a model with that many units, all exact, proved on half of them."""
    coupling = analyse(model)
    assert len(coupling.units) == units
    assert all(unit.exact for unit in coupling.units)
    certificate = certify(model, coupling, choose(coupling, 0.5, 3))
    assert certificate.holds
    assert certificate.control is not None and certificate.control > 1e-3
    return coupling


def lengths() -> np.ndarray:
    """Steps by sample, for the batch of random feeds."""
    return np.array([5, 3], dtype=np.int32)


VARIANTS = {
    "peepholes": ("LSTM", "", ", b, , , , peep", {"b": (1, 48), "peep": (1, 18)}),
    "input and forget gate coupled": ("LSTM", ", input_forget=1", ", b, , , , peep", {"b": (1, 48), "peep": (1, 18)}),
    "clip": ("LSTM", ", clip=0.5", ", b", {"b": (1, 48)}),
    "clip of a GRU": ("GRU", ", clip=0.4", ", b", {"b": (1, 36)}),
    "linear before reset": ("GRU", ", linear_before_reset=1", ", b", {"b": (1, 36)}),
    "backwards": ("GRU", ', direction="reverse"', ", b", {"b": (1, 36)}),
    "no bias": ("RNN", "", "", {}),
    "activations": ("LSTM", ', activations=["HardSigmoid", "Softsign", "Relu"]', ", b", {"b": (1, 48)}),
    "activations of an RNN": ("RNN", ', activations=["LeakyRelu"], activation_alpha=[0.2]', ", b", {"b": (1, 12)}),
    "initial states": ("LSTM", "", ", b, , h0, c0", {"b": (1, 48), "h0": (1, 2, 6), "c0": (1, 2, 6)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_hold_their_certificates(variant: str) -> None:
    op, attributes, operands, more = VARIANTS[variant]
    model = layered(op, attributes, operands, **more)
    if "h0" in more:
        fix_dims(model, {"n": 2})
    certified(model, 4 + 6)


def test_samples_of_different_length() -> None:
    model = layered("LSTM", "", ", b, lengths", b=(1, 48), lengths=lengths())
    fix_dims(model, {"n": 2})
    certified(model, 4 + 6)


def test_batch_first_has_its_axes_elsewhere_but_the_same_units() -> None:
    """layout=1, which ONNX Runtime does not run on the CPU: the features and the hidden size stay the last axes."""
    model = graph(
        "(float[n,5,3] x) => (float[n,5,1,2] y)",
        "p = MatMul(x, wp)  r, last = GRU<hidden_size=6, layout=1>(p, w, rec, b)  t = Transpose<perm=[0,1,2,3]>(r)"
        "  y = MatMul(t, wo)",
        wp=(3, 4),
        w=(1, 18, 4),
        rec=(1, 18, 6),
        b=(1, 36),
        wo=(6, 2),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 4 + 6
    assert all(unit.exact for unit in coupling.units)


@pytest.mark.parametrize("op", GATES)
def test_layers_in_a_stack_with_both_directions(op: str) -> None:
    """[T, 2, B, H] -> [T, B, 2 H] is the next layer's input: every hidden position is two of its features."""
    gates = GATES[op]

    def layer(number: int, source: str) -> str:
        return (
            f'r{number}, l{number} = {op}<hidden_size=6, direction="bidirectional">'
            f"({source}, w{number}, rec{number}, b{number})"
            f"  t{number} = Transpose<perm=[0, 2, 1, 3]>(r{number})  f{number} = Reshape(t{number}, shape)"
        )

    weights: dict[str, Any] = {}
    for number, width in enumerate((4, 12, 12)):
        weights[f"w{number}"] = (2, gates * 6, width)
        weights[f"rec{number}"] = (2, gates * 6, 6)
        weights[f"b{number}"] = (2, 2 * gates * 6)
    model = graph(
        FEATURES,
        f"p = MatMul(x, wp)  {layer(0, 'p')}  {layer(1, 'f0')}  {layer(2, 'f1')}  y = MatMul(f2, wo)",
        wp=(3, 4),
        wo=(12, 2),
        shape=np.array([0, 0, -1]),
        **weights,
    )
    coupling = certified(model, 4 + 3 * 6)
    first = next(unit for unit in coupling.units if any(m.parameter == "rec0" for m in unit.members))
    assert next(m.indices for m in first.members if m.parameter == "w1" and m.axis == 2) == (0, 6)


@pytest.mark.parametrize("op", GATES)
def test_a_position_that_nothing_enters_is_dead_whatever_its_gates_do(op: str) -> None:
    """The rows of one gate are zero; the others are not. Zero rows of another gate are not enough."""
    gates, entering = GATES[op], {"LSTM": 3, "GRU": 2, "RNN": 0}[op]
    model = layered(op, "", ", b", b=(1, 2 * gates * 6))

    def silence(gate: int, position: int) -> None:
        for name, rows in (("w", [gate * 6]), ("rec", [gate * 6]), ("b", [gate * 6, (gates + gate) * 6])):
            value = model.graph.initializers[name]
            array = value.const_value.numpy().copy()
            array[:, [row + position for row in rows]] = 0
            value.const_value = ir.Tensor(array, name=name)

    silence(entering, 2)
    if gates > 1:
        silence(1, 4)
    dense = model.clone()
    result = Shrink().run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent()))
    assert result.changed
    assert model.graph.initializers["rec"].const_value.shape.numpy() == (1, gates * 5, 5)
    assert next(n for n in model.graph if n.op_type == op).attributes.get_int("hidden_size") == 5
    assert compare(dense, model, random_feeds(dense, 0)).worst_relative < 1e-5


def test_a_state_that_is_not_zero_keeps_a_position_alive() -> None:
    model = layered("GRU", "", ", b, , h0", b=(1, 36), h0=(1, 2, 6))
    fix_dims(model, {"n": 2})
    for name in ("w", "rec", "b"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[:, 2::6] = 0
        value.const_value = ir.Tensor(array, name=name)
    assert not Shrink().run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent())).changed


def test_a_cache_of_states_tells_why_the_hidden_size_stays() -> None:
    model = graph(
        "(float[5,n,3] x, float[1,n,6] h0, float[1,n,6] c0) => (float[5,n,2] y, float[1,n,6] h1, float[1,n,6] c1)",
        """r, h1, c1 = LSTM<hidden_size=6>(x, w, rec, b, , h0, c0)  s = Squeeze(r, one)  y = MatMul(s, wo)""",
        w=(1, 24, 3),
        rec=(1, 24, 6),
        b=(1, 48),
        wo=(6, 2),
        one=np.array([1]),
    )
    coupling = analyse(model)
    assert not coupling.units
    reason = next(f.reason for f in coupling.frozen if (f.tensor, f.axis) == ("rec", 2))
    assert "its initial state is the input 'h0' of the graph" in reason
    assert "output 'h1' of the graph" in reason
