"""The numbers that stored integers stand for: (q - z) s, with one scale a tensor, a channel or a block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.bit_packing import unpack

Array = NDArray[Any]
Floats = NDArray[np.float32]


def spread(parameter: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """Scales or zero points as they stand beside each number: broadcastable to `shape`.

    Args:
        parameter: scalar, (channels,), or of the rank of `shape` with one entry a block along `axis`.
        shape: of the integers.
        axis: of channels or blocks.
        block: numbers that share a scale; 0: no blocks.
    """
    if parameter.size == 1:
        return parameter.reshape((1,) * len(shape))
    if block:
        return np.repeat(parameter, block, axis=axis)[tuple(slice(n) for n in shape)]
    wanted = [1] * len(shape)
    wanted[axis] = parameter.size
    return parameter.reshape(wanted)


def dequantised(q: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Floats:
    """(q - z) s as DequantizeLinear of ONNX computes it, in float32.

    Args:
        q: integers, or 8-bit floats.
        scale: see `spread`.
        zero: of the scale's shape; None: zeros.
        axis: of channels or blocks; negative counts from the end.
        block: attribute `block_size`.
    """
    axis %= max(q.ndim, 1)
    numbers = q.astype(np.float32)
    if zero is not None:
        numbers = numbers - spread(zero, q.shape, axis, block).astype(np.float32)
    return np.asarray(numbers * spread(scale, q.shape, axis, block).astype(np.float32), np.float32)


def fake_quantised(x: Array, scale: Array, zero: Array, axis: int = 1, block: int = 0) -> Floats:
    """What is left of `x` after QuantizeLinear and DequantizeLinear; `zero` has the integer type."""
    axis %= max(x.ndim, 1)
    step, offset = spread(scale, x.shape, axis, block), spread(zero, x.shape, axis, block).astype(np.float32)
    low, high = integer_range(zero.dtype)
    q = np.clip(np.rint(x.astype(np.float32) / step.astype(np.float32)) + offset, low, high)
    return np.asarray((q - offset) * step.astype(np.float32), np.float32)


def integer_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Smallest and largest integer of a type, those of `ml_dtypes` (int4, uint4, ...) included."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return int(info.min), int(info.max)
    import ml_dtypes

    narrow = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(narrow.min), int(narrow.max)


def nbits_weight(
    packed: NDArray[np.uint8], scales: Array, zeros: Array | None, *, outputs: int, inputs: int, bits: int, block: int
) -> Floats:
    """The weight of com.microsoft MatMulNBits as MatMul reads it.

    Args:
        packed: (outputs, blocks, bytes of a block).
        scales: outputs * blocks numbers.
        zeros: packed bytes, row by row, or numbers of the type of the scales; None: 2^(bits - 1).
        outputs, inputs, bits, block: attributes N, K, bits, block_size.

    Returns:
        (inputs, outputs).
    """
    blocks = -(-inputs // block)
    q = unpack(packed.reshape(outputs, blocks, -1), bits, block).astype(np.float32)
    if zeros is None:
        offset = np.full((outputs, blocks), 1 << (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        offset = unpack(zeros.reshape(outputs, -1), bits, blocks).astype(np.float32)
    else:
        offset = zeros.reshape(outputs, blocks).astype(np.float32)
    numbers = (q - offset[:, :, None]) * scales.reshape(outputs, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(numbers.reshape(outputs, -1)[:, :inputs].T)
