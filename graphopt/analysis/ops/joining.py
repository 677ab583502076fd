"""Concat and Split: labels are joined and cut like the data, so offsets need no bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Axes, Factors
from graphopt.analysis.movement import Move, Movement, same, taking
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where


@rule
class Concat(OpRule):
    """Concat along `axis`; the other axes of all operands are one axis."""

    ops = ("Concat",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        values = [v for v in node.inputs if v is not None]
        known = [shapes.dims(v) for v in values]
        if any(s is None for s in known):
            g.freeze_node(node, f"{name}: the rank of an operand is unknown")
            return
        rank = len(known[0] or ())
        joined = int(node.attributes.get_int("axis", 1) or 0) % max(rank, 1)
        operands = [g.operand(node, index, role="producer") for index in range(len(values))]
        result: Axes = {}
        for axis in range(rank):
            if axis == joined:
                result[axis] = self._join(name, g, operands, [(s or ())[axis] for s in known], axis)
                continue
            factors: Factors = operands[0].get(axis, ())
            for other in operands[1:]:
                if factors or other.get(axis):
                    factors = g.equate(factors, other.get(axis, ()), f"{name}: an operand is never shortened")
            result[axis] = factors
        g.set(node.outputs[0], result)

    @staticmethod
    def _join(name: str, g: Labeller, operands: list[Axes], sizes: list[shapes.Dim], axis: int) -> Factors:
        if not any(axis in operand for operand in operands):
            return ()
        if not all(isinstance(size, int) for size in sizes):
            for operand in operands:
                g.freeze(operand, f"{name}: joined with an axis of unknown size", only=(axis,))
            return ()
        count = max(len(operand.get(axis, ())) for operand in operands)
        columns = []
        for place in range(count):
            parts = []
            for operand, size in zip(operands, sizes, strict=True):
                own = operand.get(axis, ())
                parts.append(own[place] if place < len(own) else np.zeros(int(size or 0), dtype=np.int64))
            columns.append(np.concatenate(parts))
        return tuple(columns)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        rank = len(shapes.dims(output) or ())
        joined = int(node.attributes.get_int("axis", 1) or 0) % max(rank, 1)
        for axis in d.axes(output):
            parts = []
            for index, value in enumerate(node.inputs):
                found = d.operand(node, index, axis)
                size = (shapes.dims(value) or ())[axis] if value is not None else None
                parts.append(found if found is not None else np.full(size if isinstance(size, int) else 0, np.nan))
            if axis == joined:
                values = np.concatenate(parts)
            else:
                first = parts[0]
                agree = (
                    np.logical_and.reduce([p == first for p in parts]) if len({len(p) for p in parts}) == 1 else None
                )
                values = np.full(len(first), np.nan) if agree is None else np.where(agree, first, np.nan)
            if len(values) == d.size(output, axis):
                d.set(output, axis, values)


def split_sizes(node: ir.Node) -> tuple[int, list[int]] | None:
    """(axis, sizes) of a Split; None where they are computed."""
    source = node.inputs[0]
    shape = shapes.dims(source) if source is not None else None
    if shape is None:
        return None
    axis = int(node.attributes.get_int("axis", 0) or 0) % len(shape)
    given = list(node.attributes.get_ints("split", ()) or ())
    if not given and len(node.inputs) > 1 and node.inputs[1] is not None:
        found = shapes.ints(node.inputs[1])
        if found is None:
            return None
        given = found
    if not given:
        size, parts = shape[axis], len(node.outputs)
        if not isinstance(size, int):
            return None
        each = -(-size // parts)
        given = [min(each, size - k * each) for k in range(parts)]
    return axis, given


@rule
class Split(Movement):
    """Split along `axis` in parts of given sizes."""

    ops = ("Split",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        found = split_sizes(node)
        if found is None:
            axis = int(node.attributes.get_int("axis", 0) or 0)
            rank = len(shapes.dims(node.inputs[0]) or ()) if node.inputs[0] is not None else 0
            return [Move(a, (a,), same) for a in axes if rank and a != axis % rank]
        axis, sizes = found
        start = sum(sizes[:output])
        part = slice(start, start + sizes[output])
        return [Move(a, (a,), taking(part) if a == axis else same) for a in axes]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        found = split_sizes(node)
        mask = None if found is None else r.operand_mask(node, 0, found[0])
        if found is None or mask is None:
            return
        _, sizes = found
        edges = np.cumsum([0, *sizes])
        left = [int(mask[a:b].sum()) for a, b in pairwise(edges)]
        if shapes.opset(node) < 13:
            node.attributes.add(ir.AttrInt64s("split", left))
        else:
            node.attributes.pop("num_outputs", None)
            r.set_input(node, 1, np.asarray(left, dtype=np.int64))
