"""If, Loop and Scan: their bodies are labelled by the same walk as the graph around them.

A body reads outer values under their names, so captured weights and activations keep the labels they have outside.
What remains is where values cross the border: branches of an If give one and the same tensor, and the state that a
Loop or Scan carries is the same tensor before the first run, inside, and after the last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats
from graphopt.analysis.labels import Axes
from graphopt.analysis.rules import Labeller, OpRule, rule, where
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies

_ROUNDS = 4
"""Runs of a body in which single positions of a state are found to change; after that a whole axis is unknown."""


def _shared_names(node: ir.Node, g: Labeller) -> bool:
    """Freezes a node whose bodies cannot be entered; True if it has some."""
    if all(body in g.entered for body in bodies(node)):
        return False
    g.freeze_node(node, f"{where(node)}: names of its bodies also stand for other values")
    return True


def _given(g: Labeller, value: ir.Value, reason: str) -> Axes:
    """Labels of what a body gives out; a constant is not cut there."""
    if shapes.constant_tensor(value) is not None:
        g.freeze_constant(value, reason)
        return {}
    return g.of(value)


def _tied(g: Labeller, sides: Sequence[tuple[Axes, ir.Value]], reason: str) -> Axes:
    """Labels of one tensor that is seen as several values: axes of equal size live and die together."""
    known = [shapes.dims(value) for _, value in sides]
    result: Axes = {}
    for axis in {axis for axes, _ in sides for axis in axes}:
        sizes = {shape[axis] if shape is not None and axis < len(shape) else "no such axis" for shape in known}
        found = [axes.get(axis, ()) for axes, _ in sides]
        lengths = {len(vector) for factors in found for vector in factors}
        if len(lengths) != 1 or not sizes <= {*lengths, None} or len({len(s or ()) for s in known}) != 1:
            for axes, _ in sides:
                g.freeze(axes, f"{reason}, and its shape is not always the same", only=(axis,))
            continue
        result[axis] = reduce(lambda one, other: g.equate(one, other, reason), found)
    return result


def _agreed(values: Sequence[Floats | None]) -> Floats | None:
    """What several sides hold where they hold the same; NaN elsewhere."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len({len(value) for value in known}) != 1:
        return None
    return np.where(np.logical_and.reduce([value == known[0] for value in known]), known[0], np.nan)


@rule
class If(OpRule):
    """Both branches are walked; what they give for an output is one tensor, position by position the same units."""

    ops = ("If",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        if _shared_names(node, g):
            return
        branches = [body for body, _ in self.bodies(node)]
        for body in branches:
            g.walk(body)
        for index, output in enumerate(node.outputs):
            ends = [body.outputs[index] for body in branches]
            reason = f"{where(node)}: output {index} of its branches"
            sides = [(_given(g, end, f"{reason} is a constant"), end) for end in ends]
            g.set(output, _tied(g, sides, f"{reason} is never shortened in one of them"))

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        branches = [body for body, _ in self.bodies(node)]
        for body in branches:
            d.walk(body)
        for index, output in enumerate(node.outputs):
            for axis in d.axes(output):
                held = _agreed([d.of(body.outputs[index], axis) for body in branches])
                if held is not None:
                    d.set(output, axis, held)

    def bodies(self, node: ir.Node) -> list[tuple[ir.Graph, float | None]]:
        condition = shapes.scalar(node.inputs[0])
        return [
            (node.attributes[name].as_graph(), None if condition is None else float(bool(condition) is taken))
            for name, taken in (("then_branch", True), ("else_branch", False))
        ]


@dataclass(frozen=True)
class _State:
    """A tensor that is carried from run to run: `start` is the index of the node's operand."""

    start: int
    inside: ir.Value
    after: ir.Value
    final: ir.Value


@dataclass(frozen=True)
class _Step:
    """A tensor of which each run takes or gives one slice across `axis` of the whole."""

    whole: ir.Value
    index: int
    part: ir.Value
    axis: int


@dataclass(frozen=True)
class _Borders:
    """Where values enter and leave a body that runs many times."""

    body: ir.Graph
    states: list[_State]
    taken: list[_Step]
    stacked: list[_Step]
    alone: list[ir.Value]
    """Results of the body that steer it: no units."""


def _states(node: ir.Node, body: ir.Graph, count: int, operand: int, inside: int, after: int) -> list[_State]:
    """The first `count` carried tensors; the other numbers: where they start among operands, inputs and outputs."""
    return [
        _State(operand + k, body.inputs[inside + k], body.outputs[after + k], node.outputs[k]) for k in range(count)
    ]


class _Repeated(OpRule):
    """What Loop and Scan have in common."""

    @abstractmethod
    def borders(self, node: ir.Node) -> _Borders | str:
        """The crossings, or the reason why they are not known."""

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        crossing = self.borders(node)
        if isinstance(crossing, str):
            g.freeze_node(node, f"{name}: {crossing}")
            return
        if _shared_names(node, g):
            return
        before: list[tuple[Axes, ir.Value]] = []
        for state in crossing.states:
            value = node.inputs[state.start]
            axes = g.operand(node, state.start, role="producer")
            shape = shapes.dims(state.inside) or ()
            steady = {a: f for a, f in axes.items() if a < len(shape) and shape[a] == len(f[0])}
            changes = f"{name}: its state '{state.inside.name}' changes its size, or that is not known, along axis"
            for axis in axes.keys() - steady.keys():
                g.freeze(axes, f"{changes} {axis}", only=(axis,))
            g.set(state.inside, steady)
            before.append((axes, value if value is not None else state.inside))
        for step in crossing.taken:
            axes = g.operand(node, step.index, role="producer")
            g.freeze(axes, f"{name}: one step of '{step.whole.name}' follows the other", only=(step.axis,))
            g.set(step.part, {a - (a > step.axis): f for a, f in axes.items() if a != step.axis})
            g.check_sizes(node, step.part)
        g.walk(crossing.body)
        for value in crossing.alone:
            g.freeze(_given(g, value, f"{name}: steers it"), f"{name}: '{value.name}' steers it")
        for state, start in zip(crossing.states, before, strict=True):
            reason = f"{name}: its state '{state.inside.name}' is never shortened before or after a run"
            end = (_given(g, state.after, f"{name}: the next state is a constant"), state.after)
            # The labels inside may be fewer than those before: axes whose size is not known there were given up.
            inside = (g.of(state.inside), state.inside)
            g.set(state.final, _tied(g, [inside, end, start], reason))
        for step in crossing.stacked:
            axes = _given(g, step.part, f"{name}: a constant is stacked")
            g.set(step.whole, {a + (a >= step.axis): f for a, f in axes.items()})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        """A state holds what it starts with where every run leaves it so: positions are given up until that is true."""
        crossing = self.borders(node)
        if isinstance(crossing, str):
            return
        for state in crossing.states:
            for axis in d.axes(state.inside):
                held = d.operand(node, state.start, axis)
                d.set(state.inside, axis, np.full(d.size(state.inside, axis), np.nan) if held is None else held)
        for step in crossing.taken:
            for axis in d.axes(step.part):
                held = d.operand(node, step.index, axis + (axis >= step.axis))
                if held is not None:
                    d.set(step.part, axis, held)
        rounds = 0
        while True:
            d.walk(crossing.body)
            rounds += 1
            weakened = [self._weaken(state, d, whole=rounds > _ROUNDS) for state in crossing.states]
            if not any(weakened):
                break
        for state in crossing.states:
            for axis in d.axes(state.final):
                held = d.of(state.inside, axis)
                if held is not None:
                    d.set(state.final, axis, held)
        for step in crossing.stacked:
            for axis in d.axes(step.whole):
                held = d.of(step.part, axis - (axis > step.axis))
                if held is not None:
                    d.set(step.whole, axis, held)

    @staticmethod
    def _weaken(state: _State, d: DeadValues, *, whole: bool) -> bool:
        """Forget what a run of the body does not preserve of a state; True if that was anything."""
        changed = False
        for axis in d.axes(state.inside):
            held = d.of(state.inside, axis)
            assert held is not None
            after = d.of(state.after, axis)
            lost = ~np.isnan(held) & (held != after if after is not None and len(after) == len(held) else True)
            if lost.any():
                d.set(state.inside, axis, np.full(len(held), np.nan) if whole else np.where(lost, np.nan, held))
                changed = True
        return changed


@rule
class Loop(_Repeated):
    """Its body is walked; what it carries is one tensor before, within and after all runs; results are stacked.

    Inputs: trip count, condition, states. Body: (number, condition, states) -> (condition, states, slices).
    """

    ops = ("Loop",)

    def borders(self, node: ir.Node) -> _Borders | str:
        body = node.attributes["body"].as_graph()
        count = len(body.inputs) - 2
        stacked = [
            _Step(whole, -1, part, 0)
            for whole, part in zip(node.outputs[count:], body.outputs[count + 1 :], strict=False)
        ]
        states = _states(node, body, count, operand=2, inside=2, after=1)
        return _Borders(body, states, [], stacked, [body.outputs[0]])

    def bodies(self, node: ir.Node) -> list[tuple[ir.Graph, float | None]]:
        """The trip count, where it is a constant and nothing ends the loop before."""
        body = node.attributes["body"].as_graph()
        trips = shapes.scalar(node.inputs[0])
        start = node.inputs[1] if len(node.inputs) > 1 else None
        goes_on = body.outputs[0]
        while (maker := goes_on.producer()) is not None and is_onnx(maker, "Identity"):
            assert maker.inputs[0] is not None
            goes_on = maker.inputs[0]
        endless = goes_on is body.inputs[1] or bool(shapes.scalar(goes_on))
        return [(body, trips if endless and (start is None or shapes.scalar(start)) else None)]


@rule
class Scan(_Repeated):
    """Its body is walked; what it carries is one tensor before, within and after all runs; slices lose an axis.

    Inputs: states, then tensors of which each run takes a slice. Body: (states, slices) -> (states, slices).
    """

    ops = ("Scan",)

    def borders(self, node: ir.Node) -> _Borders | str:
        if shapes.opset(node) < 9:
            return "before opset 9 it has a batch axis of its own"
        body = node.attributes["body"].as_graph()
        taken = int(node.attributes.get_int("num_scan_inputs", 0) or 0)
        count = len(body.inputs) - taken
        steps = [
            (value, count + k, part, axis)
            for k, (value, part, axis) in enumerate(
                zip(node.inputs[count:], body.inputs[count:], _axes(node, "scan_input_axes", taken), strict=True)
            )
        ]
        stacked = list(zip(node.outputs[count:], body.outputs[count:], strict=False))
        axes = _axes(node, "scan_output_axes", len(stacked))
        ends = [(whole, -1, part, axis) for (whole, part), axis in zip(stacked, axes, strict=True)]
        found: list[list[_Step]] = [[], []]
        for place, (whole, index, part, axis) in [*((0, s) for s in steps), *((1, e) for e in ends)]:
            shape = shapes.dims(whole) if whole is not None else None
            if whole is None or (shape is None and axis < 0):
                return "the rank of a scanned tensor is unknown"
            found[place].append(_Step(whole, index, part, axis % len(shape) if shape else axis))
        states = _states(node, body, count, operand=0, inside=0, after=0)
        return _Borders(body, states, found[0], found[1], [])

    def bodies(self, node: ir.Node) -> list[tuple[ir.Graph, float | None]]:
        """As many runs as there are slices; a symbolic number counts as 1, as all symbolic sizes do."""
        body = node.attributes["body"].as_graph()
        crossing = self.borders(node)
        if isinstance(crossing, str) or not crossing.taken:
            return [(body, None)]
        shape = shapes.dims(crossing.taken[0].whole)
        size = shape[crossing.taken[0].axis] if shape is not None else None
        return [(body, float(size) if isinstance(size, int) else None if size is None else 1.0)]


def _axes(node: ir.Node, name: str, count: int) -> Sequence[int]:
    return node.attributes.get_ints(name, None) or (0,) * count
