"""What a fold of constants adds to a model and what it frees, in bytes and nodes: `fold` grows neither."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.rewriting.constants import Float64, constant
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.linear import Linear
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.size import initializer_bytes, node_bytes

_OVERHEAD = 28
"""Bytes of a new initializer and of an input that reads it, besides its data and twice the name of the weight."""


def grows(linears: list[tuple[Linear, Float64]], node: ir.Node) -> str | None:
    """Why adding biases costs more than `node` does, which goes; None where it does not.

    Args:
        linears: operators and what is added to the input or output of each.
        node: an affine node.
    """
    added = sum(_bias_bytes(linear) for linear, shift in linears if shift.any())
    adds = sum(is_onnx(linear.node, "MatMul") and linear.add is None for linear, shift in linears if shift.any())
    if adds > 1:
        return f"{adds} products would each need an Add for their bias"
    freed = node_bytes(node)
    for value in node.inputs:
        if value is not None and constant(value) is not None and sole_use(value):
            freed += initializer_bytes(value)
    return None if added <= freed else f"new biases would take {added} bytes, and {freed} would go"


def _bias_bytes(linear: Linear) -> int:
    """Bytes of the bias that a linear operator would get; 0 where it has one of its own."""
    holder = linear.add or linear.node
    value = holder.inputs[linear.bias_index] if linear.bias_index < len(holder.inputs) else None
    tensor = constant(linear.node.inputs[1])
    size = int(linear.outputs * (tensor.dtype.itemsize if tensor is not None else 4))
    if value is not None:
        old = constant(value)
        own = old is not None and sole_use(value) is not None
        return max(0, size - old.nbytes) if own and old is not None else size + _OVERHEAD
    weight = linear.node.inputs[1]
    bias = size + 2 * (len(str(weight.name)) if weight is not None else 0) + _OVERHEAD
    return bias + (node_bytes(linear.node) if is_onnx(linear.node, "MatMul") else 0)
