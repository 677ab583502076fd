"""Work between the layers: activations, norms, softmax, copies, which shrink and vanish with what they work on.

A node that is no linear layer costs what it writes: a number per element, whatever the operator. That is rough, and
only deals out what the layers of a measured model leave of its time; the whole model is measured again once it is
chosen. But without it, erasing an attention branch would seem to save its projections and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import node_key
from graphopt.analysis.units import Coupling
from graphopt.pruning.work import Product

FREE = frozenset({"Constant", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that hand their input on as it lies in memory."""


def passing(model: ir.Model, coupling: Coupling, layers: Collection[str]) -> list[Product]:
    """Elements that each other node of the main graph writes, as a function of the units alive.

    Args:
        model: with inferred shapes, of the same names as the one `coupling` was made of.
        coupling: tells which axes can shrink.
        layers: keys of the nodes that have terms of their own.
    """
    found = []
    for node in model.graph:
        if node_key(node) in layers or node.op_type in FREE:
            continue
        for value in node.outputs:
            sizes = shapes.static_dims(value)
            if sizes is None or value.dtype is None or not value.dtype.is_floating_point():
                continue
            units = {axis: coupling.axis_units(value.name or "", axis) for axis in range(len(sizes))}
            axes = tuple(np.stack(factors) for factors in units.values() if factors)
            fixed = float(np.prod([size for axis, size in enumerate(sizes) if not units[axis]]))
            found.append(Product(fixed, axes, frozenset({node_key(node)})))
    return found
