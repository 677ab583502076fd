"""Arithmetic, comparison, logic, rounding: element by element, with broadcasting."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from graphopt.fx.operators import add, operator
from graphopt.fx.operators.common import needed_type

_UNARY: dict[str, Any] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}
_BINARY: dict[str, Any] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
for _name, _function in _UNARY.items():
    add(_name, _function)
for _name, _function in _BINARY.items():
    # before opset 7 broadcasting followed other rules
    add(_name, _function, since=7)


@operator("Div", since=7)
def div(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    whole = not a.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


@operator("Pow", since=7)
def power(x: Tensor, y: Tensor) -> Tensor:
    """x^y in the type of x."""
    if not x.is_floating_point():
        return torch.pow(x.double(), y.double()).to(x.dtype)
    return torch.pow(x, y.to(x.dtype))


@operator("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The remainder, with the sign of b, or of a with `fmod`."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("BitShift")
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """x shifted by y bits; on wider integers, because torch has no shifts of unsigned ones."""
    wide, by = x.to(torch.int64), y.to(torch.int64)
    moved = torch.bitwise_left_shift(wide, by) if direction == "LEFT" else torch.bitwise_right_shift(wide, by)
    return moved.to(x.dtype)


@operator("Max", since=8)
def maximum(*inputs: Tensor) -> Tensor:
    """The largest, element by element."""
    return reduce(torch.maximum, inputs)


@operator("Min", since=8)
def minimum(*inputs: Tensor) -> Tensor:
    """The smallest, element by element."""
    return reduce(torch.minimum, inputs)


@operator("Sum", since=8)
def total(*inputs: Tensor) -> Tensor:
    """The sum, element by element."""
    return reduce(torch.add, inputs)


@operator("Mean", since=8)
def mean(*inputs: Tensor) -> Tensor:
    """The mean, element by element."""
    return reduce(torch.add, inputs) / len(inputs)


@operator("Clip", fixed=(1, 2))
def clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """x between two bounds: attributes before opset 11, tensors since; an upper bound below the lower one wins."""
    for bound, choose in ((min, torch.maximum), (max, torch.minimum)):
        if bound is not None:
            limit = bound if isinstance(bound, torch.Tensor) else torch.as_tensor(bound, device=x.device)
            x = choose(x, limit.to(x.dtype))
    return x


@operator("IsInf")
def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where x is infinite, of the signs asked for."""
    positive = torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)
    return positive | torch.isneginf(x) if detect_negative else positive


@operator("Cast", ignored=("saturate",))
def cast(x: Tensor, *, to: int) -> Tensor:
    """x in another type."""
    return x.to(needed_type(to))


@operator("CastLike", ignored=("saturate",))
def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """x in the type of another tensor."""
    return x.to(like.dtype)


@operator("Where", since=9)
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the condition holds, else y."""
    return torch.where(condition, x, y)


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    """x, as a tensor of its own: its gradient is what flows through this node."""
    return x.view_as(x)


@operator("Dropout", fixed=(1, 2), outputs=2, ignored=("seed",))
def dropout(x: Tensor, ratio: Any = 0.5, training_mode: Tensor | None = None, *, is_test: int = 1) -> Any:
    """x: a trained model does not drop anything. The mask, where it is wanted, is all true."""
    return x, torch.ones_like(x, dtype=torch.bool)
