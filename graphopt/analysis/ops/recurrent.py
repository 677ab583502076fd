"""LSTM, GRU and RNN: a hidden position is one unit across its gates, both directions, states and peepholes.

Weights stack the gates: W [D, G H, I], R [D, G H, H], B [D, 2 G H], peepholes P [D, 3 H], with G = 4, 3, 1 and D
directions. Hidden position h owns rows h, H + h, 2 H + h, ... of W, R and B and column h of R. With those rows zero and
a zero initial state the position stays zero for all times: LSTM c = f c + i tanh(0), h = o tanh(c); GRU
h = (1 - z) tanh(0) + z h; RNN h = tanh(0). Activations are checked for f(0) = 0. So the rows of one gate are enough, of
that which makes what enters the state: however wide the other gates open, they let nothing in or out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.ops.filling import uniform
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import CostView, Labeller, OpRule, Product, rule, where

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_STATE_ACTIVATIONS = {"LSTM": (1, 2), "GRU": (1,), "RNN": (0,)}
"""Which of a direction's activations act on the state; they must map 0 to 0."""
_COUNT = {"LSTM": 3, "GRU": 2, "RNN": 1}
_ENTERING = {"LSTM": 3, "GRU": 2, "RNN": 0}
"""Place of the gate that makes what enters the state, in the order i o f c, z r h."""
_ZERO_AT_ZERO = {"tanh", "relu", "leakyrelu", "elu", "softsign", "scaledtanh"}


def _zero_preserving(node: ir.Node) -> bool:
    given = [str(a).lower() for a in node.attributes.get_strings("activations", ()) or ()]
    count = _COUNT[node.op_type]
    return all(
        given[start + place] in _ZERO_AT_ZERO
        for start in range(0, len(given), count)
        for place in _STATE_ACTIVATIONS[node.op_type]
    )


def _computed_zeros(state: ir.Value | None) -> bool:
    """An initial state of zeros for a batch of unknown size: no state at all means the same, whatever the size."""
    return shapes.constant_tensor(state) is None and uniform(state) == 0


@rule
class Recurrent(OpRule):
    """Inputs X, W, R, B, sequence_lens, initial_h, initial_c, P; outputs Y [T, D, B, H], Y_h and Y_c [D, B, H]."""

    ops = tuple(_GATES)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        gates = _GATES[node.op_type]
        if shapes.sizes(node.inputs[1]) is None or shapes.sizes(node.inputs[2]) is None:
            g.freeze_node(node, f"{name}: its weights are computed")
            return
        x = g.operand(node, 0)
        g.freeze(x, f"{name}: steps follow each other, samples share a state", but=(2,))
        w = g.operand(node, 1, {1: "producer", 2: "consumer"}, only=(1, 2))
        r = g.operand(node, 2, {1: "producer", 2: "consumer"}, only=(1, 2))
        hidden = r.get(2, ())
        if 2 in x or 2 in w:
            g.equate(x.get(2, ()), w.get(2, ()), f"{name}: its input features are never removed")
        tie = f"{name}: its hidden positions are never removed"
        stacked = tuple(np.tile(vector, gates) for vector in hidden)
        for operand in (w, r):
            if 1 in operand or stacked:
                g.equate(stacked, operand.get(1, ()), tie)
        for index, copies in ((3, 2 * gates), (7, 3)):
            own = g.operand(node, index, {1: "producer"}, only=(1,)).get(1, ())
            if own:
                g.equate(tuple(np.tile(vector, copies) for vector in hidden), own, tie)
        g.freeze(g.operand(node, 4), f"{name}: lengths are no units")
        for index in (5, 6):
            state = node.inputs[index] if index < len(node.inputs) else None
            if state is not None and not _computed_zeros(state):
                given = g.operand(node, index, role="producer", only=(2,))
                g.freeze(given, tie, but=(2,))
                whose = f"is the input '{state.name}' of the graph" if state.is_graph_input() else "is never shortened"
                g.equate(hidden, given.get(2, ()), f"{name}: its initial state {whose}")
        for output, axis in zip(node.outputs, (3, 2, 2), strict=False):
            g.set(output, {axis: hidden})
        if 2 in x:
            g.sink(node, 0, 2, "zero", f"{name}: reads a value that is not zero")

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        if not _zero_preserving(node):
            return
        axes = [(o, a) for o, a in zip(node.outputs, (3, 2, 2), strict=False) if a in d.axes(o)]
        if not axes:
            return
        size = d.size(*axes[0])
        quiet = np.ones(size, dtype=bool)
        for index in (5, 6):
            given = node.inputs[index] if index < len(node.inputs) else None
            if given is not None and not _computed_zeros(given):
                state = d.operand(node, index, 2)
                quiet &= (state == 0) if state is not None else False
        if not d.hypothetical:
            for index, stacks in ((1, 1), (2, 1), (3, 2)):
                array = shapes.constant(node.inputs[index]) if index < len(node.inputs) else None
                if array is not None:
                    gates = array.reshape(len(array), stacks, _GATES[node.op_type], size, -1)
                    quiet &= ~gates[:, :, _ENTERING[node.op_type]].any(axis=(0, 1, 3))
        for output, axis in axes:
            d.set(output, axis, np.where(quiet, 0.0, np.nan))

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        # Shapes, not constants: exporters and quantisers compute the weights of a recurrent node from stored ones.
        x, w, r = (None if value is None else shapes.static_dims(value) for value in node.inputs[:3])
        if x is None or w is None or r is None:
            return []
        steps = float(x[0] * x[1] * w[0])
        products: list[Product] = []
        for index, size in ((1, w), (2, r)):
            first, one = c.axis(node, index, 1, size[1])
            second, two = c.axis(node, index, 2, size[2])
            products.append((steps * first * second, (*one, *two)))
        return products

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        mask = r.operand_mask(node, 2, 2)
        if mask is None:
            return
        if "hidden_size" in node.attributes:
            node.attributes.add(ir.AttrInt64("hidden_size", int(mask.sum())))
        for index in (5, 6):
            if index < len(node.inputs) and _computed_zeros(node.inputs[index]):
                node.replace_input_with(index, None)
