"""What a model costs: nodes, parameters, bytes, multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import CostView, OpRule, rule_for


@dataclass(frozen=True)
class ModelStats:
    """Size and work of a model.

    Attributes:
        nodes: in the main graph and all subgraphs; constants do not count as nodes.
        parameters: elements of all floating-point and quantised weights.
        bytes: of all constant tensors.
        macs: multiply-accumulates of the main graph's convolutions and matrix products at the recorded shapes, a named
            symbolic dimension counted as 1 (so per sample for a symbolic batch); None where a shape is unknown.
        ops: nodes by operator.
    """

    nodes: int
    parameters: int
    bytes: int
    macs: int | None
    ops: dict[str, int]


def model_stats(model: ir.Model) -> ModelStats:
    """Count a model. Weights are not read."""
    ops: Counter[str] = Counter()
    parameters = size = 0
    tensors: dict[int, ir.TensorProtocol] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                tensors[id(value.const_value)] = value.const_value
    for node in model.graph.all_nodes():
        if node.op_type == "Constant":
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    tensors[id(attribute.value)] = attribute.as_tensor()
        else:
            ops[node.op_type] += 1
    for tensor in tensors.values():
        size += tensor.nbytes
        if tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8:
            parameters += tensor.size
    return ModelStats(sum(ops.values()), parameters, size, _macs(model), dict(sorted(ops.items())))


def _macs(model: ir.Model) -> int | None:
    view = CostView(lambda node, index, axis: (), lambda value, axis: ())
    total = 0.0
    for node in model.graph:
        handler = rule_for(node)
        if handler is None or type(handler).cost is OpRule.cost:
            continue
        products = handler.cost(node, view)
        if not products and any(shapes.static_dims(v) is None for v in (*node.inputs, *node.outputs) if v is not None):
            return None
        total += sum(coefficient for coefficient, _ in products)
    return int(np.rint(total))
