"""QuantizeLinear and DequantizeLinear: the labels of real tensors pass; scales and zero points follow their axis.

y = saturate(round(x / s) + z), x = (q - z) s. A dead position of real value 0 is exactly representable (q = z), so
zeros pass; other constants are rounded and count as unknown. Zeroing a quantised weight writes q = 0, which is the real
value 0 only where its zero point is 0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.labels import Axes
from graphopt.analysis.rules import DeadValues, Labeller, OpRule, rule, where


@rule
class QuantizeLinear(OpRule):
    """Per tensor, per axis; blocked scales freeze the blocked axis."""

    ops = ("QuantizeLinear", "DequantizeLinear")

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        scale = shapes.dims(node.inputs[1]) if node.inputs[1] is not None else None
        if shape is None or scale is None:
            g.freeze_node(node, f"{name}: a rank is unknown")
            return
        x: Axes = g.operand(node, 0, role="producer")
        axis = int(node.attributes.get_int("axis", 1) or 0) % max(len(shape), 1)
        if len(scale) > 1:
            g.freeze(x, f"{name}: the axis is quantised in blocks", only=(axis,))
            for index in range(1, len(node.inputs)):
                g.freeze(g.operand(node, index), f"{name}: scales of blocks")
        else:
            for index in range(1, len(node.inputs)):
                own = g.operand(node, index).get(0, ())
                if own:
                    x[axis] = g.equate(x.get(axis, ()), own, f"{name}: its scales are never shortened")
        g.set(node.outputs[0], x)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        constant = shapes.constant_tensor(node.inputs[0]) is not None and node.op_type == "DequantizeLinear"
        zero_points = shapes.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        centred = len(node.inputs) < 3 or node.inputs[2] is None or (zero_points is not None and not zero_points.any())
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None and (centred or not constant):
                d.set(node.outputs[0], axis, np.where(values == 0, 0.0, np.nan))
