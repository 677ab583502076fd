"""Activations: functions of one number, applied to each element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.formulas import Pattern
from graphopt.rewriting.found import Found, Free
from graphopt.rewriting.match import Attribute, Parameter, Scalar, Tensor, either, op
from graphopt.rewriting.recognise import Rule, Written, plain

x = Tensor("x")
alpha = Free("alpha")


def clip(data: Pattern, low: float | Free, high: float | Free) -> Pattern:
    """Clip, or Min and Max in either order."""
    least, most = Scalar(low), Scalar(high)
    raised = (op("Max", data, least, commutes=True), *((op("Relu", data),) if low == 0 else ()))
    lowered = op("Min", data, most, commutes=True)
    return either(
        op("Clip", data, least, most),
        *(op("Min", form, most, commutes=True) for form in raised),
        op("Max", lowered, least, commutes=True),
        *((op("Relu", lowered),) if low == 0 else ()),
    )


# -- gates: x times a function of x that goes from 0 to 1 ------------------------------------------------------------

_ERF = op("Erf", x * math.sqrt(0.5))
GELU = Rule(
    "Gelu",
    20,
    (
        0.5 * x * (1 + _ERF),  # and with the half inside of x or of the bracket
        x * (0.5 + 0.5 * _ERF),
        0.5 * x + 0.5 * x * _ERF,
    ),
    plain(approximate="none"),
)
"""x Phi(x), Phi the normal distribution function."""

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715
_TANH = op(
    "Tanh",
    either(
        _SLOPE * (x + _CUBIC * x**3),
        _SLOPE * x * (1 + _CUBIC * x**2),
        x * (_SLOPE + _SLOPE * _CUBIC * x**2),
    ),
)
GELU_TANH = Rule(
    "Gelu",
    20,
    (0.5 * x * (1 + _TANH), x * (0.5 + 0.5 * _TANH), 0.5 * x + 0.5 * x * _TANH),
    plain(approximate="tanh"),
)
"""The approximation of Hendrycks and Gimpel, arXiv:1606.08415."""

SIGMOID = Rule("Sigmoid", 1, (1 / (1 + op("Exp", -x)),), plain())

SWISH = Rule("Swish", 24, (x * op("Sigmoid", x), x / (1 + op("Exp", -x))), plain(alpha=1.0))
"""Also known as Silu."""

_HARD_SIGMOID = either(
    clip(x + 3.0, 0.0, 6.0) * (1 / 6),
    clip(x * (1 / 6) + 0.5, 0.0, 1.0),
    op("HardSigmoid", x, alpha=Attribute(1 / 6, 0.2), beta=Attribute(0.5, 0.5)),
)
HARD_SWISH = Rule(
    "HardSwish",
    14,
    (x * clip(x + 3.0, 0.0, 6.0) * (1 / 6), x * _HARD_SIGMOID),
    plain(),
    single=True,
)


def _hard_sigmoid(found: Found, result: ir.Value) -> Written | None:
    numbers = found.numbers
    top, scale = numbers["top"], numbers.get("scale", 1.0)
    if not found.close(top * scale, 1.0) or not found.close(numbers["beta"] * scale, 0.5):
        return None
    return Written((found.values["x"],), {"alpha": numbers["alpha"] * scale, "beta": 0.5})


_RAMP = clip(x * alpha + Free("beta"), 0.0, Free("top"))
HARD_SIGMOID = Rule("HardSigmoid", 6, (_RAMP * Free("scale"), _RAMP), _hard_sigmoid, single=True)

_SOFTPLUS = op("Log", 1 + op("Exp", x))
SOFTPLUS = Rule("Softplus", 1, (_SOFTPLUS,), plain(), overflow="Softplus stays finite")

MISH = Rule("Mish", 18, (x * op("Tanh", either(op("Softplus", x), _SOFTPLUS)),), plain())
"""Where exp overflows the tanh is 1 either way."""

# -- one slope above zero, another one below -------------------------------------------------------------------------

_ZERO = Scalar(0.0)


def above(data: Pattern, positive: Pattern, negative: Pattern) -> Pattern:
    """`positive` where data > 0, else `negative`; which of the two 0 gets does not matter where they agree at 0."""
    return either(
        *(op("Where", op(name, data, _ZERO), positive, negative) for name in ("Greater", "GreaterOrEqual")),
        *(op("Where", op(name, data, _ZERO), negative, positive) for name in ("Less", "LessOrEqual")),
    )


_POSITIVE, _NEGATED = op("Relu", x), op("Relu", -x)
_NEGATIVE = op("Min", x, _ZERO, commutes=True)
_LOWER = op("Exp", x) - 1.0
_BOUNDED = op("Exp", either(_NEGATIVE, -_NEGATED)) - 1.0


def _elu(found: Found, result: ir.Value) -> Written:
    return Written((found.values["x"],), {"alpha": found.numbers.get("alpha", 1.0)})


ELU = Rule(
    "Elu",
    6,
    (
        above(x, x, _LOWER),
        above(x, x, _LOWER * alpha),
        _POSITIVE + _BOUNDED,
        _POSITIVE + _BOUNDED * alpha,
    ),
    _elu,
    single=True,
)


def _selu(found: Found, result: ir.Value) -> Written:
    return Written((found.values["x"],), {"alpha": found.numbers["alpha"], "gamma": found.numbers["gamma"]})


SELU = Rule("Selu", 6, (op("Elu", x, alpha=Attribute(alpha, 1.0)) * Free("gamma"),), _selu, single=True)


def _leaky(found: Found, result: ir.Value) -> Written:
    return Written((found.values["x"],), {"alpha": found.numbers["alpha"]})


def _larger(found: Found, result: ir.Value) -> Written | None:
    return _leaky(found, result) if 0 <= found.numbers["alpha"] <= 1 else None


LEAKY_RELU_BY_MAX = Rule("LeakyRelu", 6, (op("Max", x, x * alpha, commutes=True),), _larger, single=True)
LEAKY_RELU = Rule(
    "LeakyRelu",
    6,
    (above(x, x, x * alpha), _POSITIVE + _NEGATIVE * alpha, _POSITIVE - _NEGATED * alpha),
    _leaky,
    single=True,
)


def _prelu(found: Found, result: ir.Value) -> Written | str:
    data, slope = found.values["x"].shape, array(found.values["slope"])
    if data is None or slope is None or slope.ndim > len(data):
        return "its slopes may give the result more axes than its input has"
    if any(size not in (1, data[axis - slope.ndim]) for axis, size in enumerate(slope.shape)):
        return "its slopes do not fit its input"
    return Written((found.values["x"], found.values["slope"]), {})


PRELU = Rule(
    "PRelu",
    9,
    (
        above(x, x, x * Parameter("slope")),
        _POSITIVE + _NEGATIVE * Parameter("slope"),
        _POSITIVE - _NEGATED * Parameter("slope"),
    ),
    _prelu,
)

# -- bounds ----------------------------------------------------------------------------------------------------------


def _clip(found: Found, result: ir.Value) -> Written | None:
    low, high = found.numbers.get("low", 0.0), found.numbers["high"]
    if not low <= high:
        return None
    return Written((found.values["x"], _bound(found, "low", low), _bound(found, "high", high)), {})


def _bound(found: Found, name: str, number: float) -> ir.Value | np.ndarray[Any, Any]:
    """The constant as it stands where it has no axes, as Clip wants it; else a new one."""
    tensor = constant(found.values.get(name))
    return found.values[name] if tensor is not None and len(tensor.shape) == 0 else np.array(number)


_LOW, _HIGH = Scalar(Free("low")), Scalar(Free("high"))
CLIP = Rule(
    "Clip",
    11,
    (
        op("Min", op("Max", x, _LOW, commutes=True), _HIGH, commutes=True),
        op("Max", op("Min", x, _HIGH, commutes=True), _LOW, commutes=True),
        op("Min", op("Relu", x), _HIGH, commutes=True),
        op("Relu", op("Min", x, _HIGH, commutes=True)),
    ),
    _clip,
)
RELU_BY_MAX = Rule("Relu", 6, (op("Max", x, _ZERO, commutes=True),), plain(), merges=False)

RULES = (
    GELU,
    GELU_TANH,
    HARD_SWISH,
    MISH,
    SWISH,
    SIGMOID,
    HARD_SIGMOID,
    SOFTPLUS,
    SELU,
    LEAKY_RELU,
    LEAKY_RELU_BY_MAX,
    PRELU,
    ELU,
    CLIP,
    RELU_BY_MAX,
)
"""In the order in which they are tried at a node."""
