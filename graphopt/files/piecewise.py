"""A large weight with scaled channels, computed piece by piece whenever it is read and never kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

ELEMENTS = 1 << 20
"""Of a piece; it is computed in float64."""


class ScaledTensor(ir.LazyTensor):
    """source * scale, where `scale` runs along one axis; float64, rounded once to the type of the source.

    What it is made of stays where it is (a map of a file), so folding a factor into a weight of gigabytes takes no
    memory; whoever reads it all at once (`numpy`) gets a new array each time.

    Args:
        source: floating-point tensor of at least one axis.
        scale: (length of the axis,), float64.
        axis: which one, from 0 on.
    """

    source: ir.TensorProtocol
    scale: npt.NDArray[np.float64]
    axis: int

    def __init__(self, source: ir.TensorProtocol, scale: npt.NDArray[np.float64], axis: int) -> None:
        if isinstance(source, ScaledTensor) and source.axis == axis:
            scale = source.scale * scale
            source = source.source
        self.source, self.scale, self.axis = source, scale, axis
        super().__init__(
            lambda: ir.Tensor(self.numpy(), dtype=source.dtype),
            dtype=source.dtype,
            shape=ir.Shape(source.shape.numpy()),
            name=source.name,
            cache=False,
        )

    def exact(self) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Pieces of whole rows in float64, not rounded, with the row they begin at."""
        whole = self.source.numpy()
        rows = max(1, ELEMENTS // max(1, whole[0].size)) if len(whole) else 1
        along = self.scale.reshape([-1 if a == self.axis else 1 for a in range(whole.ndim)])
        for start in range(0, len(whole), rows):
            factor = along[start : start + rows] if self.axis == 0 else along
            yield start, whole[start : start + rows].astype(np.float64) * factor

    def pieces(self) -> Iterator[Array]:
        """The rounded values in pieces of whole rows."""
        dtype = np.dtype(self.dtype.numpy())
        for _, piece in self.exact():
            yield piece.astype(dtype)

    def numpy(self) -> Array:
        """All values, in a new array."""
        result = np.empty(self.shape.numpy(), self.dtype.numpy())
        start = 0
        for piece in self.pieces():
            result[start : start + len(piece)] = piece
            start += len(piece)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.numpy(), dtype=dtype)

    def byte_pieces(self) -> Iterator[bytes]:
        """The little-endian bytes, a piece at a time."""
        for piece in self.pieces():
            yield np.ascontiguousarray(piece).astype(piece.dtype.newbyteorder("<"), copy=False).tobytes()

    def tobytes(self) -> bytes:
        """The little-endian bytes of all values."""
        return b"".join(self.byte_pieces())

    def tofile(self, file: IO[bytes]) -> None:
        """Write the values, a piece at a time."""
        for piece in self.byte_pieces():
            file.write(piece)
