"""Writing a model: streamed, atomic, and byte-identical for an identical model.

An inline model is written field by field in the canonical order of the protobuf encoding
(https://protobuf.dev/programming-guides/encoding/), the weights of the main graph straight from where they are: neither
a second copy of them nor a serialised message with them ever exists in memory.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError
from graphopt.files import archive, compression
from graphopt.files.piecewise import stored
from graphopt.files.shape_inference import annotated
from graphopt.files.spill import SpilledTensor
from graphopt.files.stored import Storage
from graphopt.files.stored_shapes import keep_needed
from graphopt.files.weights import all_graphs, chunks, model_tensors, reference, with_placeholders

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message  # type: ignore[import-untyped]

INLINE_LIMIT = 1_800_000_000
"""Weights above this many bytes go to a data file of their own: a protobuf message ends at 2 GiB."""

STREAMED = 1024
"""Tensors above this many bytes are streamed or stored externally; smaller ones stay inside the message."""

PAGE = 4096
LARGE = 64 << 10
"""Tensors of at least this many bytes start on a page of the data file."""

PROTOBUF_LIMIT = (1 << 31) - (1 << 20)
"""Size of a graph message that leaves room for the rest of the model below protobuf's 2 GiB."""


def write(model: ir.Model, path: Path, external: bool | None, compress: bool) -> Storage | None:
    """Write the model to `path`, its external data (if any) beside it as `<name>.data`; see `graphopt.model.save`."""
    whole = path.suffix == archive.SUFFIX
    given = is_external(model) if external is None else external
    # Runtimes decide on fusions by shapes, and their own inference finds fewer of them.
    model = annotated(model)
    storage = compression.compress(model) if compress else None
    if whole:
        _write_archive(model, path)
    elif given or (external is None and _weight_bytes(model) > INLINE_LIMIT):
        _write_external(model, path)
    else:
        _write_inline(model, path)
    return storage


def is_external(model: ir.Model) -> bool:
    """Whether weights of the model live in external data files, apart from the file with its graph."""
    return any(
        isinstance(tensor, ir.ExternalTensor)
        and not isinstance(tensor, SpilledTensor)
        and Path(tensor.location).suffix != archive.SUFFIX
        for _, whole in model_tensors(model)
        for tensor in stored(whole)
    )


def _weight_bytes(model: ir.Model) -> int:
    return _total(tensor for _, tensor in model_tensors(model))


def _total(tensors: Iterable[ir.TensorProtocol]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors if tensor.dtype != ir.DataType.STRING}.values())


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and leaves nothing behind when it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise GraphoptError(
            f"it cannot be written ({error.strerror or error})", where=str(path), hint="check space and permissions"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Systems that cannot sync a folder (Windows) make renames durable by themselves."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The message of a model from `annotated`, with the shapes that its readers do not find themselves."""
    proto = ir.to_proto(model)
    keep_needed(proto)
    return proto


def _write_external(model: ir.Model, path: Path) -> None:
    data_path = path.with_name(path.name + ".data")
    offsets: dict[int, int] = {}
    order: list[ir.TensorProtocol] = []
    end = 0
    # Attributes stay inside the message, where every consumer reads them, unless they do not fit there.
    attributes = _attributes(model)
    huge_attributes = _total(attributes) > INLINE_LIMIT
    for tensor in _initializers(model) + (attributes if huge_attributes else []):
        if id(tensor) in offsets or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= STREAMED:
            continue
        # Page-aligned large tensors can be mapped by any runtime; cache lines do for the others.
        alignment = PAGE if tensor.nbytes >= LARGE else 64
        end = -(-end // alignment) * alignment
        offsets[id(tensor)] = end
        order.append(tensor)
        end += tensor.nbytes

    def choose(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if id(tensor) in offsets:
            return reference(tensor, data_path.name, offsets[id(tensor)])
        return in_memory(tensor)

    proto = _skeleton(with_placeholders(model, choose, choose if huge_attributes else in_memory))
    if order:
        with _replacing(data_path) as file:
            for tensor in order:
                file.write(b"\0" * (offsets[id(tensor)] - file.tell()))
                for chunk in chunks(tensor):
                    file.write(chunk)
    with _replacing(path) as file:
        file.write(_serialize(proto))


def _initializers(model: ir.Model) -> list[ir.TensorProtocol]:
    values = (value for graph in all_graphs(model) for value in graph.initializers.values())
    return [value.const_value for value in values if value.const_value is not None]


def _attributes(model: ir.Model) -> list[ir.TensorProtocol]:
    return [
        attribute.as_tensor()
        for graph in all_graphs(model)
        for node in graph
        for attribute in node.attributes.values()
        if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR
    ]


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """An in-memory stand-in for an external tensor that is to be stored inside the message."""
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return _RawTensor(tensor)


class _RawTensor(ir.LazyTensor):
    """An external tensor that serialises its bytes instead of a reference."""

    def __init__(self, source: ir.ExternalTensor) -> None:
        super().__init__(
            lambda: source,
            dtype=source.dtype,
            shape=ir.Shape(source.shape.numpy()),
            name=source.name,
            doc_string=source.doc_string,
            metadata_props=dict(source.metadata_props),
        )


def _serialize(proto: onnx.ModelProto) -> bytes:
    try:
        encoded: bytes = proto.SerializeToString(deterministic=True)
    except Exception as error:
        # The protobuf runtimes (upb, C++, Python) raise unrelated types for a message that is too large.
        raise ModelError(f"the graph does not fit into a protobuf message ({error})") from error
    return encoded


def _write_archive(model: ir.Model, path: Path) -> None:
    proto, sources = _without_weights(model, archive.holds)
    for tensor in proto.graph.initializer:
        del tensor.external_data[:]  # where it lies says the header
    with _replacing(path) as file:
        for piece in archive.pieces(sources, _serialize(proto)):
            file.write(piece)


def _without_weights(
    model: ir.Model, apart: Callable[[str, ir.TensorProtocol], bool]
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The message of a model, and the initializers of the main graph that are not in it: those that `apart` takes."""
    clone = with_placeholders(model, in_memory, in_memory)
    sources: dict[str, ir.TensorProtocol] = {}
    for name, value in clone.graph.initializers.items():
        tensor = model.graph.initializers[name].const_value
        if tensor is not None and apart(name, tensor):
            sources[name] = tensor
            value.const_value = reference(tensor, "elsewhere", 0)
    return _skeleton(clone), sources


def _is_large(name: str, tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes > STREAMED


def _write_inline(model: ir.Model, path: Path) -> None:
    import onnx

    proto, sources = _without_weights(model, _is_large)
    fields = [_TensorField(entry, sources.get(entry.name)) for entry in proto.graph.initializer]
    graph_before, graph_after = _around(proto.graph, onnx.GraphProto.INITIALIZER_FIELD_NUMBER)
    model_before, model_after = _around(proto, onnx.ModelProto.GRAPH_FIELD_NUMBER)
    size = len(graph_before) + len(graph_after) + sum(field.size for field in fields)
    if size > PROTOBUF_LIMIT:
        raise ModelError(
            f"its {size} bytes do not fit into one protobuf file", where=str(path), hint="save it with external data"
        )
    with _replacing(path) as file:
        file.write(model_before + prefix(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph_before)
        for field in fields:
            field.write(file)
        file.write(graph_after + model_after)


class _TensorField:
    """One initialiser as a field of the graph message, its raw data streamed where there is a source for it."""

    def __init__(self, proto: onnx.TensorProto, source: ir.TensorProtocol | None) -> None:
        import onnx

        self._source = source
        if source is None:
            head, tail, raw = proto.SerializeToString(deterministic=True), b"", 0
        else:
            proto.ClearField("external_data")
            proto.ClearField("data_location")
            head, tail = _around(proto, onnx.TensorProto.RAW_DATA_FIELD_NUMBER)
            raw = source.nbytes
            head += prefix(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, raw)
        key = prefix(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + raw + len(tail))
        self._head, self._tail = key + head, tail
        self.size = len(self._head) + raw + len(self._tail)

    def write(self, file: IO[bytes]) -> None:
        """Write the field."""
        file.write(self._head)
        if self._source is not None:
            for chunk in chunks(self._source):
                file.write(chunk)
        file.write(self._tail)


def _around(message: Message, number: int) -> tuple[bytes, bytes]:
    """The encodings of the fields of a message with a lower and with a higher number than `number`."""
    halves = []
    for lower in (True, False):
        half = type(message)()
        half.CopyFrom(message)
        for field, _ in message.ListFields():
            if field.number == number or (field.number < number) != lower:
                half.ClearField(field.name)
        halves.append(half.SerializeToString(deterministic=True))
    return halves[0], halves[1]


def prefix(number: int, length: int) -> bytes:
    """Key and length of a length-delimited field."""
    encoded = bytearray()
    for value in (number << 3 | 2, length):
        rest = value
        while rest > 0x7F:
            encoded.append(rest & 0x7F | 0x80)
            rest >>= 7
        encoded.append(rest)
    return bytes(encoded)
