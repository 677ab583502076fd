"""Affine integer grids: scale and zero point from a range, and rounding to the nearest grid point.

The arithmetic is that of ONNX QuantizeLinear and DequantizeLinear, so that numpy and the runtime agree bit for bit:
    q = saturate(round_half_even(x / scale) + zero_point),  x^ = (q - zero_point) * scale,  all in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * 4
"""Below this a float32 scale is subnormal, and runtimes that flush subnormals to zero would divide by zero."""


@dataclass(frozen=True)
class Grid:
    """The integers a quantised tensor may hold.

    Attributes:
        dtype: numpy integer type of the stored tensor.
        symmetric: True keeps the zero point at the middle of the type (0 for signed types) and leaves out the lowest
            value of a signed type, so that -x is representable whenever x is.
    """

    dtype: np.dtype[Any]
    symmetric: bool = False

    @classmethod
    def of(cls, dtype: DTypeLike, *, symmetric: bool = False) -> Grid:
        """The grid of an 8- or 16-bit integer type."""
        found = np.dtype(dtype)
        if found.kind not in "iu" or found.itemsize > 2:
            raise ValueError(f"no quantisation grid for {found}: 8- and 16-bit integers only")
        return cls(found, symmetric)

    @property
    def low(self) -> int:
        """Smallest integer used."""
        info = np.iinfo(self.dtype)
        return int(info.min) + 1 if self.symmetric and self.dtype.kind == "i" else int(info.min)

    @property
    def high(self) -> int:
        """Largest integer used."""
        return int(np.iinfo(self.dtype).max)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 0 if self.dtype.kind == "i" else (self.high + 1) // 2


@dataclass(frozen=True)
class Affine:
    """Quantisation parameters: one scale and zero point, or one per channel.

    Attributes:
        scale: float32, shape () or (channels,), always positive and finite.
        zero_point: stored integer type, same shape.
        axis: the channel axis; None for a per-tensor scale.
    """

    scale: NDArray[np.float32]
    zero_point: IntArray
    axis: int | None = None


def affine(low: float, high: float, grid: Grid) -> Affine:
    """Scale and zero point that cover [low, high] widened to hold 0, which is represented exactly.

    A range of a single point (all zeros) gets scale 1: any scale is right for it.

    Raises:
        ValueError: the range is not finite, or low > high.
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"not a range: [{low}, {high}]")
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return _scalar(1.0, grid.middle if grid.symmetric or grid.dtype.kind == "i" else grid.low, grid)
    if grid.symmetric:
        reach = min(grid.high - grid.middle, grid.middle - grid.low)
        return _scalar(max(-low, high) / reach, grid.middle, grid)
    # float32 limits may make high - low overflow, so divide first.
    scale = high / (grid.high - grid.low) - low / (grid.high - grid.low)
    return _scalar(scale, round(grid.low - low / max(scale, SMALLEST_SCALE)), grid)


def _scalar(scale: float, zero_point: int, grid: Grid) -> Affine:
    stored = np.float32(min(max(scale, SMALLEST_SCALE), float(np.finfo(np.float32).max)))
    clipped = min(max(zero_point, grid.low), grid.high)
    return Affine(np.array(stored, np.float32), np.array(clipped, grid.dtype))


def symmetric_weight(
    weight: FloatArray, grid: Grid, *, axis: int | None, least_scale: FloatArray | float = 0.0
) -> Affine:
    """Scales of a weight tensor from its largest magnitude, per tensor (`axis=None`) or per slice along `axis`.

    Args:
        weight: any shape, finite.
        grid: a symmetric grid.
        axis: channel axis.
        least_scale: lower bound of the scale, scalar or (channels,); keeps int32 biases from overflowing.

    Slices that are all zero get scale 1, unless `least_scale` is larger.
    """
    if axis is None:
        peak = np.max(np.abs(weight), initial=0.0)
    else:
        peak = np.max(np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)), axis=1, initial=0.0)
    reach = min(grid.high - grid.middle, grid.middle - grid.low)
    scale = np.asarray(peak, np.float64) / reach
    scale = np.where(scale > 0, np.maximum(scale, SMALLEST_SCALE), 1.0)
    stored = np.asarray(np.maximum(scale, least_scale), np.float32)
    return Affine(stored, np.full(stored.shape, grid.middle, grid.dtype), axis)


def _along(values: NDArray[Any], rank: int, axis: int | None) -> NDArray[Any]:
    if axis is None:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def quantise(x: FloatArray, params: Affine) -> IntArray:
    """Round to the nearest grid point, halves to even, saturating; equal to ONNX QuantizeLinear bit for bit."""
    info = np.iinfo(params.zero_point.dtype)
    scale = _along(params.scale, x.ndim, params.axis)
    zero = _along(params.zero_point, x.ndim, params.axis).astype(np.float32)
    with np.errstate(over="ignore"):  # x / scale may overflow to inf, which saturates as it should
        steps = np.rint(np.asarray(x, np.float32) / scale) + zero
    stored: IntArray = np.clip(steps, info.min, info.max).astype(params.zero_point.dtype)
    return stored


def dequantise(q: IntArray, params: Affine) -> NDArray[np.float32]:
    """The float32 values that grid points stand for; equal to ONNX DequantizeLinear bit for bit."""
    scale = _along(params.scale, q.ndim, params.axis)
    zero = _along(params.zero_point, q.ndim, params.axis).astype(np.int32)
    return np.asarray((q.astype(np.int32) - zero).astype(np.float32) * scale, np.float32)


BIAS_REACH = 2.0**30
"""Largest integer bias allowed: half of int32, so that the accumulator keeps room for the products."""


def quantise_bias(
    bias: FloatArray, input_scale: NDArray[np.float32], weight_scale: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """int32 bias on the grid of the accumulator, scale = input_scale * weight_scale, and that scale.

    Args:
        bias: (channels,).
        input_scale: ().
        weight_scale: () or (channels,), at least `least_weight_scale(bias, input_scale)`.
    """
    scale = (input_scale * weight_scale).astype(np.float32)
    steps = np.rint(np.asarray(bias, np.float64) / scale.astype(np.float64))
    info = np.iinfo(np.int32)
    return np.clip(steps, info.min, info.max).astype(np.int32), scale


def least_weight_scale(bias: FloatArray, input_scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """Smallest weight scale per channel for which the int32 bias does not overflow, (channels,).

    A channel with weights near zero and an ordinary bias (a dead filter) would otherwise get a scale so small that its
    bias saturates at 2^31 steps, which silently changes the output.
    """
    floor = np.abs(np.asarray(bias, np.float64)) / (np.asarray(input_scale, np.float64) * BIAS_REACH)
    return np.maximum(floor, np.float64(SMALLEST_SCALE) / np.asarray(input_scale, np.float64))


def sqnr_db(reference: FloatArray, approximation: FloatArray) -> float:
    """Signal to quantisation-noise ratio in dB, 10 log10(sum r^2 / sum (r - a)^2); inf where they are equal."""
    signal = float(np.sum(np.square(np.asarray(reference, np.float64))))
    noise = float(np.sum(np.square(np.asarray(reference, np.float64) - np.asarray(approximation, np.float64))))
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")
