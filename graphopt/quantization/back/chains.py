"""MatMulInteger and ConvInteger with the Cast and the Mul by scales behind them, written as one float product.

    q, s, z = DynamicQuantizeLinear(x);  i = MatMulInteger(q, W, z, z_w);  y = Cast(i) * (s * c)

is x (W - z_w) c up to the rounding of x: the product counts in units of s, and the factors behind it must hold s once.
Where x was quantised with a constant scale s, it is in the constant factors, and c is their product divided by s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.quantization.back.float_builder import (
    Array,
    FloatBuilder,
    Refused,
    hand_over,
    kept_attributes,
    standard,
)
from graphopt.quantization.back.numbers import spread
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx

PRODUCTS = ("MatMulInteger", "ConvInteger")


@dataclass(frozen=True)
class Factor:
    """A product of constants and the scale of the activation: its power, and the constant."""

    power: int
    constant: Array


def write_chain(b: FloatBuilder) -> Sequence[ir.Value | None]:
    """Write the chain that begins at the builder's node in float; what ends it is replaced.

    Raises:
        Refused: it is no such chain.
    """
    node, conv = b.node, is_onnx(b.node, "ConvInteger")
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or not (is_onnx(source, "DynamicQuantizeLinear") or standard(source, "QuantizeLinear")):
        raise Refused("what quantises its activations is not to be seen")
    dynamic = is_onnx(source, "DynamicQuantizeLinear")
    scale = source.outputs[1] if dynamic else source.inputs[1]
    zero = source.outputs[2] if dynamic else (source.inputs[2] if len(source.inputs) > 2 else None)
    if not _same(b.input(2), zero):
        raise Refused("its zero point is not that of its activations")
    assert scale is not None
    end, factor = _followed(node.outputs[0], scale)
    if factor.power != (1 if dynamic else 0):
        raise Refused("its result is not multiplied by the scale of its activations once")
    weight = b.constant(b.input(1), "weight")
    offset = b.optional(b.input(3), "zero point of the weight")
    channel = 0 if conv else weight.ndim - 1
    numbers = weight.astype(np.float32)
    if offset is not None:
        numbers = numbers - spread(offset, weight.shape, channel).astype(np.float32)
    constant = factor.constant if dynamic else factor.constant / b.constant(scale, "scale of the activations")
    numbers = numbers * spread(_per_channel(constant, weight, conv), weight.shape, channel)
    x = b.real(node.inputs[0], scale, zero)
    w = b.stored(b.input(1), numbers.astype(np.float32))
    made = b.op("Conv" if conv else "MatMul", [x, w], end.dtype, attributes=kept_attributes(node))
    last = end.producer()
    assert last is not None
    hand_over(end, made, last, b)
    return []


def _same(given: ir.Value | None, made: ir.Value | None) -> bool:
    """Whether two zero points are one: the same value, or equal constants; none is zero."""
    if given is made:
        return True
    a, b = array(given), array(made)
    a = np.zeros(1) if given is None else a
    b = np.zeros(1) if made is None else b
    return a is not None and b is not None and a.size == b.size == 1 and int(a.reshape(())) == int(b.reshape(()))


def _followed(value: ir.Value, scale: ir.Value) -> tuple[ir.Value, Factor]:
    """Through the Cast and every Mul by a factor behind it: the last value, and the product of the factors."""
    use = sole_use(value)
    if use is None or not is_onnx(use.node, "Cast"):
        raise Refused("its integers are read by something else than a Cast to float")
    value = use.node.outputs[0]
    total = Factor(0, np.ones((), np.float32))
    while True:
        use = sole_use(value)
        if use is None or not is_onnx(use.node, "Mul"):
            return value, total
        other = _factor(use.node.inputs[1 - use.idx], scale)
        if other is None or total.power + other.power > 1:
            return value, total
        if total.power == 1 and other.power == 0 and other.constant.size > 1:
            # A weight vector behind the layer, of a norm or a gate: no scale of it.
            return value, total
        total = Factor(total.power + other.power, total.constant * other.constant)
        value = use.node.outputs[0]


def _factor(value: ir.Value | None, scale: ir.Value) -> Factor | None:
    """The value as scale^p times a constant, if it is that."""
    if value is None:
        return None
    if value is scale and array(value) is None:
        return Factor(1, np.ones((), np.float32))
    data = array(value)
    if data is not None:
        return Factor(0, data.astype(np.float32))
    node = value.producer()
    if node is None or not is_onnx(node, "Mul"):
        return None
    left, right = (_factor(v, scale) for v in node.inputs)
    if left is None or right is None:
        return None
    return Factor(left.power + right.power, left.constant * right.constant)


def _per_channel(constant: Array, weight: Array, conv: bool) -> Array:
    """A factor of the result as one of the weight's output channels."""
    if constant.size == 1:
        return constant.reshape(())
    channels = weight.shape[0 if conv else -1]
    axis = weight.ndim - 2 if conv else 0  # how far from the end channels stand in the result
    wanted = (channels, *(1,) * axis)
    if constant.size != channels or constant.shape[-len(wanted) :] != wanted:
        raise Refused("the factors behind it are not one per output channel")
    return constant.reshape(-1)
