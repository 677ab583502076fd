"""What shape inference of onnx does not do in the bodies of If, Loop and Scan.

It sees no constants of the graph around a body, so that a Reshape to one has no shape: they are repeated inside. It
leaves the inputs of a body without shapes: slices that a Scan takes are written down. And it leaves open what a Loop
carries from run to run, which may change. By induction: suppose that a state keeps the shape it starts with, infer the
body, and see whether the body gives that shape back. A size that it does not give back, or does not tell, is taken out
of the supposition, and all is inferred again until everything that is still supposed has been shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies, graphs

Dims = list[int | str | None]


def repeat_constants(light: ir.Model, most: int) -> None:
    """Give every body copies of the constants around it that it reads, up to `most` bytes, in place."""
    if next(light.graph.subgraphs(), None) is None:
        return
    names = Names(light)
    for body in list(graphs(light))[1:]:
        copies: dict[ir.Value, ir.Value] = {}
        for node in body:
            for index, value in enumerate(node.inputs):
                tensor = None if value is None or value.graph is body else constant(value)
                if value is None or tensor is None or tensor.nbytes > most or tensor.dtype == ir.DataType.STRING:
                    continue
                if value not in copies:
                    copies[value] = new_initializer(body, names.fresh(f"{value.name}"), tensor.numpy(), tensor.dtype)
                node.replace_input_with(index, copies[value])


@dataclass(frozen=True)
class _State:
    """One carried tensor: before the loop, in the body, after a run, behind the loop."""

    start: ir.Value
    inside: ir.Value
    after: ir.Value
    final: ir.Value


@dataclass(frozen=True)
class _Slice:
    """What one run of a Scan takes of a tensor: all but an axis."""

    whole: ir.Value
    axis: int
    inside: ir.Value

    def dims(self) -> Dims | None:
        whole = _dims(self.whole)
        return None if not whole else [d for k, d in enumerate(whole) if k != self.axis % len(whole)]


def _states(model: ir.Model) -> Iterator[_State]:
    for node in model.graph.all_nodes():
        if not is_onnx(node, "Loop", "Scan"):
            continue
        (body,) = bodies(node)
        first, after = (2, 1) if node.op_type == "Loop" else (0, 0)
        taken = int(node.attributes.get_int("num_scan_inputs", 0) or 0)
        for k in range(len(body.inputs) - first - taken):
            start = node.inputs[first + k]
            if start is not None:
                yield _State(start, body.inputs[first + k], body.outputs[after + k], node.outputs[k])


def _slices(model: ir.Model) -> Iterator[_Slice]:
    for node in model.graph.all_nodes():
        if not is_onnx(node, "Scan"):
            continue
        (body,) = bodies(node)
        taken = int(node.attributes.get_int("num_scan_inputs", 0) or 0)
        axes = node.attributes.get_ints("scan_input_axes", None) or (0,) * taken
        for whole, axis, inside in zip(node.inputs[-taken:], axes, body.inputs[-taken:], strict=False):
            if whole is not None:
                yield _Slice(whole, axis, inside)


class BodyInputs:
    """Shapes of what enters bodies; `model` and `light`, the one without weights, are annotated alike.

    Attributes:
        open: True where a supposition may still be wrong.
    """

    def __init__(self, model: ir.Model, light: ir.Model) -> None:
        self._states = list(zip(_states(model), _states(light), strict=True))
        self._slices = list(zip(_slices(model), _slices(light), strict=True))
        self._supposed: dict[int, Dims] = {}
        self._given_up: set[int] = set()
        self.open = False

    def step(self) -> bool:
        """Write down what is known now, weaken what was not shown; True where shapes must be inferred again."""
        self.open = False
        changed = [self._slice(*pair) for pair in self._slices]
        changed += [self._state(number) for number in range(len(self._states)) if number not in self._given_up]
        return any(changed)

    def withdraw(self) -> None:
        """Suppose nothing any more."""
        for number in tuple(self._supposed):
            self._give_up(number)
        self.open = False

    @staticmethod
    def _slice(one: _Slice, light: _Slice) -> bool:
        dims = one.dims()
        if dims is None or _dims(one.inside) == dims:
            return False
        one.inside.shape, light.inside.shape = ir.Shape(dims), ir.Shape(dims)
        return True

    def _state(self, number: int) -> bool:
        """Go one step on with a state; True where something changed."""
        state, light = self._states[number]
        start = _dims(state.start)
        if number not in self._supposed:
            # What the body declares of its input is believed, as inference does.
            own = _dims(state.inside) if state.inside.shape is not None else start
            if own is None or start is None:
                return False
            self._suppose(number, own)
            return True
        shown = _common(self._supposed[number], start, _dims(state.after))
        if shown is None:
            self._give_up(number)
            return True
        if shown != self._supposed[number]:
            self._suppose(number, shown)
            return True
        if _dims(state.final) == shown:
            return False
        for each in (state, light):
            each.final.shape, each.final.type = ir.Shape(shown), state.start.type
        return True

    def _suppose(self, number: int, dims: Dims) -> None:
        self._supposed[number] = dims
        self.open = True
        for each in self._states[number]:
            each.inside.shape = ir.Shape(dims)

    def _give_up(self, number: int) -> None:
        self._given_up.add(number)
        for each in self._states[number]:
            each.inside.shape = each.final.shape = None


def _dims(value: ir.Value) -> Dims | None:
    return None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]


def _common(supposed: Dims, *others: Dims | None) -> Dims | None:
    """The supposition without the sizes that another place does not have; None where even the rank differs."""
    if any(other is None or len(other) != len(supposed) for other in others):
        return None
    known = [other for other in others if other is not None]
    return [size if all(other[k] == size for other in known) else None for k, size in enumerate(supposed)]
