"""Pooling over spatial windows, and over whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.fx.operators import add, operator
from graphopt.fx.operators.common import pad_spatial, window_pads

add("GlobalAveragePool", lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True))
add("GlobalMaxPool", lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True))
add("GlobalLpPool", lambda x, *, p=2: torch.linalg.vector_norm(x, p, tuple(range(2, x.ndim)), keepdim=True))

_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_MAXIMUM = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


class _Window:
    """A pooling window on one input: kernel, strides, dilations, and the padding on each side."""

    def __init__(
        self,
        x: Tensor,
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        auto_pad: str,
        pads: Sequence[int] | None,
        ceil_mode: int,
    ) -> None:
        rank = len(kernel)
        self.kernel = list(kernel)
        self.strides = list(strides or [1] * rank)
        self.dilations = list(dilations or [1] * rank)
        sizes = x.shape[2:]
        self.begin, self.end = window_pads(auto_pad, pads, sizes, kernel, self.strides, self.dilations)
        self.over = [0] * rank
        """Rows beyond the padding that the last window of ceil mode reaches."""
        if ceil_mode and auto_pad == "NOTSET":
            for a in range(rank):
                reach = self.dilations[a] * (kernel[a] - 1) + 1
                room = sizes[a] + self.begin[a] + self.end[a] - reach
                steps = -(-room // self.strides[a])
                if steps * self.strides[a] >= sizes[a] + self.begin[a]:  # a window may not start in the padding
                    steps -= 1
                self.over[a] = max(0, steps * self.strides[a] - room)

    @property
    def last(self) -> list[int]:
        """Padding after each axis, with the rows of ceil mode."""
        return [e + o for e, o in zip(self.end, self.over, strict=True)]


@operator("MaxPool", ignored=("storage_order",))
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The largest element of every window."""
    w = _Window(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    low = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    pooled = _MAXIMUM[len(w.kernel)](
        pad_spatial(x if x.is_floating_point() else x.double(), w.begin, w.last, low),
        w.kernel,
        w.strides,
        0,
        w.dilations,
    )
    return pooled.to(x.dtype)


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of every window, over the elements that are there (or also over the padding)."""
    w = _Window(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    counted = pad_spatial(ones, w.begin, w.end, 1.0 if count_include_pad else 0.0)
    sums = _sums(pad_spatial(x, w.begin, w.last), w)
    return sums / _sums(pad_spatial(counted, [0] * len(w.kernel), w.over), w)


def _sums(x: Tensor, w: _Window) -> Tensor:
    """Sums over windows; torch's averages know no dilation, a convolution with ones does."""
    rank = len(w.kernel)
    if all(d == 1 for d in w.dilations):
        count = float(torch.tensor(w.kernel).prod())
        return _AVERAGE[rank](x, w.kernel, w.strides) * count
    ones = torch.ones((1, 1, *w.kernel), dtype=x.dtype, device=x.device)
    conv: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    flat = x.reshape(-1, 1, *x.shape[2:])
    return conv(flat, ones, None, w.strides, 0, w.dilations).reshape(*x.shape[:2], *_sizes(x, w))


def _sizes(x: Tensor, w: _Window) -> list[int]:
    return [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], w.kernel, w.strides, w.dilations, strict=True)
    ]


@operator("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The p-norm of every window."""
    w = _Window(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    return _sums(pad_spatial(x.abs() ** p, w.begin, w.last), w) ** (1 / p)
