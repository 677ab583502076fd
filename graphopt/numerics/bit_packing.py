"""Unsigned integers of 4 or 8 bits in bytes, along the last axis; the first of two in the low bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack(values: NDArray[np.integer[Any]], bits: int) -> Bytes:
    """Bytes of (..., n) integers in 0..2^bits - 1: (..., ceil(n bits / 8)); what is left of a last byte is zero.

    Raises:
        ValueError: other bits than 4 and 8, or a number that does not fit.
    """
    _check(bits)
    if values.size and (int(values.min()) < 0 or int(values.max()) >> bits):
        raise ValueError(f"numbers from {values.min()} to {values.max()} do not fit into {bits} bits")
    whole = np.ascontiguousarray(values, np.uint8)
    if bits == 8:
        return whole
    if whole.shape[-1] % 2:
        whole = np.concatenate([whole, np.zeros((*whole.shape[:-1], 1), np.uint8)], axis=-1)
    return whole[..., 0::2] | whole[..., 1::2] << np.uint8(4)


def unpack(packed: Bytes, bits: int, length: int) -> Bytes:
    """The first `length` integers of each line: the inverse of `pack`."""
    _check(bits)
    if bits == 8:
        return packed[..., :length]
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :length]


def _check(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits: 4 and 8 are packed")
