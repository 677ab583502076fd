"""Weights on disk: tensors that read through a shared memory map, and streamed access that never holds a whole model.

Two things that `onnx_ir.ExternalTensor` alone does not give. One map (and one file descriptor) per file instead of one
per tensor, so a model of many thousand external tensors does not run out of descriptors; and bounded residency: pages
that were handed out are given back to the system once they sum to `RESIDENT_BUDGET`, so that walking over 100 GB of
weights does not show up as 100 GB of resident memory. Giving pages back is always safe: the map is read-only and backed
by the file, an array that still looks at it faults them in again.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.files.piecewise import PiecewiseTensor, stored

RESIDENT_BUDGET = 32 << 20
"""Bytes of all files that may be handed out before their pages are given back."""

CHUNK = 4 << 20
"""Bytes that streamed reads hold at a time."""


class FileMap:
    """A read-only memory map of one file, shared by all tensors that live in it.

    The map holds the file's inode: it stays valid when the path is renamed over or deleted, which is what makes saving
    a model over its own input safe.
    """

    _handed_out: ClassVar[int] = 0
    _touched: ClassVar[weakref.WeakSet[FileMap]] = weakref.WeakSet()
    """Of which bytes were handed out since pages were last given back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes `[offset, offset + length)` without a copy."""
        if self.map is None:
            return memoryview(b"")[0:0]
        self.account(length)
        return memoryview(self.map)[offset : offset + length]

    def account(self, length: int) -> None:
        """Note that `length` bytes are about to be touched, and give earlier pages back when the budget is reached."""
        if FileMap._handed_out + length > RESIDENT_BUDGET:
            for file in tuple(FileMap._touched):
                file.shed()
            FileMap._handed_out = 0
            FileMap._touched.clear()
        FileMap._handed_out += length
        FileMap._touched.add(self)

    def shed(self) -> None:
        """Give all resident pages back to the system; views stay valid."""
        if self.map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


class MappedTensor(ir.ExternalTensor):
    """An external tensor that reads through a `FileMap`.

    Serialised as it stands it is a reference into the file, like every `onnx_ir.ExternalTensor`.
    """

    __slots__ = ("file",)

    def __init__(self, source: ir.ExternalTensor, file: FileMap) -> None:
        super().__init__(
            source.location,
            source.offset,
            source.length,
            source.dtype,
            shape=ir.Shape(source.shape),
            name=source.name,
            doc_string=source.doc_string,
            metadata_props=dict(source.metadata_props),
            base_dir=source.base_dir,
        )
        self.file = file

    def _bytes(self) -> memoryview:
        return self.file.view(self.offset or 0, self.nbytes)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values. A view of the map where the file allows it; an aligned private copy where the offset is odd."""
        dtype = np.dtype(self.dtype.numpy())
        shape = self.shape.numpy()
        if self.size == 0:
            return np.empty(shape, dtype=dtype)
        if self.dtype.bitwidth < 8:
            # Packed types are unpacked by onnx_ir, from the bytes.
            return ir.PackedTensor(
                np.frombuffer(self._bytes(), dtype=np.uint8), self.dtype, shape=self.shape, name=self.name
            ).numpy()
        little = dtype.newbyteorder("<") if dtype.byteorder in "=<>" else dtype
        array: np.ndarray[Any, Any] = np.frombuffer(self._bytes(), dtype=np.uint8)
        if array.ctypes.data % max(dtype.alignment, 1):
            array = array.copy()
        return array.view(little).reshape(shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.numpy(), dtype=dtype)

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Positions `start` to `stop` of the first axis; earlier pages of the file are given back."""
        shape, dtype = self.shape.numpy(), np.dtype(self.dtype.numpy())
        if self.dtype.bitwidth < 8 or self.size == 0:
            return self.numpy()[start:stop]
        row = self.nbytes // int(shape[0])
        # Copied: a view would bring the pages back that are given to the system meanwhile, and may be unaligned.
        data = bytearray(self.file.view((self.offset or 0) + start * row, (stop - start) * row))
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(stop - start, *shape[1:])

    def tobytes(self) -> bytes:
        """The bytes of the tensor, copied."""
        return bytes(self._bytes())

    def tofile(self, file: IO[bytes]) -> None:
        """Write the bytes of the tensor, a chunk at a time."""
        for chunk in chunks(self):
            file.write(chunk)

    def release(self) -> None:
        """Give the resident pages of the file back."""
        self.file.shed()


def release_files(model: ir.Model) -> None:
    """Give the resident pages of all files back that the model's weights are in."""
    parts = (part for _, tensor in model_tensors(model) for part in stored(tensor))
    for file in dict.fromkeys(part.file for part in parts if isinstance(part, MappedTensor)):
        file.shed()


def chunks(tensor: ir.TensorProtocol, size: int = CHUNK) -> Iterator[memoryview]:
    """The serialised little-endian bytes of a tensor in pieces of at most `size` bytes.

    A mapped tensor is read piece by piece; any other tensor is already in memory and is cut up without another copy
    where its array allows it.
    """
    if isinstance(tensor, MappedTensor):
        start, end = tensor.offset or 0, (tensor.offset or 0) + tensor.nbytes
        for position in range(start, end, size):
            yield tensor.file.view(position, min(size, end - position))
        return
    if isinstance(tensor, PiecewiseTensor):
        yield from (memoryview(piece) for piece in tensor.byte_pieces())
        return
    view = memoryview(_plain_bytes(tensor))
    for position in range(0, len(view), size):
        yield view[position : position + size]


def _plain_bytes(tensor: ir.TensorProtocol) -> Any:
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray) and tensor.dtype.bitwidth >= 8:
        array = tensor.raw
        little = array.dtype.byteorder in "<|" or (array.dtype.byteorder == "=" and sys.byteorder == "little")
        if little and array.flags.c_contiguous:
            return array.reshape(-1).view(np.uint8).data
    return tensor.tobytes()


def contains_nan(tensor: ir.TensorProtocol) -> bool:
    """Whether a floating-point tensor holds a NaN, streamed. Infinities are legitimate: attention masks."""
    if not tensor.dtype.is_floating_point():
        return False
    if isinstance(tensor, MappedTensor) and tensor.dtype in _STREAMED and tensor.nbytes > CHUNK:
        dtype = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
        return any(bool(_isnan(np.frombuffer(chunk, dtype=dtype))) for chunk in chunks(tensor))
    if isinstance(tensor, PiecewiseTensor):
        return any(_isnan(piece) for piece in tensor.pieces())
    return bool(_isnan(tensor.numpy()))


_STREAMED = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16}


def _isnan(array: np.ndarray[Any, Any]) -> bool:
    if array.size == 0:
        return False
    if array.dtype in (np.float32, np.float64):
        # One pass without a temporary: a minimum is NaN exactly where an element is.
        with np.errstate(invalid="ignore"):
            return bool(np.isnan(array.min()))
    try:
        return bool(np.isnan(array).any())
    except TypeError:
        # Narrow ml_dtypes floats without an isnan loop; all widen to float32 exactly.
        return bool(np.isnan(array.astype(np.float32)).any())


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, function bodies and every nested subgraph, in a deterministic order."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.graph.subgraphs()


def model_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every stored tensor with its name: initialisers and tensor attributes of all graphs, in graph order."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.name or "", value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                label = f"{node.name or node.op_type}.{attribute.name}"
                if attribute.type == ir.AttributeType.TENSOR:
                    yield label, attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    for tensor in attribute.as_tensors():
                        yield label, tensor


Exchange = Callable[[ir.TensorProtocol], ir.TensorProtocol | None]
"""Gives the tensor to store instead of a tensor, or None to keep it."""


def exchange_tensors(model: ir.Model, initializer: Exchange, attribute: Exchange) -> None:
    """Exchange stored tensors in place.

    Args:
        model: the model.
        initializer: the exchange for initialisers of all graphs.
        attribute: the exchange for tensor attributes of nodes in all graphs.
    """
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = initializer(value.const_value) or value.const_value
        for node in graph:
            for name, old in list(node.attributes.items()):
                if old.is_ref():
                    continue
                if old.type == ir.AttributeType.TENSOR:
                    other = attribute(old.as_tensor())
                    if other is not None:
                        node.attributes[name] = ir.Attr(name, old.type, other, doc_string=old.doc_string)
                elif old.type == ir.AttributeType.TENSORS:
                    tensors = [attribute(tensor) or tensor for tensor in old.as_tensors()]
                    node.attributes[name] = ir.Attr(name, old.type, tensors, doc_string=old.doc_string)


def with_placeholders(model: ir.Model, initializer: Exchange, attribute: Exchange) -> ir.Model:
    """A clone with exchanged tensors, so that it can be serialised without its weights; see `exchange_tensors`.

    The model must be in topological order and is left as it is; the clone shares all tensors that are not exchanged.
    """
    clone = model.clone()
    exchange_tensors(clone, initializer, attribute)
    return clone


def reference(tensor: ir.TensorProtocol, location: str, offset: int, name: str | None = None) -> ir.ExternalTensor:
    """A tensor that only says where its bytes are to be found; nothing is read or checked."""
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name or tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
