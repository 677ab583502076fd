"""Units and convex parts."""

from __future__ import annotations

import numpy as np
from text_graph import graph

from graphopt.delegates.partition import partition
from graphopt.delegates.units import Unit, parents, units

SCALE = {"s": np.float32(0.1), "z": np.uint8(0), "zz": np.uint8(3)}


def qdq(body: str, **more: object):  # type: ignore[no-untyped-def]
    return graph("(float[1,4] x) => (float[1,4] y)", body, opset=17, **SCALE, **more)


def test_an_operator_between_dq_and_q_is_one_unit() -> None:
    model = qdq(
        "a = QuantizeLinear(x, s, z)  b = DequantizeLinear(a, s, z)  c = Sigmoid(b)  d = QuantizeLinear(c, s, z)"
        "  y = DequantizeLinear(d, s, z)"
    )
    found = units(model.graph, groups=True)
    assert [[n.op_type for n in unit.nodes] for unit in found] == [
        ["QuantizeLinear"], ["DequantizeLinear", "Sigmoid", "QuantizeLinear"], ["DequantizeLinear"],
    ]  # fmt: skip
    group = found[1]
    assert group.quantised and group.op == "Sigmoid"
    assert group.operand("X").name == "a" and group.operand("Y").name == "d"  # type: ignore[union-attr]
    assert float(group.parameters("X")[0]) == np.float32(0.1)  # type: ignore[index, arg-type]
    assert len(units(model.graph, groups=False)) == 5


def test_a_relu_that_the_quantiser_makes_superfluous_belongs_to_the_unit() -> None:
    body = (
        "a = QuantizeLinear(x, s, z)  b = DequantizeLinear(a, s, z)  c = Sigmoid(b)  r = Relu(c)"
        "  d = QuantizeLinear(r, s, {zero})  y = DequantizeLinear(d, s, {zero})"
    )
    sizes = [max(len(u.nodes) for u in units(qdq(body.format(zero=z)).graph, groups=True)) for z in ("z", "zz")]
    # at zero point 0 nothing below zero can be written; at 3 it can
    assert sizes == [4, 1]


def test_an_output_in_float_breaks_the_unit_and_a_shared_dq_stays_for_its_other_reader() -> None:
    model = qdq(
        "a = QuantizeLinear(x, s, z)  b = DequantizeLinear(a, s, z)  c = Sigmoid(b)  d = QuantizeLinear(c, s, z)"
        "  e = DequantizeLinear(d, s, z)  y = Add(b, e)"
    )
    found = [[n.op_type for n in unit.nodes] for unit in units(model.graph, groups=True)]
    assert ["DequantizeLinear", "Sigmoid", "QuantizeLinear"] in found
    assert ["Add"] in found
    assert found.count(["DequantizeLinear"]) == 2


def cut(body: str, refused: set[str], worthless: tuple[str, ...] = ()) -> list[list[str]]:
    model = graph("(float[1,4] x) => (float[1,4] y)", body)
    found = units(model.graph, groups=True)

    def taken(unit: Unit) -> bool:
        return unit.op not in refused

    return [[u.op for u in part] for part in partition(found, parents(found), taken, worthless)]


def test_a_chain_is_cut_where_a_node_is_refused() -> None:
    body = "a = Relu(x)  b = Erf(a)  c = Tanh(b)  y = Exp(c)"
    assert cut(body, set()) == [["Relu", "Erf", "Tanh", "Exp"]]
    assert cut(body, {"Erf"}) == [["Relu"], ["Tanh", "Exp"]]
    assert cut(body, {"Erf"}, ("Relu",)) == [["Tanh", "Exp"]]


def test_parts_are_convex() -> None:
    # Add reads Relu directly and through Erf: it cannot be in Relu's part, or Erf could run neither before nor after it
    body = "a = Relu(x)  b = Erf(a)  y = Add(a, b)"
    assert cut(body, {"Erf"}) == [["Relu"], ["Add"]]
    # what stands beside the refused node joins the first part
    body = "a = Relu(x)  b = Erf(a)  c = Tanh(a)  d = Exp(c)  y = Add(d, b)"
    assert cut(body, {"Erf"}) == [["Relu", "Tanh", "Exp"], ["Add"]]
