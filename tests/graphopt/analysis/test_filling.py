"""Tensors filled with one number: as long as their readers need them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.ops.filling import uniform
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import analyse

BATCH = "s = Shape(x)  b = Gather(s, one)"
"""The batch size, from x of shape (steps, batch, features)."""


def last(model: ir.Model) -> ir.Value:
    return model.graph[-1].outputs[0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = ConstantOfShape(b)", 0.0),
        ("y = ConstantOfShape<value = float[1] {2.5}>(b)", 2.5),
        ("z = ConstantOfShape(b)  t = Unsqueeze(z, zero)  y = Slice(t, zero, one)", 0.0),
        ("z = ConstantOfShape(b)  y = Concat<axis=0>(z, z)", 0.0),
        ("z = ConstantOfShape(b)  o = ConstantOfShape<value = float[1] {1.0}>(b)  y = Concat<axis=0>(z, o)", None),
        ("y = Expand(same, b)", 7.0),
        ("y = Expand(different, two)", None),
        ("z = ConstantOfShape(b)  y = Relu(z)", None),
        ("y = Relu(x)", None),
    ],
)
def test_what_holds_one_number_everywhere(body: str, expected: float | None) -> None:
    model = graph(
        "(float[n,4,3] x) => (float[k] y)",
        f"{BATCH}  {body}",
        zero=np.array([0]),
        one=np.array([1]),
        two=np.array([2]),
        same=np.full(1, 7, np.float32),
        different=np.array([1, 2], np.float32),
    )
    assert uniform(last(model)) == expected


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_initial_states_of_zeros_for_any_batch_are_no_states(op: str) -> None:
    """As torch exports a stack of layers: zeros for all layers at once, of which every layer takes its slice."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    states = "h{0}, h{0}" if op == "LSTM" else "h{0}"

    def layer(number: int, source: str) -> str:
        return (
            f"h{number} = Slice(h, i{number}, i{number + 1}, zero)"
            f"  r{number} = {op}<hidden_size=6>({source}, w{number}, rec{number}, b{number}, , "
            f"{states.format(number)})  q{number} = Squeeze(r{number}, one)"
        )

    weights: dict[str, Any] = {}
    for number, width in ((0, 4), (1, 6)):
        weights[f"w{number}"] = (1, gates * 6, width)
        weights[f"rec{number}"] = (1, gates * 6, 6)
        weights[f"b{number}"] = (1, 2 * gates * 6)
    model = graph(
        "(float[5,n,3] x) => (float[5,n,2] y)",
        f"{BATCH.replace('b =', 'm =')}  size = Concat<axis=0>(layers, m, width)  h = ConstantOfShape(size)"
        f"  p = MatMul(x, wp)  {layer(0, 'p')}  {layer(1, 'q0')}  y = MatMul(q1, wo)",
        wp=(3, 4),
        wo=(6, 2),
        zero=np.array([0]),
        one=np.array([1]),
        layers=np.array([2]),
        width=np.array([6]),
        i0=np.array([0]),
        i1=np.array([1]),
        i2=np.array([2]),
        **weights,
    )
    coupling = analyse(model)
    assert len(coupling.units) == 4 + 6 + 6  # the layers are not tied by their common zeros
    assert all(unit.exact for unit in coupling.units)
    certificate = certify(model, coupling, choose(coupling, 0.5, 1))
    assert certificate.holds
    assert certificate.control is not None and certificate.control > 1e-3


def test_a_filling_follows_its_readers_and_their_constants_fold() -> None:
    """(1 - sigmoid(h)) as in a cell that is written out: where h is dead, 1/2 is left for the next layer's bias."""
    model = graph(
        "(float[5,n,3] x) => (float[5,n,2] y)",
        f"{BATCH.replace('b =', 'm =')}  size = Concat<axis=0>(m, width)  ones = ConstantOfShape<value = float[1] {{1.0}}>(size)"  # noqa: E501
        "  h = MatMul(x, w)  z = Sigmoid(h)  k = Sub(ones, z)  y = MatMul(k, wo)",
        w=(3, 6),
        wo=(6, 2),
        one=np.array([1]),
        width=np.array([6]),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 6
    assert all(unit.exact for unit in coupling.units)
    assert certify(model, coupling, choose(coupling, 0.5, 1)).holds
    pruned = model.clone()
    remove_units(pruned, coupling, {1, 2})
    ones = next(n for n in pruned.graph if n.op_type == "ConstantOfShape").outputs[0]
    assert ones.shape is not None and ones.shape[-1] == 4


def test_a_filling_of_integers_is_a_shape() -> None:
    model = graph(
        "(float[n,6] x) => (float[n,2] y)",
        "h = MatMul(x, w)  ones = ConstantOfShape<value = int64[1] {1}>(rank)  t = Tile(h, ones)  y = MatMul(t, wo)",
        w=(6, 6),
        wo=(6, 2),
        rank=np.array([2]),
    )
    assert "ones" not in analyse(model).labels
