"""QuantizeLinear and DequantizeLinear: the labels of real tensors pass; scales and zero points follow their axis.

y = saturate(round(x / s) + z), x = (q - z) s. A dead position of real value 0 is exactly representable (q = z), so it
becomes z and comes back as 0; other constants are rounded and count as unknown. Zeroing a quantised weight writes
q = 0, which is the real value -z s.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats
from graphopt.analysis.labels import Axes
from graphopt.analysis.rules import Labeller, OpRule, rule, where


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
        x: Axes = dict(g.operand(node, 0, role="producer"))
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
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is None:
                continue
            zero = _per_position(node, 2, axis, len(values), d)
            if node.op_type == "QuantizeLinear":
                d.set(node.outputs[0], axis, np.where(values == 0, zero, np.nan))
            else:
                scale = _per_position(node, 1, axis, len(values), d)
                d.set(node.outputs[0], axis, np.where(values == zero, 0.0, (values - zero) * scale))


def _per_position(node: ir.Node, index: int, axis: int, size: int, d: DeadValues) -> Floats:
    """A scale or zero point at each position of an axis; NaN where it is unknown or belongs to another axis."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return np.zeros(size)
    shape = shapes.dims(value)
    source = node.inputs[0]
    rank = len(shapes.dims(source) or ()) if source is not None else 0
    own = axis == int(node.attributes.get_int("axis", 1) or 0) % max(rank, 1)
    if own and shape and len(shape) == 1 and shape[0] != 1:
        found = d.operand(node, index, 0)
        return np.full(size, np.nan) if found is None else found
    array = shapes.constant(value)
    uniform = array is not None and array.size and (array == array.ravel()[0]).all()
    return np.full(size, float(array.ravel()[0]) if array is not None and uniform else np.nan)
