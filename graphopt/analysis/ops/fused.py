"""Operators that ONNX Runtime fuses out of standard ones: activations with their bias, convolutions with theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats
from graphopt.analysis.labels import Axes
from graphopt.analysis.ops.convolution import Conv
from graphopt.analysis.ops.elementwise import ElementwiseUnary, ElementwiseVariadic
from graphopt.analysis.ops.linear import Gemm
from graphopt.analysis.ops.quantized import QuantizeLinear
from graphopt.analysis.rules import Labeller, OpRule, Role, rule, where
from graphopt.numerics import special


def _gelu(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + special.erf(x / math.sqrt(2))))


def _tanh_gelu(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _quick_gelu(x: Floats, node: ir.Node) -> Floats:
    return np.asarray(x * special.expit(node.attributes.get_float("alpha", 1.702) * x))


_UNARY: dict[str, Callable[[Floats, ir.Node], Floats]] = {
    "Gelu": lambda x, node: _gelu(x),
    "QuickGelu": _quick_gelu,
}
_WITH_BIAS = {"BiasGelu": _gelu, "FastGelu": _tanh_gelu}


@rule
class FusedUnary(ElementwiseUnary):
    """f(x), position by position."""

    ops = tuple(_UNARY)
    domain = "com.microsoft"

    def apply(self, x: Floats, node: ir.Node) -> Floats:
        return _UNARY[node.op_type](x, node)


@rule
class WithBias(ElementwiseVariadic):
    """f(x + bias), position by position; the bias belongs to the unit, as that of an Add does."""

    ops = tuple(_WITH_BIAS)
    domain = "com.microsoft"

    def role(self, node: ir.Node, index: int) -> Role:
        return "producer"

    def apply(self, node: ir.Node, values: Sequence[Floats]) -> Floats:
        return _WITH_BIAS[node.op_type](np.add.reduce(list(values)))


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Tanh": np.tanh,
    "Sigmoid": lambda x: np.asarray(special.expit(x)),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}


def _activated(x: Floats, name: str, parameters: Sequence[float]) -> Floats:
    """A fused activation with its parameters; NaN where it is not known."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name](x)
    if name == "LeakyRelu" and len(parameters) == 1:
        return np.where(x < 0, parameters[0] * x, x)
    if name == "Clip" and len(parameters) == 2:
        return np.clip(x, parameters[0], parameters[1])
    if name == "HardSigmoid" and len(parameters) == 2:
        return np.clip(parameters[0] * x + parameters[1], 0, 1)
    return x * np.nan


def _computed(node: ir.Node, index: int) -> bool:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is not None and shapes.constant_tensor(value) is None


@rule
class FusedConv(Conv):
    """Convolution, plus Z where there is one, then an activation: f(conv(X, W, B) + Z)."""

    ops = ("FusedConv",)
    domain = "com.microsoft"

    def label(self, node: ir.Node, g: Labeller) -> None:
        if _computed(node, 2):  # what dead units leave behind could only be added behind the activation
            g.freeze_node(node, f"{where(node)}: its bias is computed")
            return
        super().label(node, g)
        if len(node.inputs) < 4 or node.inputs[3] is None:
            return
        labels, added = g.of(node.outputs[0]), g.operand(node, 3, {1: "producer"})
        result: Axes = {}
        for axis in sorted({*labels, *added}):
            result[axis] = g.equate(
                labels.get(axis, ()), added.get(axis, ()), f"{where(node)}: its sum meets an axis that stays"
            )
        g.set(node.outputs[0], result)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        super().dead(node, d)
        output = node.outputs[0]
        name = str(node.attributes.get_string("activation", "") or "")
        parameters = [float(p) for p in node.attributes.get_floats("activation_params", ()) or ()]
        for axis in d.axes(output):
            values = d.of(output, axis)
            if len(node.inputs) > 3 and node.inputs[3] is not None:
                added = d.operand(node, 3, axis)
                values = None if values is None or added is None else values + added
            unknown = np.full(d.size(output, axis), np.nan)
            with np.errstate(all="ignore"):
                d.set(output, axis, unknown if values is None else _activated(values, name, parameters))


@rule
class FusedGemm(Gemm):
    """Gemm, then an activation."""

    ops = ("FusedGemm",)
    domain = "com.microsoft"

    def label(self, node: ir.Node, g: Labeller) -> None:
        if _computed(node, 2) or node.attributes.get_float("beta", 1.0) == 0:
            g.freeze_node(node, f"{where(node)}: it has no bias that could take up a constant")
            return
        super().label(node, g)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        super().dead(node, d)
        name = str(node.attributes.get_string("activation", "") or "")
        given = [node.attributes.get_float(f"activation_{letter}", None) for letter in ("alpha", "beta")]
        for axis in d.axes(node.outputs[0]):
            values = d.of(node.outputs[0], axis)
            if values is not None:
                with np.errstate(all="ignore"):
                    d.set(node.outputs[0], axis, _activated(values, name, [float(p) for p in given if p is not None]))


@rule
class MicrosoftQuantizeLinear(QuantizeLinear):
    """As the standard operators, for more types."""

    ops = ("QuantizeLinear", "DequantizeLinear")
    domain = "com.microsoft"


@rule
class EmbedLayerNormalization(OpRule):
    """Sum of embeddings by word, place and segment, normalised over the hidden axis, which stays."""

    ops = ("EmbedLayerNormalization",)
    domain = "com.microsoft"

    def label(self, node: ir.Node, g: Labeller) -> None:
        reason = f"{where(node)}: all positions of the axis are normalised together"
        for index in range(2, min(7, len(node.inputs))):
            if shapes.constant_tensor(node.inputs[index]) is not None:
                g.freeze(g.operand(node, index), reason)
