"""Linear maps as data: grouped kernels brought into coarser groups, and two of them, one after the other, as one.

    W2 * (W1 x + b1) + b2 = (W2 W1) x + (b2 + W2 b1)        * a convolution, one of the two with a 1x1 kernel

A kernel of g groups is one of any g' that divides g, with zeros between the groups that fall together.
"""

from __future__ import annotations

import math

import numpy as np

from graphopt.rewriting.constants import Float64
from graphopt.rewriting.linear import Linear
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.windows import Windows, windows


def regrouped(weight: Float64, groups: int) -> Float64:
    """`weight` (groups, outputs per group, inputs per group, positions) in fewer groups, a divisor of what they are."""
    old, outputs, inputs, positions = weight.shape
    if old == groups:
        return weight
    merged = old // groups
    wide = np.zeros((groups, merged, outputs, merged, inputs, positions))
    split = weight.reshape(groups, merged, outputs, inputs, positions)
    for block in range(merged):
        wide[:, block, :, block] = split[:, block]
    return wide.reshape(groups, merged * outputs, merged * inputs, positions)


def composed_size(first: Linear, second: Linear) -> int:
    """Numbers in the weight of `second` after `first`, as one map."""
    groups = math.gcd(first.groups, second.groups)
    positions = max(math.prod(first.kernel), math.prod(second.kernel))
    return second.outputs * first.inputs // groups * positions


def composed(first: Linear, second: Linear) -> tuple[Float64, Float64]:
    """Weight, as `Linear.matrices` gives it, and bias of `second` after `first`; one of the kernels is 1x1."""
    groups = math.gcd(first.groups, second.groups)
    outer, inner = regrouped(second.matrices(), groups), regrouped(first.matrices(), groups)
    # (g, o, m, K) x (g, m, i, 1) or (g, o, m, 1) x (g, m, i, K); matmul runs in BLAS.
    if inner.shape[3] == 1:
        weight = np.moveaxis(np.moveaxis(outer, 3, 1) @ inner[:, None, :, :, 0], 1, 3)
    else:
        weight = np.moveaxis(outer[:, None, :, :, 0] @ np.moveaxis(inner, 3, 1), 1, 3)
    shift = first.bias().reshape(groups, -1, 1)
    return weight, second.bias() + (outer.sum(axis=3) @ shift).ravel()


def composable(first: Linear, second: Linear) -> str | None:
    """Why `second` after `first` is not one operator of the same kind; None where it is."""
    if first.outputs != second.inputs:
        return f"{first.outputs} channels meet {second.inputs}"
    if not first.kernel and not second.kernel:
        return None
    if len(first.kernel) != len(second.kernel):
        return "one of the two is a convolution, the other is not"
    outer, inner = _windows(second), _windows(first)
    if isinstance(outer, str) or isinstance(inner, str):
        return outer if isinstance(outer, str) else str(inner)
    if _plain(first):
        if first.bias().any() and (outer.padded or is_onnx(second.node, "ConvTranspose")):
            return "the padding between the two does not carry the bias of the first"
        if is_onnx(second.node, "Conv") and any(e > 0 for e in outer.excess):
            return "the second has more positions than the first, so that one would cost more"
        return None
    if is_onnx(second.node, "Conv") and outer.pointwise:
        if is_onnx(first.node, "ConvTranspose") and any(s != 1 for s in outer.strides):
            return "a transposed convolution cannot skip positions"
        return None
    return "both have kernels of more than one position, or the second pads what the first gives"


def keeps_second(first: Linear, second: Linear) -> bool:
    """Whether the second node takes over: the one with the larger kernel; without kernels the one that holds a bias."""
    if first.kernel:
        return _plain(first)
    has_room = second.add is not None or is_onnx(second.node, "Gemm")
    return has_room or not (first.add is not None or is_onnx(first.node, "Gemm"))


def _plain(linear: Linear) -> bool:
    """Whether a convolution computes every position of its result from the same position of its input alone."""
    found = _windows(linear)
    plain = isinstance(found, Windows) and found.pointwise and all(s == 1 for s in found.strides)
    return plain and is_onnx(linear.node, "Conv")


def _windows(linear: Linear) -> Windows | str:
    transposed = is_onnx(linear.node, "ConvTranspose")
    # Its padding matters only where it is the pointwise one of the two, and that is always a Conv.
    if transposed and linear.node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "a transposed convolution with auto_pad"
    return windows(linear.node, linear.kernel)
