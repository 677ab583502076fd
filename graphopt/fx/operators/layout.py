"""Shapes: reshaping, moving, cutting and joining. Sizes are read when the module runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graphopt.fx.operators import add, operator
from graphopt.fx.operators.common import ints, number, positive_axes


def _int64(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


add("Size", lambda x: _int64(x.numel(), x))
add("Concat", lambda *inputs, axis: torch.cat(inputs, axis))
add("Expand", lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape)))), fixed=(1,))
add("Tile", lambda x, repeats: x.repeat(ints(repeats)), since=6, fixed=(1,))


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes, of axes start to end."""
    return _int64(list(x.shape)[slice(start, end)], x)


@operator("Reshape", since=5, fixed=(1,))
def reshape(x: Tensor, sizes: Tensor, *, allowzero: int = 0) -> Tensor:
    """Other sizes; 0 takes over the axis's own unless `allowzero`."""
    wanted = ints(sizes)
    if not allowzero:
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Two axes: those before `axis`, and the rest."""
    cut = axis if axis >= 0 else axis + x.ndim
    return x.reshape(math.prod(x.shape[:cut]), math.prod(x.shape[cut:]))


@operator("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order; by default reversed."""
    return x.permute(list(perm) if perm is not None else list(reversed(range(x.ndim))))


@operator("Squeeze", fixed=(1,))
def squeeze(x: Tensor, axes: Any = None) -> Tensor:
    """Without axes of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


@operator("Unsqueeze", fixed=(1,))
def unsqueeze(x: Tensor, axes: Any) -> Tensor:
    """With new axes of size 1; they are counted in the result."""
    places = ints(axes)
    for axis in sorted(positive_axes(places, x.ndim + len(places))):
        x = x.unsqueeze(axis)
    return x


@operator("Split", outputs=None, fixed=(1,))
def split(x: Tensor, split: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int) -> Any:
    """Pieces of given sizes, or as equal as can be."""
    if split is not None:
        return torch.split(x, ints(split), axis)
    return torch.split(x, -(-x.shape[axis] // outputs), axis)


@operator("Slice", fixed=(1, 2, 3, 4))
def cut(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    """Every step-th position from starts to ends; attributes before opset 10, tensors since."""
    first = ints(starts)
    along = ints(axes) if axes is not None else list(range(len(first)))
    by = ints(steps) if steps is not None else [1] * len(first)
    for axis, start, end, step in zip(along, first, ints(ends), by, strict=True):
        size = x.shape[axis]
        if step > 0:
            whole = [slice(None)] * x.ndim
            whole[axis] = slice(start, end, step)
            x = x[tuple(whole)]
        else:
            # torch has no negative steps
            places = range(size)[slice(start, end if end >= -size else None, step)]
            x = x.index_select(axis, _int64(list(places), x))
    return x


@operator("Pad", fixed=(1, 2, 3))
def pad(
    x: Tensor,
    pads: Any,
    constant_value: Any = None,
    axes: Any = None,
    *,
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    """More positions on both sides of axes (or fewer, where pads are negative)."""
    amounts = ints(pads)
    along = positive_axes(ints(axes), x.ndim) if axes is not None else list(range(x.ndim))
    fill = number(constant_value) if constant_value is not None else value
    for axis, before, after in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        x = _pad_axis(x, axis, before, after, mode, fill)
    return x


def _pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str, fill: Any) -> Tensor:
    if not before and not after:
        return x
    if mode == "constant":
        later = x.ndim - 1 - axis
        return functional.pad(x, (*[0, 0] * later, before, after), value=fill)
    rule = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode]
    inside = np.arange(max(0, -before), x.shape[axis] - max(0, -after))
    places = np.pad(inside, (max(0, before), max(0, after)), rule)  # type: ignore[call-overload]
    return x.index_select(axis, _int64(places.tolist(), x))


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels become pixels, in the order depth-column-row or column-row-depth."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        moved = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        moved = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return moved.reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    """Pixels become channels."""
    n, c, h, w = x.shape
    b = blocksize
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


@operator("Trilu", fixed=(1,))
def triangle(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle, from the k-th diagonal on."""
    diagonal = 0 if k is None else int(number(k))
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("ReverseSequence", fixed=(1,))
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Every sample's first so many steps reversed."""
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(moved.shape[1], device=x.device).expand(moved.shape[:2])
    ends = lengths.reshape(-1, 1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    rows = torch.arange(moved.shape[0], device=x.device).reshape(-1, 1)
    return moved[rows, places].movedim((0, 1), (batch_axis, time_axis))
