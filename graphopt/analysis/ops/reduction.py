"""Reductions and pooling.

A reduced axis ends here: zeros add nothing to a sum (or a norm), so a dead unit of value 0 may leave it; a mean over n
positions of which k stay is the mean over k times k / n. A maximum sees zeros, so its axis keeps its length.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where

_SUMS = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMean")
_OTHERS = ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp", "ArgMax", "ArgMin")


def reduced_axes(node: ir.Node) -> tuple[list[int], bool] | None:
    """(axes, keepdims) of a reduction; None where they are computed."""
    source = node.inputs[0]
    shape = shapes.dims(source) if source is not None else None
    if shape is None:
        return None
    keep = bool(node.attributes.get_int("keepdims", 1))
    if node.op_type in {"ArgMax", "ArgMin"}:
        return [int(node.attributes.get_int("axis", 0) or 0) % max(len(shape), 1)], keep
    given = node.attributes.get_ints("axes", None)
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = shapes.ints(node.inputs[1])
        if given is None:
            return None
    if not given:
        return ([] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(len(shape)))), keep
    return sorted({axis % max(len(shape), 1) for axis in given}), keep


@rule
class Reduce(OpRule):
    """Reductions over axes given by attribute or input."""

    ops = (*_SUMS, *_OTHERS)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        source = node.inputs[0]
        found = reduced_axes(node)
        if found is None or source is None:
            g.freeze_node(node, f"{name}: its axes are computed")
            return
        axes, keep = found
        x = g.operand(node, 0)
        whole = source.dtype is not None and source.dtype.is_integer()
        if node.op_type == "ReduceMean" and whole:
            g.freeze(x, f"{name}: a mean of integers is rounded", only=axes)
        elif node.op_type in _SUMS:
            for axis in axes:
                if axis in x:
                    g.sink(node, 0, axis, "zero", f"{name}: sums a value that is not zero")
        else:
            g.freeze(x, f"{name}: all positions of the axis are compared", only=axes)
        left = [axis for axis in range(len(shapes.dims(source) or ())) if keep or axis not in axes]
        g.set(node.outputs[0], {left.index(a): f for a, f in x.items() if a not in axes})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        found = reduced_axes(node)
        source = node.inputs[0]
        if found is None or source is None:
            return
        axes, keep = found
        left = [axis for axis in range(len(shapes.dims(source) or ())) if keep or axis not in axes]
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, left[axis])
            if values is None:
                continue
            if node.op_type in {"ReduceMean", "ReduceMax", "ReduceMin"}:
                d.set(node.outputs[0], axis, values)
            elif node.op_type in {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"}:
                d.set(node.outputs[0], axis, np.where(values == 0, 0.0, np.nan))

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        found = reduced_axes(node)
        source = node.inputs[0]
        if node.op_type != "ReduceMean" or found is None or source is None:
            return
        before = after = 1
        for axis in found[0]:
            size = r.size(source, axis)
            if size is not None:
                before, after = before * size, after * r.operand_count(node, 0, axis)
        if after != before:
            r.multiply_output(node, after / before)


@rule
class Pool(OpRule):
    """Pooling over the spatial axes: batch and channels pass."""

    ops = (
        *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
        *("MaxRoiPool", "RoiAlign"),
    )

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        x = g.operand(node, 0)
        g.freeze(x, f"{name}: the axis is pooled over", but=(0, 1))
        if len(node.outputs) > 1 and node.outputs[1].uses():
            g.freeze(x, f"{name}: its indices count every channel")
        for index in range(1, len(node.inputs)):
            g.freeze(g.operand(node, index), f"{name}: regions are no units")
        passing = (1,) if node.op_type in {"MaxRoiPool", "RoiAlign"} else (0, 1)
        g.freeze(x, f"{name}: regions choose the sample", only=[axis for axis in (0,) if axis not in passing])
        g.set(node.outputs[0], {axis: x[axis] for axis in passing if axis in x})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        if 1 not in d.axes(output):
            return
        values = d.operand(node, 0, 1)
        if values is None:
            return
        same = node.op_type in {"MaxPool", "GlobalMaxPool", "GlobalAveragePool"} or (
            node.op_type == "AveragePool" and not node.attributes.get_int("count_include_pad", 0)
        )
        d.set(output, 1, values if same else np.where(values == 0, 0.0, np.nan))
