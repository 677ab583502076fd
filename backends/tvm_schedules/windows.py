"""Convolutions and pooling over tensors in blocks, as tensor expressions.

All are one sum (or maximum) over a window:

    y[n, o, i, j, l] = sum over c, p, q of x[n, c, i s_h + p d_h, j s_w + q d_w] w[o, c, p, q, l]

with l the lane of a vector of output channels (`blocks.py`). Lanes lie beside each other in w and y, and x is one
number for all lanes: a multiply-add takes a vector of w, a broadcast of x and adds to a sum that stays in its register.
Depthwise convolution and pooling take lane l of x for lane l of y instead.

The input is copied with its padding around it, wide enough for the tiles of the kernel to run over the edge of the
output; what they compute there is cropped. Without padding and with tiles that fit there is no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
from tvm import te, tirx

from graphopt.backends.tvm_schedules.blocks import Blocking, known
from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.tiles import Tile, best_tile

TILE = "graphopt.tile"
"""Annotation of the block that computes a window: rows x columns x blocks of its tile, read by the schedule rule."""


@dataclass(frozen=True)
class Window:
    """Geometry of a window over two spatial axes (height, width); a one-dimensional one has height 1.

    Attributes:
        kernel: size of the window.
        strides: steps of the window for one step of the output.
        dilation: steps between neighbours within the window.
        padding: rows above, columns left, rows below, columns right.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    def output(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Size of the output; sizes may be symbolic."""
        top, left, bottom, right = self.padding
        return (
            self._positions(height + top + bottom, 0),
            self._positions(width + left + right, 1),
        )  # fmt: skip

    def _positions(self, size: Any, axis: int) -> Any:
        span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return (size - span) // self.strides[axis] + 1

    def reaching(self, size: tuple[Any, Any], output: tuple[Any, Any]) -> Window:
        """With padding below and to the right so that an input of `size` gives `output` (sizes rounded up)."""
        top, left, _, _ = self.padding
        bottom = self.needed(output[0], 0) - size[0] - top
        right = self.needed(output[1], 1) - size[1] - left
        return replace(self, padding=(top, left, bottom, right))

    def needed(self, positions: Any, axis: int) -> Any:
        """Size of the padded input that so many positions of the window read."""
        return (positions - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1


@dataclass(frozen=True)
class Groups:
    """Which input channels a block of output channels reads.

    A block whose channels belong to several groups reads the channels of all of them; the weights of what is not a
    channel's own are zero. `phases` sets of output channels, one after the other, read the same inputs.
    """

    groups: int
    inputs: int
    outputs: Blocking
    phases: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of the output, those of all phases."""
        return self.outputs.blocks * self.phases

    @property
    def depthwise(self) -> bool:
        """Whether lane l of the output is made of lane l of the input alone."""
        return self.groups == self.inputs == self.outputs.channels

    @property
    def step(self) -> int:
        """Output channels of a group."""
        return self.outputs.channels // self.groups

    @property
    def group_inputs(self) -> int:
        """Input channels of a group."""
        return self.inputs // self.groups

    def first(self, block: Any) -> Any:
        """The first input channel that an output block reads (its index may be symbolic)."""
        return 0 if self.groups == 1 else self.own(block) * self.outputs.block // self.step * self.group_inputs

    def own(self, block: Any) -> Any:
        """The place of an output block within its phase."""
        return block if self.phases == 1 else block % self.outputs.blocks

    @property
    def length(self) -> int:
        """Input channels that a block reads at most."""
        block, last = self.outputs.block, self.outputs.channels - 1
        spans = (
            min((b + 1) * block - 1, last) // self.step - b * block // self.step + 1 for b in range(self.outputs.blocks)
        )
        return max(spans) * self.group_inputs

    def pack_weights(self, weights: np.ndarray, chunk: int) -> np.ndarray:
        """(phases O, I/G, KH, KW) in the order in which a kernel reads it.

        That is (blocks, length/chunk, KH, KW, chunk, block), depthwise (blocks, KH, KW, block).
        """
        phases = np.split(weights, self.phases)
        return np.concatenate([self._pack_phase(phase, chunk) for phase in phases])

    def _pack_phase(self, weights: np.ndarray, chunk: int) -> np.ndarray:
        if self.depthwise:
            return self.outputs.pack_array(weights[:, 0], 0)
        wide = np.zeros((self.outputs.channels, self.length, *weights.shape[2:]), weights.dtype)
        for channel in range(self.outputs.channels):
            first = self.first(channel // self.outputs.block)
            start = channel // self.step * self.group_inputs - first
            wide[channel, start : start + self.group_inputs] = weights[channel]
        chunked = wide.reshape(wide.shape[0], -1, chunk, *wide.shape[2:]).transpose(0, 1, 3, 4, 2)
        return self.outputs.pack_array(chunked, 0)


def convolution(window: Window, groups: Groups, source: Blocking | None, machine: Machine) -> Callable[..., te.Tensor]:
    """The convolution as a function of (input, packed weights).

    Args:
        window: its geometry.
        groups: which channels it combines.
        source: how the input's channels are blocked, None for an input as (N, C, H, W).
        machine: for the tile.
    """

    def compute(data: te.Tensor, weights: te.Tensor) -> te.Tensor:
        height, width = window.output(data.shape[2], data.shape[3])
        sizes = groups.blocks, _known(height), _known(width)
        tile = best_tile(*sizes, machine, shared_input=not groups.depthwise)
        padded = _padded(data, window, tile, height, width, 0.0)
        at = _taps(window)
        rows, columns = _window_axes(window)
        chunk = chunk_of(groups, source)
        outer, inner = te.reduce_axis((0, groups.length // chunk), "co"), te.reduce_axis((0, chunk), "ci")

        def by_lane(n: Any, o: Any, i: Any, j: Any, lane: Any) -> Any:
            number = padded[n, groups.own(o), *at(i, j, rows, columns), lane]
            return te.sum(number * weights[o, rows, columns, lane], axis=[rows, columns])

        def dense(n: Any, o: Any, i: Any, j: Any, lane: Any) -> Any:
            channel = groups.first(o) + outer * chunk
            if groups.groups > 1:  # the last block may have fewer to read than the others: beyond, weights are zero
                channel = tirx.min(channel, groups.inputs - chunk)
            y, x = at(i, j, rows, columns)
            if source is None:
                number = padded[n, channel + inner, y, x]
            else:
                number = padded[n, channel // source.block, y, x, channel % source.block + inner]
            return te.sum(number * weights[o, outer, rows, columns, inner, lane], axis=[outer, rows, columns, inner])

        shape = (data.shape[0], groups.blocks, height, width, groups.outputs.block)
        return _cropped(shape, tile, by_lane if groups.depthwise else dense)

    return compute


def chunk_of(groups: Groups, source: Blocking | None) -> int:
    """Input channels that stand beside each other in the input wherever a block of outputs begins to read."""
    if source is None:
        return 1
    chunk = gcd(groups.length, source.block)
    return chunk if groups.groups == 1 else gcd(chunk, groups.group_inputs)


def pooling(
    window: Window, blocking: Blocking, kind: str, counts_padding: bool, machine: Machine
) -> Callable[..., te.Tensor]:
    """Maximum or mean over a window, as a function of an input in blocks.

    Args:
        window: its geometry.
        blocking: of input and output.
        kind: "max" or "avg".
        counts_padding: whether a mean divides by the size of the window, or by how much of it lies within the input.
        machine: for the tile.
    """

    def compute(data: te.Tensor) -> te.Tensor:
        height, width = window.output(data.shape[2], data.shape[3])
        tile = best_tile(blocking.blocks, _known(height), _known(width), machine, shared_input=False)
        outside = float("-inf") if kind == "max" else 0.0
        padded = _padded(data, window, tile, height, width, outside)
        at = _taps(window)
        rows, columns = _window_axes(window)
        reduce = te.max if kind == "max" else te.sum

        def value(n: Any, o: Any, i: Any, j: Any, lane: Any) -> Any:
            return reduce(padded[n, o, *at(i, j, rows, columns), lane], axis=[rows, columns])

        result = _cropped((data.shape[0], blocking.blocks, height, width, blocking.block), tile, value)
        if kind == "max":
            return result
        counts = _counts(window, data, counts_padding)
        return te.compute(result.shape, lambda *at: result[at] / counts(at[2], at[3]).astype(data.dtype), name="mean")

    return compute


def _counts(window: Window, data: te.Tensor, counts_padding: bool) -> Callable[[Any, Any], Any]:
    """How many numbers are in the window of an output position."""

    def within(position: Any, axis: int) -> Any:
        kernel, step = window.kernel[axis], window.dilation[axis]
        if counts_padding or not (window.padding[axis] or window.padding[axis + 2]):
            return tirx.const(kernel, "int64")
        first = position * window.strides[axis] - window.padding[axis]
        below = tirx.max(0, (-first + step - 1) // step)
        end = tirx.min(kernel, (data.shape[2 + axis] - first + step - 1) // step)
        return tirx.max(1, end - below)

    return lambda i, j: within(i, 0) * within(j, 1)


def _taps(window: Window) -> Callable[[Any, Any, Any, Any], tuple[Any, Any]]:
    (sh, sw), (dh, dw) = window.strides, window.dilation
    return lambda i, j, p, q: (i * sh + p * dh, j * sw + q * dw)


def _window_axes(window: Window) -> tuple[Any, Any]:
    return te.reduce_axis((0, window.kernel[0]), "kh"), te.reduce_axis((0, window.kernel[1]), "kw")


def _known(size: Any) -> int | None:
    value = known(size)
    return value if isinstance(value, int) else None


def _rounded(size: Any, step: int) -> Any:
    return size if step == 1 else (size + step - 1) // step * step


def _padded(data: te.Tensor, window: Window, tile: Tile, height: Any, width: Any, outside: float) -> te.Tensor:
    """The input with what is around it, wide enough for all tiles; itself where nothing is around it."""
    top, left, bottom, right = window.padding
    rounded = (_rounded(height, tile.rows), _rounded(width, tile.columns))
    fits = all(_known(r) is not None and _known(r) == _known(s) for r, s in zip(rounded, (height, width), strict=True))
    fits = fits or (tile.rows == 1 and tile.columns == 1)
    if fits and not any((top, left, bottom, right)):
        return data
    inside_height, inside_width = data.shape[2], data.shape[3]
    shape = (*data.shape[:2], window.needed(rounded[0], 0), window.needed(rounded[1], 1), *data.shape[4:])

    def value(n: Any, c: Any, y: Any, x: Any, *lane: Any) -> Any:
        inside = tirx.all(y >= top, y < inside_height + top, x >= left, x < inside_width + left)
        return tirx.if_then_else(inside, data[n, c, y - top, x - left, *lane], tirx.const(outside, data.dtype))

    return te.compute(shape, value, name="padded")


def _cropped(shape: Sequence[Any], tile: Tile, value: Callable[..., Any]) -> te.Tensor:
    """The window over whole tiles, then without what they compute beyond the edge."""
    image, blocks, height, width, block = shape
    whole = (image, blocks, _rounded(height, tile.rows), _rounded(width, tile.columns), block)
    result = te.compute(whole, value, name="window", attrs={TILE: [tile.blocks, tile.rows, tile.columns]})
    if all(_known(w) is not None and _known(w) == _known(s) for w, s in zip(whole[2:4], shape[2:4], strict=True)):
        return result
    return te.compute(tuple(shape), lambda *at: result[at], name="cropped")
