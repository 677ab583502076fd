"""Shapes of what a Loop carries from run to run, which onnx's inference leaves open because they may change.

By induction: suppose that a state keeps the shape it starts with, infer the body, and see whether the body gives that
shape back. A size that it does not give back, or does not tell, is taken out of the supposition, and all is inferred
again until everything that is still supposed has been shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.rewriting.edit import graphs, is_onnx

Dims = list[int | str | None]


@dataclass(frozen=True)
class _State:
    """One carried tensor: before the loop, in the body, after a run, behind the loop."""

    start: ir.Value
    inside: ir.Value
    after: ir.Value
    final: ir.Value


def _states(model: ir.Model) -> Iterator[_State]:
    for graph in graphs(model):
        for node in graph:
            if not is_onnx(node, "Loop"):
                continue
            body = node.attributes["body"].as_graph()
            for k, inside in enumerate(body.inputs[2:]):
                start = node.inputs[k + 2]
                if start is not None:
                    yield _State(start, inside, body.outputs[k + 1], node.outputs[k])


class LoopStates:
    """What is supposed of a model; `model` and `light`, the one without weights, are annotated alike.

    Attributes:
        open: True where a supposition may still be wrong.
    """

    def __init__(self, model: ir.Model, light: ir.Model) -> None:
        self._pairs = list(zip(_states(model), _states(light), strict=True))
        self._supposed: dict[int, Dims] = {}
        self._given_up: set[int] = set()
        self.open = False

    def step(self) -> bool:
        """Suppose what can be supposed now, weaken what was not shown; True where shapes must be inferred again."""
        changed, self.open = False, False
        for number, (state, light) in enumerate(self._pairs):
            if number in self._given_up:
                continue
            start = _dims(state.start)
            if number not in self._supposed:
                # What the body declares of its input is believed, as inference does.
                own = _dims(state.inside) if state.inside.shape is not None else start
                if own is None or start is None:
                    continue
                self._suppose(number, own)
                self.open = changed = True
                continue
            shown = _common(self._supposed[number], start, _dims(state.after))
            if shown is None:
                self._give_up(number)
                changed = True
            elif shown != self._supposed[number]:
                self._suppose(number, shown)
                self.open = changed = True
            elif _dims(state.final) != shown:
                for each in (state, light):
                    each.final.shape, each.final.type = ir.Shape(shown), state.start.type
                changed = True
        return changed

    def withdraw(self) -> None:
        """Suppose nothing any more."""
        for number in tuple(self._supposed):
            self._give_up(number)
        self.open = False

    def _suppose(self, number: int, dims: Dims) -> None:
        self._supposed[number] = dims
        for each in self._pairs[number]:
            each.inside.shape = ir.Shape(dims)

    def _give_up(self, number: int) -> None:
        self._given_up.add(number)
        for each in self._pairs[number]:
            each.inside.shape = None


def _dims(value: ir.Value) -> Dims | None:
    return None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]


def _common(supposed: Dims, *others: Dims | None) -> Dims | None:
    """The supposition without the sizes that another place does not have; None where even the rank differs."""
    if any(other is None or len(other) != len(supposed) for other in others):
        return None
    known = [other for other in others if other is not None]
    return [size if all(other[k] == size for other in known) else None for k, size in enumerate(supposed)]
