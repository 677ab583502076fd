"""Arrays with many equal elements, stored as the others and where they stand. Exact for every bit pattern.

Two forms. `Groups`: at most N of every M neighbours along one axis differ from the filler; stored are N values of each
group and their positions in it, 1, 2 or 4 bits each. `Mask`: any places; stored are the values and one bit for every
element. Bits fill a byte from the lowest up.

`-0.0` is no zero here, and no NaN changes: elements are compared as bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

LARGEST_GROUP = 16
"""Groups of 2, 4, 8 and 16 are tried: a position in any of them fits into four bits."""

MOST_ELEMENTS = (1 << 31) - 1
"""Positions are computed with 32-bit integers where the model runs."""


@dataclass(frozen=True)
class Groups:
    """At most `keep` of every `of` neighbours along `axis` are stored; a last, shorter group keeps at most as many."""

    keep: int
    of: int
    axis: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of} along axis {self.axis}"

    @property
    def bits(self) -> int:
        """Bits of one position: a divisor of eight."""
        return {1: 1, 2: 2, 3: 4, 4: 4}[(self.of - 1).bit_length()]

    def kept(self, length: int) -> int:
        """Elements stored of a line of this length along the axis."""
        full, rest = divmod(length, self.of)
        return full * self.keep + min(rest, self.keep)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored values: that of the array, shortened along the axis."""
        return (*shape[: self.axis], self.kept(shape[self.axis]), *shape[self.axis + 1 :])


@dataclass(frozen=True)
class Mask:
    """Elements that are stored are marked by one bit each, in row-major order."""

    def __str__(self) -> str:
        return "mask"


Form = Groups | Mask


@dataclass(frozen=True)
class Choice:
    """How an array is stored best.

    Attributes:
        form: where values stand.
        fill: what stands everywhere else, a scalar of the array's type.
        count: elements that differ from it.
        nbytes: bytes of values and positions.
    """

    form: Form
    fill: Any
    count: int
    nbytes: int


def choose(array: Array, least_saving: int, least_share: float) -> Choice | None:
    """The smallest form; None where none saves enough.

    Groups are preferred up to 1/64 above the mask: they are unpacked in less memory, and are what kernels read.

    Args:
        array: of fixed-size elements of 1, 2, 4 or 8 bytes.
        least_saving: bytes that must be saved.
        least_share: share of the array's bytes that must be saved.
    """
    most = min(array.nbytes - least_saving, int(array.nbytes * (1 - least_share)))
    if array.size > MOST_ELEMENTS or most <= 0:
        return None
    fill = _filler(array)
    stored = _differs(array, fill)
    count = int(np.count_nonzero(stored))
    if count * array.itemsize >= most:
        return None
    mask = Choice(Mask(), fill, count, (count + 1) * array.itemsize + -(-array.size // 8))
    found = [Choice(form, fill, count, _group_bytes(form, array)) for form in _groups(stored)]
    best = min(found, key=lambda choice: choice.nbytes, default=mask)
    chosen = best if best.nbytes <= mask.nbytes * 65 / 64 else mask
    return chosen if chosen.nbytes <= most else None


def _filler(array: Array) -> Any:
    """The most frequent byte of an array of bytes (a zero point of a quantised weight); zero for wider types."""
    if array.itemsize > 1:
        return np.zeros((), array.dtype)[()]
    frequent = np.argmax(np.bincount(array.reshape(-1).view(np.uint8), minlength=256))
    return np.uint8(frequent).reshape(1).view(array.dtype)[0]


def _differs(array: Array, fill: Any) -> Bools:
    return np.asarray(_as_bits(array) != _as_bits(np.asarray(fill, array.dtype).reshape(1))[0])


def _as_bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def _groups(stored: Bools) -> list[Groups]:
    """For every axis and group size the fewest positions that hold all stored elements."""
    found = []
    for axis, length in enumerate(stored.shape):
        of, counts = 2, stored.view(np.uint8)
        while of <= min(length, LARGEST_GROUP):
            counts = _pairs(counts, axis)
            keep = max(int(counts.max()), 1)
            if keep < of:
                found.append(Groups(keep, of, axis))
            of *= 2
    return found


def _pairs(counts: Bytes, axis: int) -> Bytes:
    """Sums of neighbours along an axis, two by two; a last one without a neighbour stays."""
    before = (slice(None),) * axis
    sums, second = counts[(*before, slice(0, None, 2))].copy(), counts[(*before, slice(1, None, 2))]
    sums[(*before, slice(0, second.shape[axis]))] += second
    return sums


def _group_bytes(form: Groups, array: Array) -> int:
    count = int(np.prod(form.stored_shape(array.shape), dtype=np.int64))
    return count * array.itemsize + -(-count * form.bits // 8)


def pack(array: Array, choice: Choice) -> tuple[Array, Bytes]:
    """Values and positions of an array in the form that `choose` found for it.

    Returns:
        For groups the values in `Groups.stored_shape`; for a mask the filler and then the values, in one dimension.
        Positions as bytes.
    """
    stored = _differs(array, choice.fill)
    if isinstance(choice.form, Mask):
        fill = np.asarray(choice.fill, array.dtype).reshape(1)
        return np.concatenate([fill, array[stored]]), np.packbits(stored.reshape(-1), bitorder="little")
    form = choice.form
    lines, last = np.moveaxis(array, form.axis, -1), np.moveaxis(stored, form.axis, -1)
    places, codes = _fill_groups(last, form)
    shape = (*lines.shape[:-1], form.kept(lines.shape[-1]))
    values = np.moveaxis(lines[places].reshape(shape), -1, form.axis)
    ordered = np.moveaxis(codes.reshape(shape), -1, form.axis)
    return np.ascontiguousarray(values), pack_codes(ordered.reshape(-1), form.bits)


def _fill_groups(stored: Bools, form: Groups) -> tuple[Bools, Bytes]:
    """Mark fillers, the first ones of each group, until every group along the last axis has its full number.

    Returns:
        The marks, and the position in its group of every marked element, line by line.
    """
    length = stored.shape[-1]
    short = -length % form.of
    padded = np.pad(stored, [(0, 0)] * (stored.ndim - 1) + [(0, short)]).reshape(-1, form.of)
    missing = form.keep - np.add.reduce(padded.view(np.uint8), axis=1, dtype=np.uint8)
    open_groups = np.flatnonzero(missing)
    free = ~padded[open_groups]
    # What is past the end of a line comes last in its group, so that a shorter group takes it only when it is full.
    padded[open_groups] |= free & (np.cumsum(free, axis=1, dtype=np.uint8) <= missing[open_groups, None])
    marked = padded.reshape(*stored.shape[:-1], length + short)[..., :length]
    positions = np.arange(length, dtype=np.int64) % form.of
    return marked, np.broadcast_to(positions.astype(np.uint8), marked.shape)[marked]


def unpack(values: Array, packed: Bytes, form: Form, shape: tuple[int, ...], fill: Any) -> Array:
    """The array again; the inverse of `pack` for anything that it gives, refused in words for anything else.

    Args:
        values: as `pack` returns them.
        packed: positions as bytes.
        form: where values stand.
        shape: of the array.
        fill: what stands everywhere else.

    Raises:
        ValueError: sizes contradict each other, or a position is out of its group, out of order or out of range.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {list(shape)} has no elements")
    if isinstance(form, Mask):
        return _unpack_mask(values, packed, shape)
    if not (0 <= form.axis < len(shape) and 0 < form.keep < form.of <= LARGEST_GROUP):
        raise ValueError(f"{form} is no pattern of shape {list(shape)}")
    expected = form.stored_shape(shape)
    if values.shape != expected:
        raise ValueError(f"{form} of shape {list(shape)} needs {list(expected)} values, not {list(values.shape)}")
    codes = np.moveaxis(unpack_codes(packed, form.bits, values.size).reshape(values.shape), form.axis, -1)
    starts = np.arange(expected[form.axis]) // form.keep * form.of
    places = codes + starts
    within = codes < np.minimum(form.of, shape[form.axis] - starts)
    if not within.all() or not (np.diff(places, axis=-1) > 0).all():
        raise ValueError("an index is out of range or out of order")
    array = np.full(shape, fill, values.dtype)
    np.put_along_axis(array, np.moveaxis(places, -1, form.axis), values, axis=form.axis)
    return array


def _unpack_mask(values: Array, packed: Bytes, shape: tuple[int, ...]) -> Array:
    size = int(np.prod([int(d) for d in shape], dtype=object))
    if packed.shape != (-(-size // 8),):
        raise ValueError(f"a mask of shape {list(shape)} needs {-(-size // 8)} bytes, not {packed.size}")
    stored = np.unpackbits(packed, count=size, bitorder="little").view(bool)
    if values.shape != (1 + int(np.count_nonzero(stored)),):
        raise ValueError(f"a mask of {int(np.count_nonzero(stored))} places cannot hold {values.size - 1} values")
    array = np.full(size, values[0], values.dtype)
    array[stored] = values[1:]
    return array.reshape(shape)


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Numbers below 2^bits, 8 / bits in a byte, the first in the lowest bits; the last byte is filled with zeros."""
    in_byte = 8 // bits
    rows = np.pad(codes, (0, -codes.size % in_byte)).reshape(-1, in_byte)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(rows << shifts, axis=1))


def unpack_codes(packed: Bytes, bits: int, count: int) -> Bytes:
    """The inverse of `pack_codes`.

    Raises:
        ValueError: the bytes are not those of `count` numbers.
    """
    needed = -(-count * bits // 8)
    if packed.shape != (needed,):
        raise ValueError(f"{count} indices of {bits} bits need {needed} bytes, not {packed.size}")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(-1)[:count])
