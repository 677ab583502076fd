"""Axes of weights that keep their length, each with the reason, so that no layer stays whole without a word.

Most weights are stored, and their labels tell why they froze. A weight that nothing stores (a filling of one number,
random numbers, an input of the graph) owns no parameter that could go, and that is its reason.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import OpRule, rule_for
from graphopt.analysis.scope import scopes
from graphopt.rewriting.constant_cones import NEVER
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies

if TYPE_CHECKING:
    from graphopt.analysis.labels import Factors
    from graphopt.analysis.units import Coupling

_STORE = "run fold-constants with larger limits (max_growth, max_bytes) first"


@dataclass(frozen=True)
class Frozen:
    """An axis of a weight that keeps its length, or part of it, and why."""

    tensor: str
    axis: int
    positions: int
    size: int
    reason: str


def frozen_axes(coupling: Coupling) -> Iterator[Frozen]:
    """All of them: axes of stored parameters in the order of their uses, then weights that are stored nowhere."""
    seen: set[tuple[str, int]] = set()
    for use in coupling.uses:
        for axis, factors in use.axes.items():
            positions, reasons = _staying(coupling, factors)
            if not positions or (use.parameter, axis) in seen:
                continue
            seen.add((use.parameter, axis))
            yield Frozen(use.parameter, axis, positions, len(factors[0]), _joined(reasons) or "owns no parameter")
    told = {use.parameter for use in coupling.uses}
    for weight, reason in _stored_nowhere(coupling.model, told).items():
        yield from _axes(coupling, weight, reason)


def from_constants(model: ir.Model) -> set[str]:
    """Names of the tensors that constants alone decide, and that can be computed ahead."""
    found: set[str] = set()
    for graph in scopes(model):
        for node in graph:
            sources = [value for value in node.inputs if value is not None]
            known = all(v.name in found or shapes.constant_tensor(v) is not None for v in sources)
            if sources and known and is_onnx(node, node.op_type) and not is_onnx(node, *NEVER):
                found.update(value.name for value in node.outputs if value.name)
    return found


def _staying(coupling: Coupling, factors: Factors) -> tuple[int, list[str]]:
    """How many positions of an axis stay, and the reasons."""
    stays = np.ones(len(factors[0]), dtype=bool)
    for vector in coupling.solution.units(factors):
        stays &= vector == 0
    return int(stays.sum()), coupling.solution.why(tuple(vector[stays] for vector in factors))


def _joined(reasons: list[str]) -> str:
    return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def _stored_nowhere(model: ir.Model, parameters: set[str]) -> dict[ir.Value, str]:
    """Weights of layers that are computed from no parameter, with the reason.

    An operand of a layer counts as a weight where neither another layer nor a parameter stands before it. One that
    depends on the inputs of the graph is data or a state where it is the first, or stands beside a parameter.
    """
    layers = [node for graph in scopes(model) for node in graph if _multiplies(node)]
    ends = {value.name for node in layers for value in node.outputs} | parameters
    ahead, graph_inputs = from_constants(model), set(model.graph.inputs)
    found: dict[ir.Value, str] = {}
    for node in layers:
        beside = any(value is not None and value.name in parameters for value in node.inputs)
        for index, value in enumerate(node.inputs):
            inputs = None if value is None or value in found else _inputs_of(value, ends, graph_inputs)
            if value is None or inputs is None or (inputs and (index == 0 or beside)):
                continue
            producer = value.producer()
            if inputs:
                whence = "it is" if producer is None else "it is computed from"
                found[value] = f"{whence} input '{inputs[0].name}' of the graph"
            elif producer is not None and value.name in ahead:
                found[value] = f"{producer.op_type} computes it: {_STORE}"
            elif producer is not None:
                found[value] = f"{producer.op_type} computes it, and it is stored nowhere"
    return found


def _multiplies(node: ir.Node) -> bool:
    """Whether the operator is one that multiplies and accumulates."""
    handler = rule_for(node)
    return handler is not None and type(handler).cost is not OpRule.cost


def _inputs_of(value: ir.Value, ends: Container[str | None], inputs: Container[ir.Value]) -> list[ir.Value] | None:
    """The inputs of the graph that a tensor is computed from; None where one of `ends`, or a body, has a part in it."""
    seen, todo = dict[ir.Value, None](), [value]
    while todo:
        one = todo.pop()
        producer = one.producer()
        inside = producer is None and one not in inputs and shapes.constant_tensor(one) is None
        if inside or one.name in ends or (producer is not None and any(True for _ in bodies(producer))):
            return None
        if one not in seen:
            seen[one] = None
            todo.extend(v for v in (producer.inputs if producer is not None else ()) if v is not None)
    return [one for one in seen if one in inputs]


def _axes(coupling: Coupling, weight: ir.Value, reason: str) -> Iterator[Frozen]:
    """Axes of a weight that is stored nowhere: those that nothing else keeps, or all where something keeps each."""
    labels = coupling.labels.get(weight.name or "", {})
    found = []
    for axis, size in enumerate(shapes.dims(weight) or ()):
        if size == 1:
            continue
        long = size if isinstance(size, int) else 0
        positions, reasons = _staying(coupling, labels[axis]) if axis in labels else (long, [])
        if positions or not long:
            found.append((not reasons, Frozen(weight.name or "", axis, positions, long, _joined(reasons) or reason)))
    if any(own for own, _ in found):
        found = [each for each in found if each[0]]
    yield from (frozen for _, frozen in found)
