"""Large constants computed in float64 a block of rows at a time: in memory is the result, not its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Rows = slice | EllipsisType
"""What to index an array with for some positions of its first axis, or for all of it."""

BLOCK = 32 << 20
"""Bytes of a block in float64."""


def row_blocks(shape: tuple[int, ...]) -> Iterator[Rows]:
    """Consecutive blocks of rows that cover an array of this shape; one where it is small."""
    nbytes = 8 * int(np.prod(shape))
    if nbytes <= BLOCK:
        yield ...
        return
    step = max(1, BLOCK * shape[0] // nbytes)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def rounded(shape: tuple[int, ...], dtype: np.dtype[Any], exact: Callable[[Rows], Float64]) -> npt.NDArray[Any]:
    """What `exact` gives for each block of rows, rounded once to `dtype`: bit by bit as computed in one piece.

    Args:
        shape: of the whole.
        dtype: of the result.
        exact: rows in float64; each must depend on no other.
    """
    result = np.empty(shape, dtype)
    for rows in row_blocks(shape):
        result[rows] = exact(rows).astype(dtype)
    return result


def finite_in(data: Float64, dtype: np.dtype[Any]) -> bool:
    """Whether every number of `data` stays finite when it is rounded to `dtype`."""
    with np.errstate(over="ignore"):
        return all(
            bool(np.isfinite(data[rows].astype(dtype).astype(np.float64)).all()) for rows in row_blocks(data.shape)
        )
