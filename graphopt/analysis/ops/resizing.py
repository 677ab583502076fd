"""Resize, Upsample and GridSample: spatial axes are interpolated, batch and channels pass."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where
from graphopt.analysis.size_vectors import set_sizes


def _sized(node: ir.Node, rank: int) -> list[int]:
    """The axes that scales and sizes belong to, in their order (`axes` since opset 18)."""
    given = node.attributes.get_ints("axes", None)
    return list(range(rank)) if given is None else [axis % rank for axis in given]


def _scales(node: ir.Node, rank: int) -> dict[int, float]:
    """Axis -> scale, where scales are given and constant."""
    listed = node.attributes.get_floats("scales", None)
    place = 1 if node.op_type == "Upsample" or len(node.inputs) == 2 else 2
    array = shapes.constant(node.inputs[place]) if place < len(node.inputs) else None
    scales = listed if listed is not None else [] if array is None else [float(scale) for scale in array.ravel()]
    return dict(zip(_sized(node, rank), scales, strict=False))


@rule
class Resize(OpRule):
    """Axes of scale 1 pass. Interpolating a constant gives that constant, except where it extrapolates."""

    ops = ("Resize", "Upsample")

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        before, after = (
            shapes.dims(node.inputs[0]) if node.inputs[0] is not None else None,
            shapes.dims(node.outputs[0]),
        )
        passing = []
        # Cropping may move an axis that keeps its size.
        if before is not None and node.attributes.get_string("coordinate_transformation_mode") != "tf_crop_and_resize":
            scales = _scales(node, len(before))
            passing = [a for a in x if after is not None and before[a] == after[a] and scales.get(a, 1.0) == 1.0]
        g.freeze(x, f"{where(node)}: the axis is interpolated", but=passing)
        g.set(node.outputs[0], {a: x[a] for a in passing})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None:
                d.set(node.outputs[0], axis, values)

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        rank = len(shapes.dims(node.outputs[0]) or ())
        if node.op_type == "Resize" and rank:
            set_sizes(r, node, 3, _sized(node, rank))


@rule
class GridSample(OpRule):
    """Samples each channel at the positions of a grid."""

    ops = ("GridSample",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        g.freeze(x, f"{where(node)}: the axis is sampled", but=(1,))
        g.freeze(g.operand(node, 1), f"{where(node)}: grid positions are no units")
        g.set(node.outputs[0], {a: x[a] for a in (1,) if a in x})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        if 1 in d.axes(node.outputs[0]):
            values = d.operand(node, 0, 1)
            zeros = node.attributes.get_string("padding_mode", "zeros") == "zeros"
            if values is not None:
                import numpy as np

                d.set(node.outputs[0], 1, np.where(values == 0, 0.0, np.nan) if zeros else values)
