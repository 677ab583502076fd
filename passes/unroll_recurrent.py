"""unroll-recurrent: LSTM, GRU and RNN become their steps, one after the other.

For runtimes and compilers without such operators. The formulas stand in `graphopt.rewriting.recurrent`; the product
of all inputs by their weights is taken out of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import remove_node, replace_value
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.recurrent import ACTIVATIONS, GATES, PLAIN, Direction, State, Steps
from graphopt.rewriting.weight_pass import begun

_LEAST_OPSET = 13
"""Squeeze and Unsqueeze take their axes as an input from here on."""


@dataclass(frozen=True)
class UnrollRecurrent(Pass):
    """Write LSTM, GRU and RNN out, step by step, as products, activations and sums.

    Algebra: see `graphopt.rewriting.recurrent`. Exact up to rounding.
    Does not fire: where the number of steps is open or above `max_steps`, on weights that are computed, lengths that
    differ within a batch, `clip`, `input_forget`, activations with parameters, before opset 13. Preserves: names of
    results, symbolic batches. The model gets some ten nodes a step and direction.
    """

    name: ClassVar[str] = "unroll-recurrent"
    effect: ClassVar[Effect] = Effect.EXACT
    max_steps: int = option(256, "longest sequence that is written out", low=1)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Write out every recurrent node of every graph."""
        result = begun(model, keep_overridable=False)
        editor = Editor(model)
        done = []
        for node, opset in editor.nodes():
            if not is_onnx(node, *GATES):
                continue
            reason = _refusal(node, opset, self.max_steps)
            if reason is None:
                done.append(f"{label(node)} ({_steps(node)} steps)")
                _unroll(editor, node)
            else:
                result.skipped.append(Skip(label(node), reason))
        editor.close()
        if done:
            infer_shapes(model)
            result.notes.append(f"written out: {', '.join(done)}")
        result.changed |= bool(done)
        return result


def _refusal(node: ir.Node, opset: int, max_steps: int) -> str | None:
    """Why a recurrent node stays."""
    attributes, steps = node.attributes, _steps(node)
    if opset < _LEAST_OPSET:
        return f"the model has opset {opset}, and this needs {_LEAST_OPSET}"
    if steps is None:
        return "the number of steps is open; fix the length of the sequence with --dim or --input-shape"
    if steps > max_steps:
        return f"it has {steps} steps, and max_steps is {max_steps}"
    if any(_input(node, k) is not None and array(_input(node, k)) is None for k in (1, 2, 3, 7)):
        return "its weights are computed"
    lengths = array(_input(node, 4))
    if _input(node, 4) is not None and (lengths is None or (lengths != steps).any()):
        return "lengths differ within a batch"
    if attributes.get_int("input_forget", 0) or "clip" in attributes:
        return "clip and input_forget are not written out"
    functions = _functions(node)
    unknown = [name for name in functions if name not in PLAIN]
    return f"activation {unknown[0]} has parameters" if unknown else None


def _unroll(editor: Editor, node: ir.Node) -> None:
    by_batch = bool(node.attributes.get_int("layout", 0))
    x = node.inputs[0]
    assert x is not None, "the first input of a recurrent node is not optional"
    if by_batch:
        x = _op(editor, node, "Transpose", x, perm=[1, 0, 2])
    kind = node.attributes.get_string("direction", "forward")
    steps = _steps(node) or 0
    forward, backward = list(range(steps)), list(range(steps - 1, -1, -1))
    orders = {"forward": [forward], "reverse": [backward], "bidirectional": [forward, backward]}[kind]
    rows, last = [], []
    for number, order in enumerate(orders):
        start = State(*(_initial(editor, node, k, number, by_batch) for k in (5, 6)))
        found, state = Steps(editor, node, _direction(node, number)).run(x, order, start)
        rows.append(found)
        last.append(state)
    _replace(editor, node, 0, _sequence(editor, node, rows), [2, 0, 1, 3] if by_batch else None)
    _replace(editor, node, 1, [state.h for state in last], [1, 0, 2] if by_batch else None)
    _replace(editor, node, 2, [state.c for state in last], [1, 0, 2] if by_batch else None)
    remove_node(node)


def _sequence(editor: Editor, node: ir.Node, rows: list[list[ir.Value]]) -> list[ir.Value | None]:
    """All steps of each direction: (steps, batch, hidden)."""
    if not _read(node, 0):
        return [None]
    axis = editor.sizes(node, f"{label(node)}_axis", [0])
    return [_concat(editor, node, [_op(editor, node, "Unsqueeze", h, axis) for h in found], 0) for found in rows]


def _replace(editor: Editor, node: ir.Node, index: int, found: list[ir.Value | None], perm: list[int] | None) -> None:
    """Let readers of an output read the directions of it, side by side on the axis in front of the batch."""
    made = [value for value in found if value is not None]
    if not _read(node, index) or not made:
        return
    axis = editor.sizes(node, f"{label(node)}_axis", [1 if index == 0 else 0])
    value = _concat(editor, node, [_op(editor, node, "Unsqueeze", part, axis) for part in made], 1 if index == 0 else 0)
    if perm is not None:
        value = _op(editor, node, "Transpose", value, perm=perm)
    replace_value(node.outputs[index], value)


def _concat(editor: Editor, node: ir.Node, parts: list[ir.Value], axis: int) -> ir.Value:
    return parts[0] if len(parts) == 1 else _op(editor, node, "Concat", *parts, axis=axis)


def _initial(editor: Editor, node: ir.Node, index: int, direction: int, by_batch: bool) -> ir.Value | None:
    """A state before the first step, (batch, hidden); None for zeros."""
    value = _input(node, index)
    known = array(value)
    if value is None or (known is not None and not known.any()):
        return None
    axis = 1 if by_batch else 0
    if node.attributes.get_string("direction", "forward") == "bidirectional":
        bounds = [editor.sizes(node, f"{label(node)}_at", [at]) for at in (direction, direction + 1, axis)]
        value = _op(editor, node, "Slice", value, *bounds)
    return _op(editor, node, "Squeeze", value, editor.sizes(node, f"{label(node)}_axis", [axis]))


def _direction(node: ir.Node, number: int) -> Direction:
    """The weights and settings of one direction."""
    w, r, b, p = (array(_input(node, k)) for k in (1, 2, 3, 7))
    assert w is not None and r is not None, "checked by _refusal"
    size = r.shape[2]
    half = GATES[node.op_type] * size
    functions = _functions(node)
    count = len(ACTIVATIONS[node.op_type])
    return Direction(
        kind=node.op_type,
        hidden=size,
        w=w[number],
        r=r[number],
        wb=None if b is None else np.array(b[number, :half]),
        rb=None if b is None else np.array(b[number, half:]),
        peepholes=None if p is None else p[number],
        functions=functions[number * count : (number + 1) * count],
        reset_after=bool(node.attributes.get_int("linear_before_reset", 0)),
    )


def _functions(node: ir.Node) -> tuple[str, ...]:
    """Activations of all directions, spelled like operators."""
    directions = 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1
    named = tuple(name.capitalize() for name in node.attributes.get_strings("activations", ()))
    return named or ACTIVATIONS[node.op_type] * directions


def _steps(node: ir.Node) -> int | None:
    x = node.inputs[0]
    shape = None if x is None else x.shape
    size = None if shape is None else shape[1 if node.attributes.get_int("layout", 0) else 0]
    return size if isinstance(size, int) else None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _read(node: ir.Node, index: int) -> bool:
    return index < len(node.outputs) and bool(node.outputs[index].uses() or node.outputs[index].is_graph_output())


def _op(editor: Editor, node: ir.Node, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
    return editor.insert(node, op_type, inputs, attributes, f"{label(node)}_{op_type.lower()}")
