"""The input of a convolution as a matrix (im2col), in chunks, so that a convolution is a product with its weight.

For x of shape (N, C, *spatial) and group g the column of output position p holds the values under the kernel at p, in
the order of the weight's flattened row: channel of the group slowest, kernel offsets after. Then
    y[n, group's outputs, p] = W[group's outputs].reshape(outputs, -1) @ column + bias.

Columns are the fast axis ("channels first"): every kernel offset is one strided copy whose inner loop runs over
contiguous pixels, several times faster than gathering rows of kernel-sized pieces, and BLAS takes either layout. The
values are copied, never computed with: no rounding. Definition: ONNX operator Conv.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution over any number of spatial axes.

    Attributes:
        kernel: extent per spatial axis.
        strides, dilations: per spatial axis; empty means 1.
        pads: (begin..., end...) as in ONNX; empty means 0.
        groups: channel groups.
        auto_pad: ONNX auto_pad; "NOTSET" takes `pads`.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1
    auto_pad: Literal["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"] = "NOTSET"

    def __post_init__(self) -> None:
        """Fill in defaults and check.

        Raises:
            ValueError: lengths disagree, or a value is out of range.
        """
        rank = len(self.kernel)
        object.__setattr__(self, "strides", self.strides or (1,) * rank)
        object.__setattr__(self, "dilations", self.dilations or (1,) * rank)
        object.__setattr__(self, "pads", self.pads or (0,) * (2 * rank))
        if not (rank == len(self.strides) == len(self.dilations) and len(self.pads) == 2 * rank):
            raise ValueError(f"kernel {self.kernel}, strides, dilations and pads disagree in length: {self}")
        if min((*self.kernel, *self.strides, *self.dilations, self.groups)) < 1 or min(self.pads, default=0) < 0:
            raise ValueError(f"kernel, strides, dilations and groups must be positive, pads not negative: {self}")

    def padding(self, spatial: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(begin, end) per spatial axis for an input of this extent."""
        rank = len(self.kernel)
        if self.auto_pad == "NOTSET":
            return tuple((self.pads[i], self.pads[i + rank]) for i in range(rank))
        if self.auto_pad == "VALID":
            return ((0, 0),) * rank
        out = []
        for size, k, s, d in zip(spatial, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            out.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return tuple(out)

    def output(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial extent of the output.

        Raises:
            ValueError: the rank differs from the kernel's, or the kernel is larger than the padded input.
        """
        if len(spatial) != len(self.kernel):
            raise ValueError(f"input has {len(spatial)} spatial axes, the kernel {len(self.kernel)}")
        extent = tuple(
            (size + sum(pad) - (k - 1) * d - 1) // s + 1
            for size, pad, k, s, d in zip(
                spatial, self.padding(spatial), self.kernel, self.strides, self.dilations, strict=True
            )
        )
        if min(extent, default=1) < 1:
            raise ValueError(f"kernel {self.kernel} does not fit into the padded input of extent {spatial}")
        return extent


def patches(x: Array, window: Window, group: int = 0) -> Array:
    """All columns of one group at once.

    Args:
        x: (N, C, *spatial).
        window: the convolution.
        group: which channel group.

    Returns:
        (C / groups * prod(kernel), N * prod(output)), contiguous, x's dtype; columns run over samples, then positions.

    Raises:
        ValueError: the shapes disagree.
    """
    x = _group(x, window, group)
    spatial = tuple(x.shape[2:])
    output, padding = window.output(spatial), window.padding(spatial)
    if any(p for pair in padding for p in pair):
        x = np.pad(x, ((0, 0), (0, 0), *padding))
    channels_first = x.swapaxes(0, 1)
    out = np.empty((x.shape[1], *window.kernel, x.shape[0], *output), x.dtype)
    for offset in itertools.product(*(range(k) for k in window.kernel)):
        where: tuple[slice, ...] = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, s, n in zip(offset, window.dilations, window.strides, output, strict=True)
        )
        position: tuple[slice | int, ...] = (slice(None), *offset)
        out[position] = channels_first[(slice(None), slice(None), *where)]
    return out.reshape(x.shape[1] * int(np.prod(window.kernel)), -1)


def patch_chunks(
    x: Array, window: Window, group: int = 0, *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[slice, Array]]:
    """Columns of successive samples, each chunk of about `chunk_bytes` (at least one sample).

    Yields:
        the slice of samples, to cut other tensors alike, and their columns as `patches` gives them.

    Raises:
        ValueError: the shapes disagree.
    """
    rows = x.shape[1] // window.groups * int(np.prod(window.kernel))
    per_sample = rows * int(np.prod(window.output(tuple(x.shape[2:])))) * x.dtype.itemsize
    step = max(1, chunk_bytes // max(1, per_sample))
    for start in range(0, x.shape[0], step):
        part = slice(start, min(start + step, x.shape[0]))
        yield part, patches(x[part], window, group)


def channel_columns(x: Array) -> Array:
    """(N, C, *spatial) as (C, N * prod(spatial)), columns in the order of `patches`."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(x.shape[1], -1)


def _group(x: Array, window: Window, group: int) -> Array:
    if x.ndim != 2 + len(window.kernel):
        raise ValueError(f"input of rank {x.ndim} for a kernel over {len(window.kernel)} axes")
    if x.shape[1] % window.groups or not 0 <= group < window.groups:
        raise ValueError(f"group {group} of {window.groups} of {x.shape[1]} channels")
    size = x.shape[1] // window.groups
    return x[:, group * size : (group + 1) * size]


def spread(columns: Array, window: Window, shape: tuple[int, ...]) -> Array:
    """The adjoint of `patches` for one group: every value is added where it was taken from.

    Args:
        columns: (C / groups * prod(kernel), N * prod(output)), in the order of `patches`.
        window: the convolution.
        shape: (N, C / groups, *spatial) of the group's input.

    Returns:
        an array of that shape, the columns' dtype: sum over patches, so that <patches(x), c> = <x, spread(c)>.
    """
    spatial = shape[2:]
    output, padding = window.output(spatial), window.padding(spatial)
    extent = tuple(n + sum(pad) for n, pad in zip(spatial, padding, strict=True))
    out = np.zeros((shape[1], shape[0], *extent), columns.dtype)
    parts = columns.reshape(shape[1], *window.kernel, shape[0], *output)
    for offset in itertools.product(*(range(k) for k in window.kernel)):
        where: tuple[slice, ...] = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, s, n in zip(offset, window.dilations, window.strides, output, strict=True)
        )
        position: tuple[slice | int, ...] = (slice(None), *offset)
        out[(slice(None), slice(None), *where)] += parts[position]
    inner = tuple(slice(pad[0], pad[0] + n) for pad, n in zip(padding, spatial, strict=True))
    return out[(slice(None), slice(None), *inner)].swapaxes(0, 1)
