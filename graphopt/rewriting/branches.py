"""Branches of a sum that are linear maps of one tensor, and how one of them holds the others.

    W x + V x + x + (B A) x + ...  =  (W + V' + I' + B A) x

V' is V in the windows of W: its taps where W has taps for the same places, zeros elsewhere. A node of W can hold V if
both step alike, give equally many positions, and every tap of V falls on one of W; groups of W may be coarser. The
identity is a 1x1 kernel of as many groups as channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.affine import arithmetic_affine, inference_affine, per_channel
from graphopt.rewriting.constants import Float64, constant, float64
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.linear import Linear, linear_giving
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.products import composable, composed, composed_size, regrouped
from graphopt.rewriting.windows import Windows, windows


@dataclass(frozen=True)
class Branch:
    """A linear map of the tensor that a sum's branches share.

    Attributes:
        weight: (groups, outputs per group, inputs per group, kernel positions); an array of its own.
        bias: (outputs,).
        windows: of a convolution; all empty for a matrix product.
        transposed: whether it is a transposed convolution; None where it is pointwise and may stand for either.
    """

    weight: Float64
    bias: Float64
    windows: Windows
    transposed: bool | None = None


def branch_of(value: ir.Value, base: Linear, opset: int) -> Branch | str | None:
    """`value` as a linear map of what `base` reads; the reason where it nearly is one, None where it is not.

    Followed are: the input itself, an average pool, a linear operator, two of them in a row (LoRA), and
    BatchNormalization or arithmetic with constants behind any of these.
    """
    source = base.input
    if value is source:
        return _identity(base) if base.inputs == base.outputs else None
    node = value.producer()
    if node is None or node.graph is not base.node.graph:
        return None
    if is_onnx(node, "AveragePool"):
        return _average(node, base) if node.inputs[0] is source else None
    last = linear_giving(value, opset=opset, shared=True)
    if isinstance(last, Linear):
        return _direct(last) if last.input is source else _in_a_row(last, base, opset)
    if isinstance(last, str) or not is_onnx(node, "BatchNormalization", "Mul", "Div", "Add", "Sub"):
        return None
    return _scaled(node, base, opset)


def embedded(branch: Branch, base: Linear) -> Float64 | str:
    """The weight of `branch`, or a new array, in the layout of the weight of `base`; or why it does not fit there."""
    outer = base_windows(base)
    if isinstance(outer, str):
        return outer
    groups, outputs, inputs, _ = branch.weight.shape
    if groups % base.groups or groups * inputs != base.inputs or groups * outputs != base.outputs:
        return "the branch connects channels that the largest one does not"
    inner = branch.windows
    transposed = is_onnx(base.node, "ConvTranspose")
    if branch.transposed is not None and branch.transposed != transposed:
        return "one of the branches is a transposed convolution"
    if inner.strides != outer.strides or inner.excess != outer.excess:
        return "the branches have other strides or other sizes"
    axes = zip(inner.kernel, inner.dilations, inner.begins, outer.kernel, outer.dilations, outer.begins, strict=True)
    taps = []
    for k, d, b, wide, step, begin in axes:
        places = [t * d - b + begin for t in range(k)]
        if any(p % step or not 0 <= p // step < wide for p in places):
            return "its kernel does not lie within the largest one"
        taps.append([p // step for p in places])
    if not taps:
        return regrouped(branch.weight, base.groups)
    index = np.ravel_multi_index(np.ix_(*taps), outer.kernel).ravel()
    wide_weight = np.zeros((groups, outputs, inputs, math.prod(outer.kernel)))
    wide_weight[..., index] = branch.weight
    return regrouped(wide_weight, base.groups)


def base_windows(linear: Linear) -> Windows | str:
    """Windows of a linear operator; empty ones for Gemm and MatMul."""
    if is_onnx(linear.node, "ConvTranspose") and (
        "output_shape" in linear.node.attributes or "output_padding" in linear.node.attributes
    ):
        return "a transposed convolution with an output size of its own"
    if is_onnx(linear.node, "ConvTranspose") and linear.node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "a transposed convolution with auto_pad"
    return windows(linear.node, linear.kernel)


def _identity(base: Linear) -> Branch | str:
    rank = len(base.kernel)
    ones, zeros = (1,) * rank, (0,) * rank
    weight = np.ones((base.inputs, 1, 1, 1))
    return Branch(weight, np.zeros(base.outputs), Windows(ones, ones, ones, zeros, zeros))


def _average(node: ir.Node, base: Linear) -> Branch | str | None:
    """An average over windows: a kernel of equal numbers for each channel, where it counts its padding."""
    kernel = tuple(node.attributes.get_ints("kernel_shape", ()))
    if not is_onnx(base.node, "Conv") or base.inputs != base.outputs or len(kernel) != len(base.kernel):
        return None
    found = windows(node, kernel)
    if isinstance(found, str):
        return found
    if node.attributes.get_int("ceil_mode", 0) or (
        found.padded and not node.attributes.get_int("count_include_pad", 0)
    ):
        return "an average that does not count its padding has other weights at the border"
    positions = math.prod(kernel)
    return Branch(np.full((base.inputs, 1, 1, positions), 1 / positions), np.zeros(base.outputs), found, False)


def _direct(linear: Linear) -> Branch | str:
    found = base_windows(linear)
    if isinstance(found, str):
        return found
    transposed = is_onnx(linear.node, "ConvTranspose") if linear.kernel else None
    return Branch(linear.matrices(), linear.bias(), found, transposed)


def _in_a_row(second: Linear, base: Linear, opset: int) -> Branch | str | None:
    between = second.input
    first = linear_giving(between, opset=opset, shared=True)
    if not isinstance(first, Linear) or first.input is not base.input or not sole_use(between):
        return None
    reason = composable(first, second)
    if reason:
        return reason
    inner, outer = _direct(first), _direct(second)
    if isinstance(inner, str) or isinstance(outer, str):
        return inner if isinstance(inner, str) else outer
    if inner.transposed or outer.transposed:
        return "two operators in a row, one of them a transposed convolution"
    if composed_size(first, second) > base.weight_size:
        return "the branch connects channels that the largest one does not"
    weight, bias = composed(first, second)
    wide, other = (inner, outer) if outer.windows.pointwise else (outer, inner)
    strides = tuple(a * b for a, b in zip(wide.windows.strides, other.windows.strides, strict=True))
    return Branch(weight, bias, replace(wide.windows, strides=strides), inner.transposed)


def _scaled(node: ir.Node, base: Linear, opset: int) -> Branch | str | None:
    """BatchNormalization or arithmetic behind a branch."""
    if is_onnx(node, "BatchNormalization"):
        source = node.inputs[0]
        affine = inference_affine(node, opset)
        if is_onnx(base.node, "MatMul"):
            return None
    else:
        sides = [constant(v) for v in node.inputs]
        if len(sides) != 2 or (sides[0] is None) == (sides[1] is None):
            return None
        which = 0 if sides[0] is not None else 1
        source, factor = node.inputs[1 - which], float64(node.inputs[which])
        if factor is None:
            return None
        affine = _in_channels(arithmetic_affine(node, factor, constant_first=which == 0), base)
    if source is None or isinstance(affine, str):
        return None if source is None else str(affine)
    if source is not base.input and not sole_use(source):
        return None
    inner = branch_of(source, base, opset)
    if not isinstance(inner, Branch):
        return inner
    scale, shift = (np.broadcast_to(a, base.outputs) for a in affine)
    weight = inner.weight
    weight *= scale.reshape(weight.shape[0], -1, 1, 1)
    return replace(inner, bias=inner.bias * scale + shift)


def _in_channels(affine: tuple[Float64, Float64] | str, base: Linear) -> tuple[Float64, Float64] | str:
    if isinstance(affine, str):
        return affine
    if is_onnx(base.node, "MatMul"):
        rank = None if base.output.shape is None else len(base.output.shape)
    else:
        rank = 2 + len(base.kernel)
    if rank is None:
        return "the rank of the tensor is not known"
    scale, shift = (per_channel(a, rank, base.channel_axis(rank), base.outputs) for a in affine)
    if scale is None or shift is None:
        return "a constant in it is not one number per channel"
    return scale, shift
