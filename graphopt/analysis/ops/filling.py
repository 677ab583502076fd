"""Tensors that hold one number everywhere: ConstantOfShape, and what becomes of it when it is only moved.

Exporters write them for initial states and masks whose batch size is not known. They are as long as they are told to
be, so their axes take part in units like those of a parameter, at no cost.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule
from graphopt.analysis.size_vectors import set_sizes

_MOVING = {
    *("Identity", "Slice", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather"),
    *("Split", "Concat"),
}
_LARGEST = 4096
"""Constants with more elements are not looked through."""


def uniform(value: ir.Value | None) -> float | None:
    """The number that every element of a tensor is, by construction; None where that is not known."""
    if value is None:
        return None
    tensor = shapes.constant_tensor(value)
    if tensor is not None:
        array = tensor.numpy() if 0 < tensor.size <= _LARGEST else np.empty(0)
        return float(array.flat[0]) if array.size and (array == array.flat[0]).all() else None
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type == "ConstantOfShape":
        return _filling(node)
    if node.op_type not in _MOVING:
        return None
    found = {uniform(source) for source in (node.inputs if node.op_type == "Concat" else node.inputs[:1])}
    return found.pop() if len(found) == 1 else None


def _filling(node: ir.Node) -> float:
    attribute = node.attributes.get("value")
    return 0.0 if attribute is None else float(attribute.as_tensor().numpy().flat[0])


@rule
class ConstantOfShape(OpRule):
    """A tensor of a given shape, filled with one number."""

    ops = ("ConstantOfShape",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        """Axes of a floating-point tensor are as long as its readers need; integers are shapes, not data."""
        output = node.outputs[0]
        if output.dtype is not None and output.dtype.is_floating_point():
            sizes = enumerate(shapes.dims(output) or ())
            g.set(output, {a: (g.table.fresh(size),) for a, size in sizes if isinstance(size, int) and size > 1})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        for axis in d.axes(node.outputs[0]):
            d.set(node.outputs[0], axis, np.full(d.size(node.outputs[0], axis), _filling(node)))

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        set_sizes(r, node, 0)
