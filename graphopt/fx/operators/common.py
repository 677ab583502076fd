"""What the operators share: types of elements, integers from tensors, paddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}


def torch_type(code: int) -> torch.dtype | None:
    """torch's type for an ONNX type code; None where it has none."""
    return _TYPES.get(ir.DataType(code))


def needed_type(code: int) -> torch.dtype:
    """As `torch_type`.

    Raises:
        TypeError: torch has no such type.
    """
    found = torch_type(code)
    if found is None:
        raise TypeError(f"torch has no type {ir.DataType(code).name}")
    return found


def host(value: Tensor) -> Tensor:
    """A tensor whose numbers are to be read: its copy on the host, where it was given one as `on_host`.

    Reading a tensor of another device waits for that device, which no recorded graph of kernels may do.
    """
    found: Tensor = getattr(value, "on_host", value)
    return found


def ints(value: Any) -> list[int]:
    """Integers from a tensor, a sequence or a number."""
    if isinstance(value, torch.Tensor):
        return [int(i) for i in host(value).reshape(-1).tolist()]
    return [int(i) for i in value] if isinstance(value, Sequence) else [int(value)]


def number(value: Any) -> Any:
    """A Python number from a tensor of one element, or the number itself."""
    return host(value).reshape(-1)[0].item() if isinstance(value, torch.Tensor) else value


def positive_axes(axes: Sequence[int], rank: int) -> list[int]:
    """Axes counted from the front."""
    return [axis % rank for axis in axes]


def window_pads(
    auto_pad: str,
    pads: Sequence[int] | None,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis, from explicit pads or from the rule SAME_UPPER, SAME_LOWER, VALID."""
    rank = len(kernel)
    if auto_pad == "NOTSET":
        given = list(pads) if pads else [0] * (2 * rank)
        return given[:rank], given[rank:]
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    begin, end = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size)
        small, large = total // 2, total - total // 2
        begin.append(small if auto_pad == "SAME_UPPER" else large)
        end.append(large if auto_pad == "SAME_UPPER" else small)
    return begin, end


def pad_spatial(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes of x by a constant; torch counts them from the last."""
    if not any(begin) and not any(end):
        return x
    amounts = [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]
    return torch.nn.functional.pad(x, amounts, value=value)
