"""Unsigned integers of 2, 4 or 8 bits in bytes, along the last axis; the first of those in a byte in the low bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack(values: NDArray[np.integer[Any]], bits: int) -> Bytes:
    """Bytes of (..., n) integers in 0..2^bits - 1: (..., ceil(n bits / 8)); what is left of a last byte is zero.

    Raises:
        ValueError: other bits than 2, 4 and 8, or a number that does not fit.
    """
    places = _places(bits)
    if values.size and (int(values.min()) < 0 or int(values.max()) >> bits):
        raise ValueError(f"numbers from {values.min()} to {values.max()} do not fit into {bits} bits")
    whole = np.ascontiguousarray(values, np.uint8)
    missing = -whole.shape[-1] % len(places)
    if missing:
        whole = np.concatenate([whole, np.zeros((*whole.shape[:-1], missing), np.uint8)], axis=-1)
    parts = whole.reshape(*whole.shape[:-1], -1, len(places)) << places
    return np.asarray(np.bitwise_or.reduce(parts, axis=-1), np.uint8)


def unpack(packed: Bytes, bits: int, length: int | None = None) -> Bytes:
    """The first `length` integers of each line, or all: the inverse of `pack`."""
    parts = packed[..., None] >> _places(bits) & np.uint8((1 << bits) - 1)
    return parts.reshape(*packed.shape[:-1], packed.shape[-1] * (8 // bits))[..., :length]


def _places(bits: int) -> Bytes:
    """The lowest bits of the integers in a byte."""
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits: 2, 4 and 8 are packed")
    return np.arange(0, 8, bits, dtype=np.uint8)
