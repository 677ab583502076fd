"""The parts of a written-out LayerNormalization, recognised by what they compute: means, centred tensors, squares.

    mean = ReduceMean(x)    d = x - mean    var = ReduceMean(d^2)    n = d / sqrt(var + eps)    y = n gamma + beta

Exporters write it with Pow or Mul, Div or Reciprocal, with casts between, over the last axis or over channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analysis import shapes


@dataclass(frozen=True)
class Centred:
    """d = x - mean of x along one axis.

    Attributes:
        node: the Sub.
        source: x.
        mean: the ReduceMean.
        axis: not negative.
    """

    node: ir.Node
    source: ir.Value
    mean: ir.Node
    axis: int


def standard(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The producer of a value, where it is one of these operators of the standard domain."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in {"", "ai.onnx"} or node.op_type not in op_types:
        return None
    return node


def uncast(value: ir.Value | None) -> ir.Value | None:
    """What a value is a cast or a copy of."""
    while (node := standard(value, "Cast", "Identity")) is not None:
        value = node.inputs[0]
    return value


def reduced_axes(node: ir.Node) -> tuple[list[int], bool] | None:
    """(axes, keepdims) of a reduction; None where they are computed."""
    source = node.inputs[0]
    shape = shapes.dims(source) if source is not None else None
    if shape is None:
        return None
    keep = bool(node.attributes.get_int("keepdims", 1))
    if node.op_type in {"ArgMax", "ArgMin"}:
        return [int(node.attributes.get_int("axis", 0) or 0) % max(len(shape), 1)], keep
    given = node.attributes.get_ints("axes", None)
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = shapes.ints(node.inputs[1])
        if given is None:
            return None
    if not given:
        return ([] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(len(shape)))), keep
    return sorted({axis % max(len(shape), 1) for axis in given}), keep


def mean_axes(node: ir.Node | None) -> list[int] | None:
    """The axes that a node takes the mean over, keeping them with size 1; None for any other node."""
    if node is None or node.op_type != "ReduceMean" or node.domain not in {"", "ai.onnx"}:
        return None
    found = reduced_axes(node)
    return found[0] if found is not None and found[0] and found[1] else None


def mean_axis(node: ir.Node | None) -> int | None:
    """As `mean_axes`, for a mean over one axis."""
    axes = mean_axes(node)
    return axes[0] if axes is not None and len(axes) == 1 else None


def centred(value: ir.Value | None) -> Centred | None:
    """The view of a value that is a tensor less its mean; None for any other."""
    node = standard(uncast(value), "Sub")
    if node is None:
        return None
    source, mean = node.inputs[0], standard(uncast(node.inputs[1]), "ReduceMean")
    axis = mean_axis(mean)
    if mean is None or axis is None or source is None or uncast(mean.inputs[0]) is not uncast(source):
        return None
    return Centred(node, source, mean, axis)


def square_of(value: ir.Value | None) -> ir.Value | None:
    """x where the value is x^2, written as a power or a product; None for any other."""
    node = standard(uncast(value), "Pow", "Mul")
    if node is None:
        return None
    left, right = node.inputs[0], node.inputs[1]
    if node.op_type == "Pow":
        return left if shapes.scalar(right) == 2 else None
    return left if uncast(left) is uncast(right) else None


def shifted(value: ir.Value | None, axes: Sequence[int] = ()) -> ir.Node | None:
    """The Sub that takes one number from all positions of these axes (at least one axis); None for any other value.

    After a removal what is taken is a scaled mean, so it is not asked whether it is the mean.
    """
    node = standard(uncast(value), "Sub")
    left, right = node.inputs if node is not None else (None, None)
    if left is None or right is None or shapes.constant_tensor(right) is not None:
        return None
    wide, narrow = shapes.dims(left), shapes.dims(right)
    if wide is None or narrow is None or len(wide) != len(narrow):
        return None
    single = [a for a, (many, one) in enumerate(zip(wide, narrow, strict=True)) if one == 1 and many != 1]
    return node if single and all(narrow[axis] == 1 for axis in axes) else None


def variance_of(node: ir.Node) -> ir.Node | None:
    """The Sub of whose result a node takes the mean of squares over the same axes; None for any other node."""
    axes = mean_axes(node)
    return None if axes is None else shifted(square_of(node.inputs[0]), axes)


_TAKING = ("Slice", "Gather")


def gain_index(node: ir.Node) -> int | None:
    """Which operand of a Mul is the constant gain of a normalised tensor; None where the node is no such Mul."""
    if node.op_type != "Mul":
        return None
    for index in (0, 1):
        if shapes.constant_tensor(node.inputs[index]) is not None and _normalised(node.inputs[1 - index]):
            return index
    return None


def _normalised(value: ir.Value | None) -> bool:
    """Whether a value is a centred tensor, divided or multiplied, or groups of channels normalised and put back."""
    inner = standard(uncast(value), "Div", "Mul", "Reshape", *_TAKING)
    if inner is None:
        return False
    if inner.op_type in _TAKING:  # what is left of the channels is taken after a removal
        inner = standard(inner.inputs[0], "Reshape") or inner
    if inner.op_type in {"Reshape", *_TAKING}:
        return standard(inner.inputs[0], "InstanceNormalization") is not None
    sides = inner.inputs if inner.op_type == "Mul" else inner.inputs[:1]
    return any(shifted(side) is not None for side in sides)


def has_gain_behind(norm: ir.Node) -> bool:
    """Whether groups of channels, normalised as one channel each, are put back and get a constant gain by channel."""
    reader = only_reader(norm)
    if reader is None or reader.op_type != "Reshape":
        return False
    taken = only_reader(reader)
    reader = taken if taken is not None and taken.op_type in _TAKING else reader
    behind = [use.node for use in reader.outputs[0].uses()]
    return bool(behind) and all(gain_index(node) is not None for node in behind)


def only_reader(node: ir.Node) -> ir.Node | None:
    """The only node that reads the first result of a node; None where there are several, or a graph gives it away."""
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
