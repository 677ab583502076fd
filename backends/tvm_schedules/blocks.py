"""Tensors with their channels in blocks: (N, C, H, W) as (N, ceil(C/b), H, W, b).

A block is the channels of one vector register, so that a kernel loads, computes and stores whole vectors whatever the
width of the image, its padding, its strides. Where C is no multiple of b the last block ends in channels that exist in
memory only: kernels compute whatever comes out for them, and nothing reads it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from graphopt.backends.tvm_schedules.machine import Machine

SMALLEST_BLOCK = 4


def block_of(channels: int, machine: Machine) -> int:
    """Channels in a block: a vector register's, or the least power of two (from 4) that holds all channels."""
    return min(machine.lanes(), max(SMALLEST_BLOCK, 1 << (channels - 1).bit_length()))


@dataclass(frozen=True)
class Blocking:
    """How many channels a tensor has, and in blocks of how many it stands."""

    channels: int
    block: int

    @property
    def blocks(self) -> int:
        """How many blocks the channels fill, the last perhaps in part."""
        return -(-self.channels // self.block)

    def pack_array(self, values: np.ndarray, axis: int) -> np.ndarray:
        """`values` with `axis`, its channels, in blocks: (.., blocks, .., block), filled up with zeros."""
        fill = [(0, 0)] * values.ndim
        fill[axis] = (0, self.blocks * self.block - values.shape[axis])
        padded = np.pad(values, fill)
        split = padded.reshape(*values.shape[:axis], self.blocks, self.block, *values.shape[axis + 1 :])
        return np.ascontiguousarray(np.moveaxis(split, axis + 1, -1))

    def pack(self, plain: te.Tensor) -> te.Tensor:
        """(N, C, H, W) or (N, C, W) in blocks, the latter with H = 1; missing channels are zeros."""
        height = 1 if len(plain.shape) == 3 else plain.shape[2]
        whole = self.channels % self.block == 0

        def value(image: Any, outer: Any, y: Any, x: Any, inner: Any) -> Any:
            channel = outer * self.block + inner
            number = plain[image, channel, x] if len(plain.shape) == 3 else plain[image, channel, y, x]
            return number if whole else tirx.if_then_else(channel < self.channels, number, tirx.const(0, plain.dtype))

        return te.compute((plain.shape[0], self.blocks, height, plain.shape[-1], self.block), value, name="pack")

    def unpack(self, blocked: te.Tensor, rank: int) -> te.Tensor:
        """(N, C, H, W), (N, C, W) where H = 1, or (N, C) where both are 1, of a tensor in blocks."""
        n, _, height, width, _ = blocked.shape

        def value(image: Any, channel: Any, *at: Any) -> Any:
            return blocked[image, channel // self.block, *(0,) * (4 - rank), *at, channel % self.block]

        return te.compute((n, self.channels, height, width)[:2] + (height, width)[4 - rank :], value, name="unpack")


@dataclass(frozen=True)
class Blocked:
    """A tensor of the model in blocks.

    Attributes:
        expr: (N, blocks, H, W, block).
        blocking: of its channels.
        rank: of the tensor in the model: 4, 3 where it has no height, 2 where it is (N, C).
    """

    expr: relax.Expr
    blocking: Blocking
    rank: int


def sizes_of(expr: relax.Expr) -> list[Any]:
    """The shape: numbers where they are known, expressions where not; empty where there is no shape."""
    shape = getattr(expr.ty, "shape", None)
    return [known(size) for size in shape.values] if isinstance(shape, relax.ShapeExpr) else []


def known(size: Any) -> Any:
    """A size as a number where it is one, else as it is."""
    return int(size.value) if isinstance(size, tirx.IntImm) else size
