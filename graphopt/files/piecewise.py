"""Large weights that are computed piece by piece whenever they are read and never kept in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

ELEMENTS = 1 << 20
"""Of a piece; it is computed in float64."""


@runtime_checkable
class RowReader(Protocol):
    """A tensor of which rows can be had without the rest."""

    def rows(self, start: int, stop: int) -> Array:
        """Positions `start` to `stop` of the first axis."""


def rows(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Positions `start` to `stop` of the first axis; what is in a file is read there only."""
    found: Array = tensor.rows(start, stop) if isinstance(tensor, RowReader) else tensor.numpy()[start:stop]
    return found


def row_ranges(tensor: ir.TensorProtocol, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of the first axis, of about so many elements each (default: `ELEMENTS`)."""
    shape = tensor.shape.numpy()
    length = int(shape[0])
    step = max(1, (elements or ELEMENTS) * length // max(1, tensor.size))
    for start in range(0, length, step):
        yield start, min(start + step, length)


class PiecewiseTensor(ir.LazyTensor):
    """Float64, rounded once to the type of the tensor; what it is computed from stays where it is (a map of a file).

    So a fold into a weight of gigabytes takes no memory. Whoever reads it all at once (`numpy`) gets a new array.

    Args:
        sources: what it is computed from; the first gives name and type.
        shape: of the result, of at least one axis.
    """

    sources: tuple[ir.TensorProtocol, ...]

    def __init__(self, sources: Sequence[ir.TensorProtocol], shape: Sequence[int]) -> None:
        self.sources = tuple(sources)
        super().__init__(
            lambda: ir.Tensor(self.numpy(), dtype=self.dtype),
            dtype=self.sources[0].dtype,
            shape=ir.Shape(list(shape)),
            name=self.sources[0].name,
            cache=False,
        )

    @abstractmethod
    def exact_rows(self, start: int, stop: int) -> Float64:
        """Rows in float64, not rounded."""

    def rows(self, start: int, stop: int) -> Array:
        """Rows, rounded."""
        return self.exact_rows(start, stop).astype(self.dtype.numpy())

    def exact(self) -> Iterator[tuple[int, Float64]]:
        """Pieces of whole rows in float64, not rounded, with the row they begin at."""
        for start, stop in row_ranges(self):
            yield start, self.exact_rows(start, stop)

    def pieces(self) -> Iterator[Array]:
        """The rounded values in pieces of whole rows."""
        for start, stop in row_ranges(self):
            yield self.rows(start, stop)

    def numpy(self) -> Array:
        """All values, in a new array."""
        result = np.empty(self.shape.numpy(), self.dtype.numpy())
        for start, stop in row_ranges(self):
            result[start:stop] = self.rows(start, stop)
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


def stored(tensor: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """What a tensor is computed from in the end; itself, where it is not computed."""
    if not isinstance(tensor, PiecewiseTensor):
        yield tensor
        return
    for source in tensor.sources:
        yield from stored(source)


class ScaledTensor(PiecewiseTensor):
    """source * scale, where `scale` runs along one axis.

    Args:
        source: floating-point tensor of at least one axis.
        scale: (length of the axis,), float64.
        axis: which one, from 0 on.
    """

    source: ir.TensorProtocol
    scale: Float64
    axis: int

    def __init__(self, source: ir.TensorProtocol, scale: Float64, axis: int) -> None:
        if isinstance(source, ScaledTensor) and source.axis == axis:
            scale = source.scale * scale
            source = source.source
        self.source, self.scale, self.axis = source, scale, axis
        self._along = scale.reshape([-1 if a == axis else 1 for a in range(len(source.shape))])
        super().__init__([source], source.shape.numpy())

    def exact_rows(self, start: int, stop: int) -> Float64:
        """See the class."""
        return rows(self.source, start, stop).astype(np.float64) * self._factor(start, stop)

    def rows(self, start: int, stop: int) -> Array:
        """Rows, rounded: as `exact_rows` gives them, without an array of float64."""
        stored = rows(self.source, start, stop)
        if stored.dtype.kind != "f":  # types that numpy does not know itself
            return super().rows(start, stop)
        result = np.empty_like(stored)
        np.multiply(stored, self._factor(start, stop), out=result, dtype=np.float64, casting="same_kind")
        return result

    def _factor(self, start: int, stop: int) -> Float64:
        return self._along[start:stop] if self.axis == 0 else self._along
