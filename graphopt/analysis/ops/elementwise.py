"""Operators that compute position by position, with numpy broadcasting.

Operands that span an axis share its labels; an operand of size 1 along the axis imposes nothing. What a dead position
holds afterwards is the operator applied to what its operands hold there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.centred import gain_index
from graphopt.analysis.dead_values import DeadValues, Floats, elementwise_value
from graphopt.analysis.labels import Axes
from graphopt.analysis.rules import Labeller, OpRule, Role, rule, where
from graphopt.numerics import special

Unary = Callable[[Floats, ir.Node], Floats]


def _attribute(name: str, default: float) -> Callable[[ir.Node], float]:
    return lambda node: float(node.attributes.get_float(name, default) or 0.0)


_alpha_leaky, _alpha_elu = _attribute("alpha", 0.01), _attribute("alpha", 1.0)
_hard_alpha, _hard_beta = _attribute("alpha", 0.2), _attribute("beta", 0.5)
_selu_alpha, _selu_gamma = (
    _attribute("alpha", 1.67326319217681884765625),
    _attribute("gamma", 1.05070102214813232421875),
)
_threshold = _attribute("alpha", 1.0)
_shrink_bias, _shrink_lambda = _attribute("bias", 0.0), _attribute("lambd", 0.5)


def _gelu(x: Floats, node: ir.Node) -> Floats:
    if node.attributes.get_string("approximate", "none") == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    result: Floats = 0.5 * x * (1 + special.erf(x / math.sqrt(2)))
    return result


def _shrink(x: Floats, node: ir.Node) -> Floats:
    bias, lambd = _shrink_bias(node), _shrink_lambda(node)
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0.0 * x))


def _cast(x: Floats, node: ir.Node) -> Floats:
    """Real numbers stay what they are; of integers and truth values only zero is told."""
    kind = ir.DataType(node.attributes.get_int("to", 1))
    return x if kind.is_floating_point() and kind.bitwidth >= 16 else np.where(x == 0, 0.0, np.nan)


def _dropout(x: Floats, node: ir.Node) -> Floats:
    """The input, except in training (opset 12), where only zeros are known to stay."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return x if training is None or shapes.scalar(training) == 0 else np.where(x == 0, 0.0, np.nan)


def _with_steps(function: Unary) -> Unary:
    """A function with jumps: unknown where rounding of its argument could carry it over one."""

    def apply(x: Floats, node: ir.Node) -> Floats:
        near = [function(x * (1 + side * _ROUNDING), node) for side in (-1, 1)]
        result = function(x, node)
        agree = [np.isclose(value, result, rtol=10 * _ROUNDING, atol=0) for value in near]
        return np.where(agree[0] & agree[1], result, np.nan)

    return apply


_ROUNDING = 1e-5
"""Relative error that a float32 constant may have gathered."""


UNARY: dict[str, Unary] = {
    "Identity": lambda x, n: x,
    "Dropout": _dropout,
    "Cast": _cast,
    "Relu": lambda x, n: np.maximum(x, 0),
    "LeakyRelu": lambda x, n: np.where(x < 0, _alpha_leaky(n) * x, x),
    "Elu": lambda x, n: np.where(x < 0, _alpha_elu(n) * np.expm1(x), x),
    "Celu": lambda x, n: np.maximum(x, 0) + np.minimum(0, _alpha_elu(n) * np.expm1(x / _alpha_elu(n))),
    "Selu": lambda x, n: _selu_gamma(n) * np.where(x < 0, _selu_alpha(n) * np.expm1(x), x),
    "ThresholdedRelu": _with_steps(lambda x, n: np.where(x > _threshold(n), x, 0.0 * x)),
    "Shrink": _with_steps(_shrink),
    "Gelu": _gelu,
    "Mish": lambda x, n: x * np.tanh(np.logaddexp(0, x)),
    "Swish": lambda x, n: x * special.expit(_alpha_elu(n) * x),
    "Sigmoid": lambda x, n: special.expit(x),
    "HardSigmoid": lambda x, n: np.clip(_hard_alpha(n) * x + _hard_beta(n), 0, 1),
    "HardSwish": lambda x, n: x * np.clip(x / 6 + 0.5, 0, 1),
    "Softplus": lambda x, n: np.logaddexp(0, x),
    "Softsign": lambda x, n: x / (1 + np.abs(x)),
    "Tanh": lambda x, n: np.tanh(x),
    "Erf": lambda x, n: special.erf(x),
    "Exp": lambda x, n: np.exp(x),
    "Log": lambda x, n: np.log(x),
    "Sqrt": lambda x, n: np.sqrt(x),
    "Reciprocal": lambda x, n: 1 / x,
    "Neg": lambda x, n: -x,
    "Abs": lambda x, n: np.abs(x),
    "Ceil": _with_steps(lambda x, n: np.ceil(x)),
    "Floor": _with_steps(lambda x, n: np.floor(x)),
    "Round": _with_steps(lambda x, n: np.round(x)),
    "Sign": _with_steps(lambda x, n: np.sign(x)),
    "Sin": lambda x, n: np.sin(x),
    "Cos": lambda x, n: np.cos(x),
    "Tan": lambda x, n: np.tan(x),
    "Sinh": lambda x, n: np.sinh(x),
    "Cosh": lambda x, n: np.cosh(x),
    "Asin": lambda x, n: np.arcsin(x),
    "Acos": lambda x, n: np.arccos(x),
    "Atan": lambda x, n: np.arctan(x),
    "Asinh": lambda x, n: np.arcsinh(x),
    "Acosh": lambda x, n: np.arccosh(x),
    "Atanh": lambda x, n: np.arctanh(x),
    "Not": lambda x, n: x * np.nan,
    "BitwiseNot": lambda x, n: x * np.nan,
    "IsNaN": lambda x, n: x * np.nan,
    "IsInf": lambda x, n: x * np.nan,
}


def _product(*values: Floats) -> Floats:
    """0 times anything finite is 0, known or not; what is not known is taken as finite, as it is where a unit lives."""
    zero = np.logical_or.reduce([v == 0 for v in values]) & ~np.logical_or.reduce([np.isinf(v) for v in values])
    result = values[0]
    for other in values[1:]:
        result = result * other
    return np.where(zero, 0.0, result)


def _sum(*values: Floats) -> Floats:
    result = values[0]
    for other in values[1:]:
        result = result + other
    return result


def _fold_pairs(function: Callable[[Floats, Floats], Floats]) -> Callable[..., Floats]:
    def apply(*values: Floats) -> Floats:
        result = values[0]
        for other in values[1:]:
            result = function(result, other)
        return result

    return apply


def _quotient(x: Floats, y: Floats) -> Floats:
    """0 / unknown is 0: a denominator that is 0 would be NaN in the dense model too."""
    return np.where((x == 0) & np.isnan(y), 0.0, x / y)


VARIADIC: dict[str, Callable[..., Floats]] = {
    "Add": _sum,
    "Sum": _sum,
    "Sub": lambda x, y: x - y,
    "Mul": _product,
    "Div": _quotient,
    "Max": _fold_pairs(np.maximum),
    "Min": _fold_pairs(np.minimum),
    "Mean": lambda *v: _sum(*v) / len(v),
    "Pow": lambda x, y: np.where(np.isnan(x) | np.isnan(y), np.nan, np.power(x, y)),
    "PRelu": lambda x, s: np.where(x < 0, s * x, x),
    "Where": lambda c, x, y: np.where(x == y, x, np.nan),
    "SwiGLU": lambda x, y: np.where((x == 0) | (y == 0), 0.0, np.nan),
}
_VALUELESS = (
    *("Mod", "And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
)
_PRODUCERS = {"Add", "Sum", "Sub"}
"""A constant that is added belongs to the unit: zeroing the unit zeroes it. So does the gain of a layer norm, because a
dead position is minus the mean there."""


@rule
class ElementwiseUnary(OpRule):
    """f(x), position by position."""

    ops = tuple(UNARY)

    def apply(self, x: Floats, node: ir.Node) -> Floats:
        """f(x); NaN where it is not known."""
        return UNARY[node.op_type](x, node)

    def label(self, node: ir.Node, g: Labeller) -> None:
        with np.errstate(all="ignore"):
            kept = bool(self.apply(np.zeros(1), node)[0] == 0)
        # A parameter that passes before its use: zeroing its slices zeroes the unit where f(0) = 0.
        axes = g.operand(node, 0, role="producer" if kept else "follower")
        for output in node.outputs:  # Dropout's mask has the shape of its input
            g.set(output, axes)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None:
                with np.errstate(all="ignore"):
                    d.set(node.outputs[0], axis, self.apply(values, node))


@rule
class Clip(ElementwiseUnary):
    """Clip to [min, max]; attributes before opset 11, inputs since."""

    ops = ("Clip",)

    def apply(self, x: Floats, node: ir.Node) -> Floats:
        low, high = _bound(node, 1, "min", -math.inf), _bound(node, 2, "max", math.inf)
        return x * np.nan if low is None or high is None else np.clip(x, low, high)


def _bound(node: ir.Node, index: int, name: str, default: float) -> float | None:
    """A bound of Clip; None where it is computed."""
    if index < len(node.inputs) and node.inputs[index] is not None:
        return shapes.scalar(node.inputs[index])
    attribute = node.attributes.get_float(name, default)
    return default if attribute is None else float(attribute)


def _outer(node: ir.Node, index: int) -> dict[int, Role]:
    """Axes of a factor that no other operand spans: it alone brings them in, as the weight of an outer product does."""
    if node.op_type != "Mul" or shapes.constant_tensor(node.inputs[index]) is None:
        return {}
    sizes, others = (shapes.dims(v) or () for v in (node.inputs[index], node.inputs[1 - index]) if v is not None)
    full = (1,) * (len(sizes) - len(others)) + tuple(others)
    return {a: "producer" for a in range(len(sizes)) if full[len(full) - len(sizes) + a] == 1}


@rule
class ElementwiseVariadic(OpRule):
    """f(x, y, ...), position by position after broadcasting."""

    ops = (*VARIADIC, *_VALUELESS)

    def operands(self, node: ir.Node) -> list[int]:
        """Indices of the operands that are computed with."""
        return [index for index, value in enumerate(node.inputs) if value is not None]

    def role(self, node: ir.Node, index: int) -> Role:
        """What a constant operand is to its units."""
        return "producer" if node.op_type in _PRODUCERS or index == gain_index(node) else "follower"

    def apply(self, node: ir.Node, values: Sequence[Floats]) -> Floats | None:
        """f of the operands; NaN where it is not known, None where it never is."""
        function = VARIADIC.get(node.op_type)
        return None if function is None else function(*values)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        used = [(index, node.inputs[index]) for index in self.operands(node)]
        if any(value is None or shapes.dims(value) is None for _, value in used):
            g.freeze_node(node, f"{name}: the rank of an operand is unknown")
            return
        operands = [
            (g.operand(node, index, _outer(node, index), self.role(node, index)), shapes.dims(value) or (), value)
            for index, value in used
            if value is not None
        ]
        rank = max(len(shape) for _, shape, _ in operands)
        result: Axes = {}
        for axis in range(rank):
            spanning = []
            for axes, shape, value in operands:
                own = axis - rank + len(shape)
                if own >= 0 and shape[own] != 1:
                    spanning.append((axes.get(own, ()), value))
            labelled = [factors for factors, _ in spanning if factors]
            if not labelled:
                continue
            factors = labelled[0]
            for other, value in spanning:
                if other is not factors:
                    factors = g.equate(factors, other, f"{name}: meets '{value.name}', which is never shortened here")
            result[axis] = factors
        g.set(node.outputs[0], result)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        for axis in d.axes(output):
            values = [elementwise_value(node, index, output, axis, d) for index in self.operands(node)]
            with np.errstate(all="ignore"):
                found = self.apply(node, values)
            if found is not None:
                d.set(output, axis, found)
