"""Quantised tensors: the integers are computed as the standard says; no gradient passes through a rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.fx.operators import operator


def _along(v: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector of scales brought into place; a number stays one."""
    return v.reshape([-1 if a == axis % like.ndim else 1 for a in range(like.ndim)]) if v.ndim == 1 else v


@operator("QuantizeLinear", fixed=(1, 2), ignored=("saturate",))
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """round(x / scale) + zero point, within the integer type."""
    kind = torch.uint8 if zero_point is None else zero_point.dtype
    shift: Any = 0 if zero_point is None else _along(zero_point.to(x.dtype), x, axis)
    limits = torch.iinfo(kind)
    return torch.clamp(torch.round(x / _along(scale, x, axis)) + shift, limits.min, limits.max).to(kind)


@operator("DequantizeLinear", fixed=(1, 2))
def dequantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """(x - zero point) scale."""
    whole = x.to(scale.dtype)
    if zero_point is not None:
        whole = whole - _along(zero_point.to(scale.dtype), x, axis)
    return whole * _along(scale, x, axis)


@operator("DynamicQuantizeLinear", outputs=3)
def dynamic_quantize_linear(x: Tensor) -> Any:
    """uint8 with the range of this very tensor, 0 included."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


@operator("MatMulInteger", fixed=(2, 3))
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """(A - zero) (B - zero), in int32; exact in float64."""
    left, right = a.double(), b.double()
    if a_zero is not None:
        left = left - (a_zero.double().unsqueeze(-1) if a_zero.ndim else a_zero.double())
    if b_zero is not None:
        right = right - b_zero.double()
    return torch.matmul(left, right).to(torch.int32)
