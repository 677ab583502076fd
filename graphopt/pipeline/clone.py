"""A copy of a model that a pass may change freely: nodes, values and types are its own, weights are shared."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def private_clone(model: ir.Model) -> ir.Model:
    """Copy a model in time proportional to its nodes.

    `ir.Model.clone` shares the type objects, whose dtype a pass may set in place; here they are copied as well.
    """
    clone = model.clone()
    for graph in (*clone.graphs(), *(function.graph for function in clone.functions.values())):
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)):
            if value.type is not None:
                value.type = copy.deepcopy(value.type)
    return clone
