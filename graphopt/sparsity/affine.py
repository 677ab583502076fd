"""Scales and shifts, one number a channel, that stand in front of wrappers: constants, and the affine of norms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import float64
from graphopt.rewriting.edit import cannot_replace, drop_if_unused, remove_node, replace_value, set_constant
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx
from graphopt.sparsity.wrappers import Floats, Wrapper

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Norms with a scale as second input, and perhaps a shift as third."""


@dataclass(frozen=True)
class Affine:
    """scale n + shift, computed by one node.

    Attributes:
        node: Mul, Div, Add, Sub, or a norm.
        data: index of n; None for a norm, which stays without its affine.
        scale, shift: one number a channel.
    """

    node: ir.Node
    data: int | None
    scale: Floats
    shift: Floats

    def remove(self, names: Names) -> None:
        """Leave n, or the norm without scale and shift."""
        if self.data is not None:
            value = self.node.inputs[self.data]
            assert value is not None  # `affine_in_front` checked it
            replace_value(self.node.outputs[0], value)
            remove_node(self.node)
            return
        set_constant(self.node, 1, np.ones_like(self.scale), names, [])
        if len(self.node.inputs) > 2:
            shift = self.node.inputs[2]
            self.node.resize_inputs(2)
            drop_if_unused(shift)


def affine_in_front(node: ir.Node, w: Wrapper) -> Affine | None:
    """The constant scale or shift, one number a channel, that a node applies in front of a wrapper."""
    count, size = w.blocks.shape[:2]
    channels, ones, zeros = count * size, np.ones(count * size), np.zeros(count * size)
    if node.op_type in NORMS and not w.convolution and node.attributes.get_int("axis", -1) in (-1, _rank(w) - 1):
        scale = float64(node.inputs[1])
        shift = float64(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else zeros
        if scale is None or shift is None or scale.shape != (channels,) or shift.shape != (channels,):
            return None
        return None if (scale == 1).all() and not shift.any() else Affine(node, None, scale, shift)
    if not is_onnx(node, "Mul", "Div", "Add", "Sub"):
        return None
    for data in (0,) if is_onnx(node, "Div", "Sub") else (0, 1):
        operand, value = node.inputs[1 - data], node.inputs[data]
        numbers = float64(operand)
        if numbers is None or value is None or value.shape is None or node.outputs[0].shape != value.shape:
            continue
        line = _per_channel(numbers, channels, w)
        if line is None or cannot_replace(node.outputs[0], value):
            continue
        match node.op_type:
            case "Mul":
                return Affine(node, data, line, zeros)
            case "Div":
                return Affine(node, data, 1 / line, zeros) if line.all() else None
            case "Add":
                return Affine(node, data, ones, line)
            case _:
                return Affine(node, data, ones, -line)
    return None


def _rank(w: Wrapper) -> int:
    """Rank of what a wrapper reads."""
    return len(w.source.shape or ())


def _per_channel(numbers: Floats, channels: int, w: Wrapper) -> Floats | None:
    rank, axis = _rank(w), 1 if w.convolution else _rank(w) - 1
    shape = (1,) * (rank - numbers.ndim) + numbers.shape
    if len(shape) != rank or any(n != 1 for a, n in enumerate(shape) if a != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(numbers.reshape(-1), channels).astype(np.float64)
