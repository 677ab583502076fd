"""Weights as the matrices that a `Rounding` sees, and integers back in the shape of the weight.

The form is that of `graphopt.rewriting.layers.Layer.weight`, for every weight that has integer kernels: also shared
ones, those of batched products, and constants on the left of a MatMul, which are no layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def to_matrices(node: ir.Node, index: int, weight: Array) -> Array:
    """A weight as (groups, rows, columns): a row an output channel of a group, a column an input channel of it.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        index: which input of `node` the weight is.
        weight: what that input holds.
    """
    match node.op_type:
        case "Conv":
            groups = _groups(node)
            return weight.reshape(groups, weight.shape[0] // groups, -1)
        case "ConvTranspose":
            groups, inputs, outputs, *kernel = _transposed_shape(node, weight)
            blocks = _mirrored(weight.reshape(groups, inputs, outputs, *kernel))
            return blocks.swapaxes(1, 2).reshape(groups, outputs, -1)
        case "Gemm":
            return (weight if node.attributes.get_int("transB", 0) else weight.T)[None]
    if weight.ndim == 1:
        return weight[None, None]
    batch = weight.reshape(-1, *weight.shape[-2:])
    return batch if index == 0 else batch.swapaxes(1, 2)


def from_matrices(node: ir.Node, index: int, matrices: Array, like: Array) -> Array:
    """Other numbers in the place of those that `to_matrices` was given: contiguous, of the shape of `like`."""
    match node.op_type:
        case "ConvTranspose":
            groups, inputs, outputs, *kernel = _transposed_shape(node, like)
            found = _mirrored(matrices.reshape(groups, outputs, inputs, *kernel).swapaxes(1, 2))
        case "Gemm":
            found = matrices[0] if node.attributes.get_int("transB", 0) else matrices[0].T
        case "MatMul" if index == 1 and like.ndim > 1:
            found = matrices.swapaxes(1, 2)
        case _:
            found = matrices
    return np.ascontiguousarray(found.reshape(like.shape))


def _groups(node: ir.Node) -> int:
    return int(node.attributes.get_int("group", 1) or 1)


def _transposed_shape(node: ir.Node, weight: Array) -> tuple[int, ...]:
    """(groups, inputs of a group, outputs of a group, *kernel) of a ConvTranspose."""
    groups = _groups(node)
    return (groups, weight.shape[0] // groups, *weight.shape[1:])


def _mirrored(blocks: Array) -> Array:
    """The kernel of the convolution that a transposed one is, on an input with zeros between its pixels."""
    return np.flip(blocks, axis=tuple(range(3, blocks.ndim)))
