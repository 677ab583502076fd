"""Operators that look positions of some axes up, sort them or mix them, and leave the other axes alone.

An axis along which an operator indexes keeps its length. Along every other axis operands and result stand position by
position, indices too: a unit takes its column of them along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.rules import Labeller, OpRule, rule, where

Places = dict[int, int]
"""Operand -> its axis."""


@dataclass(frozen=True)
class Passing:
    """Which axes pass.

    Attributes:
        axes: axis of the results -> where operands have it.
        reason: why the other axes stay.
        data: operands whose values make the result.
        constants: a constant that all data holds is that of the result; otherwise only zeros stay.
    """

    axes: dict[int, Places]
    reason: str
    data: Sequence[int] = (0,)
    constants: bool = False


def _shape(node: ir.Node, index: int) -> tuple[shapes.Dim, ...] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else shapes.dims(value)


def _axis(node: ir.Node, rank: int, default: int = 0) -> int:
    return int(node.attributes.get_int("axis", default) or 0) % max(rank, 1)


def _but(rank: int, *mixed: int) -> dict[int, Places]:
    """All axes of the first operand pass to the same axis of the result, but some."""
    return {axis: {0: axis} for axis in range(rank) if axis not in {m % rank for m in mixed}}


def _one_axis(reason: str, default: int, *, constants: bool = False) -> Callable[[ir.Node], Passing | str]:
    """One axis, told by the attribute, is judged together."""

    def passing(node: ir.Node) -> Passing | str:
        shape = _shape(node, 0)
        if shape is None:
            return "the rank of its input is unknown"
        return Passing(_but(len(shape), _axis(node, len(shape), default)), reason, constants=constants)

    return passing


def _given_axis(reason: str, index: int, default: int | None) -> Callable[[ir.Node], Passing | str]:
    """One axis, told by an operand, is judged together."""

    def passing(node: ir.Node) -> Passing | str:
        shape = _shape(node, 0)
        there = index < len(node.inputs) and node.inputs[index] is not None
        axis = shapes.scalar(node.inputs[index]) if there else node.attributes.get_int("axis", default)
        if shape is None or axis is None:
            return "its axis is not known"
        return Passing(_but(len(shape), int(axis)), reason)

    return passing


def _fourier(node: ir.Node) -> Passing | str:
    found = _given_axis("a transform mixes all positions", 2, -2 if shapes.opset(node) >= 20 else 1)(node)
    if isinstance(found, str):
        return found
    last = len(_shape(node, 0) or ()) - 1
    return Passing({axis: places for axis, places in found.axes.items() if axis != last}, found.reason)


def _last_two(reason: str) -> Callable[[ir.Node], Passing | str]:
    def passing(node: ir.Node) -> Passing | str:
        shape = _shape(node, 0)
        return "the rank of its input is unknown" if shape is None else Passing(_but(len(shape), -2, -1), reason)

    return passing


def _compress(node: ir.Node) -> Passing | str:
    shape = _shape(node, 0)
    if shape is None or "axis" not in node.attributes:
        return "its condition chooses among all elements"
    return Passing(_but(len(shape), _axis(node, len(shape))), "a condition chooses positions", constants=True)


def _reverse_sequence(node: ir.Node) -> Passing | str:
    shape = _shape(node, 0)
    if shape is None:
        return "the rank of its input is unknown"
    mixed = (int(node.attributes.get_int("time_axis", 0) or 0), int(node.attributes.get_int("batch_axis", 1) or 0))
    return Passing(_but(len(shape), *mixed), "sequences are turned by their lengths", constants=True)


def _center_crop_pad(node: ir.Node) -> Passing | str:
    shape = _shape(node, 0)
    if shape is None:
        return "the rank of its input is unknown"
    mixed = node.attributes.get_ints("axes", None) or range(len(shape))
    return Passing(_but(len(shape), *mixed), "positions are cut off or padded")


def _elements(*operands: int, data: Sequence[int]) -> Callable[[ir.Node], Passing | str]:
    """GatherElements, ScatterElements: operands of the same rank, position by position but along one axis."""

    def passing(node: ir.Node) -> Passing | str:
        known = [_shape(node, operand) for operand in operands]
        first = known[0]
        if first is None or any(shape is None or len(shape) != len(first) for shape in known):
            return "the rank of an operand is unknown"
        axis = _axis(node, len(first))
        axes = {
            a: dict.fromkeys(operands, a)
            for a in range(len(first))
            if a != axis and isinstance(first[a], int) and all((shape or ())[a] == first[a] for shape in known)
        }
        constants = str(node.attributes.get_string("reduction", "none")) == "none"
        return Passing(axes, "an index chooses positions", data, constants)

    return passing


def _scatter_nd(node: ir.Node) -> Passing | str:
    data, indices, updates = (_shape(node, k) for k in range(3))
    if data is None or updates is None or not indices or not isinstance(indices[-1], int):
        return "the rank of an operand is unknown"
    indexed, outer = indices[-1], len(indices) - 1
    axes = {axis: {0: axis, 2: outer + axis - indexed} for axis in range(indexed, len(data))}
    constants = str(node.attributes.get_string("reduction", "none")) == "none"
    return Passing(axes, "an index chooses positions", (0, 2), constants)


def _gather_nd(node: ir.Node) -> Passing | str:
    data, indices = _shape(node, 0), _shape(node, 1)
    if data is None or not indices or not isinstance(indices[-1], int):
        return "the rank of an operand is unknown"
    first = int(node.attributes.get_int("batch_dims", 0) or 0) + indices[-1]
    axes = {len(indices) - 1 + axis - first: {0: axis} for axis in range(first, len(data))}
    return Passing(axes, "an index chooses positions", constants=True)


def _tensor_scatter(node: ir.Node) -> Passing | str:
    cache, update = _shape(node, 0), _shape(node, 1)
    if cache is None or update is None or len(cache) != len(update):
        return "the rank of an operand is unknown"
    axis = _axis(node, len(cache), -2)
    axes = {a: {0: a, 1: a} for a in range(1, len(cache)) if a != axis}
    return Passing(axes, "positions are written one after the other", (0, 1), True)


_TABLE: dict[str, Callable[[ir.Node], Passing | str]] = {
    "TopK": _one_axis("the largest of all positions are chosen", -1, constants=True),
    "CumProd": _given_axis("a product runs over all positions", 1, None),
    "DFT": _fourier,
    "Trilu": _last_two("positions are chosen by their place"),
    "Compress": _compress,
    "ReverseSequence": _reverse_sequence,
    "CenterCropPad": _center_crop_pad,
    "GatherElements": _elements(0, 1, data=(0,)),
    "ScatterElements": _elements(0, 1, 2, data=(0, 2)),
    "Scatter": _elements(0, 1, 2, data=(0, 2)),
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
}


@rule
class AxesApart(OpRule):
    """Some axes are indexed, sorted or mixed and stay; the others pass position by position."""

    ops = tuple(_TABLE)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, found = where(node), _TABLE[node.op_type](node)
        if isinstance(found, str):
            g.freeze_node(node, f"{name}: {found}")
            return
        operands = {
            index: g.operand(node, index, role="producer" if index in found.data else "follower")
            for index, value in enumerate(node.inputs)
            if value is not None
        }
        for operand, labels in operands.items():
            passing = [places[operand] for places in found.axes.values() if operand in places]
            g.freeze(labels, f"{name}: {found.reason}", but=passing)
        result = {}
        for axis, places in found.axes.items():
            sides = [operands[operand].get(own, ()) for operand, own in places.items()]
            if any(sides):
                result[axis] = sides[0]
                for other in sides[1:]:
                    result[axis] = g.equate(result[axis], other, f"{name}: meets an operand that is never shortened")
        for output in node.outputs:
            g.set(output, result)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        found, output = _TABLE[node.op_type](node), node.outputs[0]
        if isinstance(found, str):
            return
        for axis in d.axes(output):
            places = found.axes.get(axis, {})
            held = [d.operand(node, operand, places[operand]) for operand in found.data if operand in places]
            known = [values for values in held if values is not None]
            if len(known) == len(found.data):
                agree = np.logical_and.reduce([values == known[0] for values in known])
                agree &= (known[0] == 0) | found.constants
                d.set(output, axis, np.where(agree, known[0], np.nan))


@rule
class CastLike(OpRule):
    """The first operand in the type of the second, of which nothing else is read."""

    ops = ("CastLike",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        g.of(node.inputs[1])
        g.set(node.outputs[0], g.operand(node, 0, role="producer"))

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None:
                kind = node.outputs[0].dtype
                real = kind is not None and kind.is_floating_point()
                d.set(node.outputs[0], axis, values if real else np.where(values == 0, 0.0, np.nan))
