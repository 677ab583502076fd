"""What a model costs: nodes, parameters, bytes, multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import CostView, OpRule, rule_for
from graphopt.rewriting.scopes import bodies

PACKED_INPUTS = (("MatMulNBits", 1), ("GatherBlockQuantized", 0))
"""Inputs of ONNX Runtime's operators that hold weights in blocks."""


@dataclass(frozen=True)
class ModelStats:
    """Size and work of a model.

    Attributes:
        nodes: in the main graph and all subgraphs; constants do not count as nodes.
        parameters: elements of all floating-point and quantised weights, two for a byte that holds two.
        bytes: of all constant tensors.
        macs: multiply-accumulates of convolutions and matrix products at the recorded shapes, a named symbolic
            dimension counted as 1 (so per sample for a symbolic batch); None where a shape is unknown, or where such
            nodes stand in the body of an If, Loop or Scan of which only the data tells how often it runs.
        ops: nodes by operator.
        macs_unknown: why `macs` is None, and what to try.
    """

    nodes: int
    parameters: int
    bytes: int
    macs: int | None
    ops: dict[str, int]
    macs_unknown: str | None = None


def model_stats(model: ir.Model) -> ModelStats:
    """Count a model. Weights are not read."""
    ops: Counter[str] = Counter()
    parameters = size = 0
    tensors: dict[int, ir.TensorProtocol] = {}
    pairs: set[int] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                tensors[id(value.const_value)] = value.const_value
                if _holds_pairs(value):
                    pairs.add(id(value.const_value))
    for node in model.graph.all_nodes():
        if node.op_type == "Constant":
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    tensors[id(attribute.value)] = attribute.as_tensor()
        else:
            ops[node.op_type] += 1
    for key, tensor in tensors.items():
        size += tensor.nbytes
        if tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8:
            parameters += tensor.size * (2 if key in pairs else 1)
    macs, unknown = _macs(model)
    return ModelStats(sum(ops.values()), parameters, size, macs, dict(sorted(ops.items())), unknown)


def _holds_pairs(value: ir.Value) -> bool:
    """Whether the bytes of an initializer hold two weights of 4 bits each.

    Kernels for blocks say so by their attribute `bits`; elsewhere the lower half is taken from the bytes modulo 16.
    """
    if value.dtype != ir.DataType.UINT8:
        return False
    for use in value.uses():
        node = use.node
        if (node.op_type, use.idx) in PACKED_INPUTS and node.domain == "com.microsoft":
            return node.attributes.get_int("bits", 4) == 4
        if node.op_type == "Cast" and any(_takes_lower_half(u.node) for u in node.outputs[0].uses()):
            return True
    return False


def _takes_lower_half(node: ir.Node) -> bool:
    base = shapes.constant(node.inputs[1]) if node.op_type == "Mod" else None
    return base is not None and base.size == 1 and float(base.item()) == 16


def _macs(model: ir.Model) -> tuple[int | None, str | None]:
    """MACs, or None and the reason."""
    try:
        return int(np.rint(_work(model, model.graph))), None
    except _UnknownError as unknown:
        return None, str(unknown)


class _UnknownError(Exception):
    """Work that cannot be counted, and why."""


def _work(model: ir.Model, graph: ir.Graph) -> float:
    """MACs of one run of a graph."""
    view = CostView(lambda node, index, axis: (), lambda value, axis: ())
    total = 0.0
    for node in graph:
        handler = rule_for(node)
        runs = dict(handler.bodies(node)) if handler is not None else {}
        for body in bodies(node):
            times = runs.get(body)
            costed = next((n for n in body.all_nodes() if _costed(n) is not None), None)
            if times is not None:
                total += times * _work(model, body)
            elif costed is not None:
                raise _UnknownError(
                    f"{costed.op_type} {costed.name or '(unnamed)'} stands in the body of an If, Loop or Scan, "
                    "and how often that runs depends on the data"
                )
        if handler is None or _costed(node) is None:
            continue
        products = handler.cost(node, view)
        if not products and any(shapes.static_dims(v) is None for v in (*node.inputs, *node.outputs) if v is not None):
            raise _UnknownError(_unknown_shape(model, node))
        total += sum(coefficient for coefficient, _ in products)
    return total


def _costed(node: ir.Node) -> OpRule | None:
    """The rule of a node that multiplies and accumulates; None for any other."""
    handler = rule_for(node)
    return None if handler is None or type(handler).cost is OpRule.cost else handler


def _unknown_shape(model: ir.Model, node: ir.Node) -> str:
    value = next(v for v in (*node.inputs, *node.outputs) if v is not None and shapes.static_dims(v) is None)
    known = shapes.dims(value)
    what = "the number of dimensions" if known is None else f"the size of dimension {known.index(None)}"
    text = f"{what} of tensor {value.name} at {node.op_type} {node.name or '(unnamed)'} is not known"
    free = dict.fromkeys(d for v in model.graph.inputs for d in shapes.dims(v) or () if isinstance(d, str))
    if not free:
        return text
    return f"{text}; fix the free input dimensions: {' '.join(f'--dim {name}=SIZE' for name in free)}"
