"""How a weight becomes integers: the interface that every writer of quantised weights calls, and rounding to nearest.

A weight is given as the matrices of `graphopt.rewriting.layers.Layer.weight`: (groups, rows, columns), a row an output
channel of a group, a column an input channel (times a kernel position). Writers bring their tensor into this form and
the integers back; what decides how to round sees matrices only, and the layer's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.rounding import SMALLEST_SCALE

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int32]


@dataclass(frozen=True)
class WeightGrid:
    """The integers and scales that a weight may have.

    Attributes:
        bits: 2 to 8.
        symmetric: the integers are -m..m with m = 2^(bits - 1) - 1 and there is no zero point; else 0..2^bits - 1 with
            one zero point a scale.
        per_channel: one scale a row; else one for the whole weight.
        block: with `per_channel`, so many neighbouring columns share a scale; None: all of a row.
        full: symmetric grids take -2^(bits - 1) too (weights stored in blocks of 4 bits can spare no level). The side
            with the longer reach gets it: where that is the positive one, the scale is negative.
    """

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = True
    block: int | None = None
    full: bool = False

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(1 << self.bits - 1) + (not self.full) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest integer."""
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1

    def width(self, columns: int) -> int:
        """Columns of a weight that share a scale."""
        return min(self.block, columns) if self.block and self.per_channel else columns


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: (integers - zero) * scale, each scale for the columns of its block.

    Attributes:
        integers: (groups, rows, columns).
        scale: (groups, rows, blocks) float32, positive but on `full` grids; (1, 1, 1) for one scale in all.
        zero: of the shape of `scale`.
        block: columns that share a scale.
    """

    integers: Integers
    scale: NDArray[np.float32]
    zero: Integers
    block: int

    def dequantised(self) -> NDArray[np.float32]:
        """(groups, rows, columns), as a runtime computes it."""
        columns = self.integers.shape[2]
        scale, zero = (np.repeat(a, self.block, axis=2)[:, :, :columns] for a in (self.scale, self.zero))
        return np.asarray((self.integers - zero).astype(np.float32) * scale, np.float32)


class Rounding(Protocol):
    """What decides how to round."""

    def __call__(self, key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
        """Round the weight of one layer.

        Args:
            key: name of the first output of the node in the model that calibration saw.
            weight: (groups, rows, columns), finite.
            grid: where to.
            least_scale: lower bound of the magnitude of scales, scalar or (groups, rows, 1).
        """


def nearest(key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
    """Scales from the extremes of each block, and each number to its nearest integer, halves to even."""
    block = grid.width(weight.shape[2])
    scale, zero = extremes(weight, grid, block, least_scale)
    wide, offset = (np.repeat(a, block, axis=2)[:, :, : weight.shape[2]] for a in (scale, zero))
    steps = np.rint(np.asarray(weight, np.float32) / wide) + offset
    return Rounded(np.clip(steps, grid.low, grid.high).astype(np.int32), scale, zero, block)


def extremes(
    weight: Floats, grid: WeightGrid, block: int, least_scale: Floats | float = 0.0
) -> tuple[NDArray[np.float32], Integers]:
    """Scales and zero points with which no number of a block is clipped; 1 for a block of zeros.

    Returns:
        two arrays of shape (groups, rows, blocks), or (1, 1, 1) without `per_channel`.
    """
    columns = weight.shape[2]
    padded = np.pad(np.asarray(weight, np.float64), ((0, 0), (0, 0), (0, -columns % block)))
    parts = padded.reshape(*weight.shape[:2], -1, block)
    if not grid.per_channel:
        parts = parts.reshape(1, 1, 1, -1)
    low, high = parts.min(axis=3, initial=0.0), parts.max(axis=3, initial=0.0)
    full = grid.full and grid.symmetric
    if full:
        steps = np.maximum(np.maximum(-low, high) / -grid.low, np.minimum(-low, high) / grid.high)
    elif grid.symmetric:
        steps = np.maximum(-low, high) / grid.high
    else:
        steps = (high - low) / grid.high
    steps = np.where(steps > 0, np.maximum(steps, SMALLEST_SCALE), 1.0)
    scale = np.asarray(np.maximum(steps, least_scale if grid.per_channel else np.max(least_scale)), np.float32)
    if full:
        scale = np.where(high > -low, -scale, scale)  # -2^(bits - 1) times a negative scale is positive
    zero = np.zeros(scale.shape, np.int32)
    if not grid.symmetric:
        zero = np.clip(np.rint(-low / scale), grid.low, grid.high).astype(np.int32)
    return scale, zero
