"""LSTM, GRU and RNN step by step: one direction of such a node as products, gates and states.

With x_t the row of step t, W and R the weights, b = Wb + Rb, and h_0 = c_0 = 0 where nothing is given (the terms that
they are in are left out):

    LSTM    i, o, f, c~ = s(x W^T + h R^T + b),  c' = f c + i c~,  h' = o tanh(c')
            peepholes P: i and f see P c, o sees P c'
    GRU     z, r = s(x W^T + h R^T + b),  h' = (1 - z) n + z h
            n = tanh(x W^T + (r h) R^T + b),  or with linear_before_reset  tanh(x W^T + Wb + r (h R^T + Rb))
    RNN     h' = tanh(x W^T + h R^T + b)

The products x W^T of all steps are one product in front of the steps. Source: the definitions of the operators in the
ONNX standard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.editor import Editor

Array = np.ndarray[Any, Any]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
"""What the standard takes where a node says nothing."""
PLAIN = ("Sigmoid", "Tanh", "Relu")
"""Activations that are operators without parameters."""


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent node.

    Attributes:
        kind: LSTM, GRU or RNN.
        hidden: size of the state.
        w: weights of the input, (gates * hidden, inputs).
        r: weights of the state, (gates * hidden, hidden).
        wb, rb: the two biases, (gates * hidden,); None: zero.
        peepholes: (3 * hidden,), or None.
        functions: its activations.
        reset_after: GRU: the reset gate acts on the product, not on the state.
    """

    kind: str
    hidden: int
    w: Array
    r: Array
    wb: Array | None
    rb: Array | None
    peepholes: Array | None
    functions: tuple[str, ...]
    reset_after: bool


@dataclass
class State:
    """What a step hands to the next: (batch, hidden); None: zeros."""

    h: ir.Value | None
    c: ir.Value | None


class Steps:
    """Writes steps in front of the node that they replace.

    Args:
        editor: of the model.
        node: what is replaced; names are made of its name.
        direction: which of its directions.
    """

    def __init__(self, editor: Editor, node: ir.Node, direction: Direction) -> None:
        self._editor, self._node, self._d = editor, node, direction
        self._name = node.outputs[0].name or node.op_type
        self._made: dict[str, ir.Value] = {}
        self._step = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[direction.kind]

    def run(self, x: ir.Value, order: list[int], state: State) -> tuple[list[ir.Value], State]:
        """All steps.

        Args:
            x: (steps, batch, inputs).
            order: of the steps.
            state: before the first.

        Returns:
            h after each step, by its place in `x`, and the last state.
        """
        projected = self._op("MatMul", x, self._constant(self._d.w.T, "w"))
        bias = self._input_bias()
        if bias is not None:
            projected = self._op("Add", projected, self._constant(bias, "b"))
        found: list[ir.Value | None] = [None] * len(order)
        for step in order:
            state = self._step(self._row(projected, step, len(order)), state)
            found[step] = state.h
        return [h for h in found if h is not None], state

    def _input_bias(self) -> Array | None:
        """What is added to x W^T: both biases, but for a part of a GRU's that the reset gate multiplies."""
        wb, rb = self._d.wb, self._d.rb
        if wb is None or rb is None:
            return wb if rb is None else rb
        total = wb + rb
        if self._d.kind == "GRU" and self._d.reset_after:
            total[2 * self._d.hidden :] = wb[2 * self._d.hidden :]
        return total if total.any() else None

    def _row(self, projected: ir.Value, step: int, steps: int) -> ir.Value:
        """One step of (steps, batch, gates * hidden), as (batch, gates * hidden)."""
        if steps > 1:
            projected = self._op("Slice", projected, *self._sizes([step], [step + 1], [0]))
        return self._op("Squeeze", projected, *self._sizes([0]))

    def _lstm(self, row: ir.Value, state: State) -> State:
        f, g, h = self._d.functions
        gates = self._plus(row, self._times(state.h, self._d.r, "r"))
        i, o, forget, new = (self._part(gates, k) for k in range(4))
        i = self._op(f, self._plus(i, self._peep(state.c, 0)))
        new = self._op("Mul", i, self._op(g, new))
        if state.c is not None:
            forget = self._op(f, self._plus(forget, self._peep(state.c, 2)))
            new = self._op("Add", self._op("Mul", forget, state.c), new)
        o = self._op(f, self._plus(o, self._peep(new, 1)))
        return State(self._op("Mul", o, self._op(h, new)), new)

    def _gru(self, row: ir.Value, state: State) -> State:
        f, g = self._d.functions
        size = self._d.hidden
        gates = self._plus(self._part(row, 0, 2), self._times(state.h, self._d.r[: 2 * size], "rzr"))
        z, r = (self._op(f, self._part(gates, k)) for k in range(2))
        weight, new = self._d.r[2 * size :], self._part(row, 2)
        if self._d.reset_after:
            inner = self._times(state.h, weight, "rh")
            if self._d.rb is not None:
                inner = self._plus(self._constant(self._d.rb[2 * size :], "rb"), inner)
            new = new if inner is None else self._op("Add", new, self._op("Mul", r, inner))
        elif state.h is not None:
            new = self._plus(new, self._times(self._op("Mul", r, state.h), weight, "rh"))
        new = self._op(g, new)
        one = self._constant(np.array(1, self._d.r.dtype), "one")
        new_part = self._op("Mul", self._op("Sub", one, z), new)
        return State(new_part if state.h is None else self._op("Add", new_part, self._op("Mul", z, state.h)), None)

    def _rnn(self, row: ir.Value, state: State) -> State:
        return State(self._op(self._d.functions[0], self._plus(row, self._times(state.h, self._d.r, "r"))), None)

    def _times(self, h: ir.Value | None, weight: Array, name: str) -> ir.Value | None:
        return None if h is None else self._op("MatMul", h, self._constant(weight.T, name))

    def _peep(self, c: ir.Value | None, gate: int) -> ir.Value | None:
        if c is None or self._d.peepholes is None:
            return None
        size = self._d.hidden
        return self._op("Mul", c, self._constant(self._d.peepholes[gate * size : (gate + 1) * size], f"p{gate}"))

    def _plus(self, a: ir.Value, b: ir.Value | None) -> ir.Value:
        return a if b is None else self._op("Add", a, b)

    def _part(self, gates: ir.Value, first: int, count: int = 1) -> ir.Value:
        """Gates first ... first + count of a row."""
        size = self._d.hidden
        return self._op("Slice", gates, *self._sizes([first * size], [(first + count) * size], [1]))

    def _sizes(self, *vectors: list[int]) -> list[ir.Value]:
        return [self._editor.sizes(self._node, f"{self._name}_at", vector) for vector in vectors]

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        kind = next((v.type for v in inputs if v.type is not None and v.dtype != ir.DataType.INT64), None)
        made = self._editor.insert(self._node, op_type, inputs, attributes, f"{self._name}_{op_type.lower()}")
        made.type = kind
        return made

    def _constant(self, data: Array, name: str) -> ir.Value:
        """A constant that all steps share; `name` tells which."""
        if name not in self._made:
            self._made[name] = self._editor.constant(self._node, f"{self._name}_{name}", data)
        return self._made[name]
