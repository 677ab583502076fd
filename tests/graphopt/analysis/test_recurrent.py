"""Hidden positions of recurrent operators are units, exactly."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import analyse

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def tagger(op: str, directions: int, hidden: int = 6, extra: str = "", **attributes: str) -> ir.Model:
    """Embedding-like projection -> recurrent layer -> classifier on every step."""
    gates = GATES[op]
    direction = "bidirectional" if directions == 2 else "forward"
    body = f"""p = MatMul(x, wp)
        r, last = {op}<hidden_size={hidden}, direction="{direction}"{extra}>(p, w, rec, b)
        t = Transpose<perm=[0, 2, 1, 3]>(r)  f = Reshape(t, shape)  y = MatMul(f, wo)"""
    import numpy as np

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
