"""Archives: a whole model in one `.safetensors` file, its weights readable by every tool that knows the format.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a header, little-endian; the
header, JSON that gives type, shape and range of every tensor; the bytes of the tensors, without gaps. Here every weight
of the main graph is a tensor under its own name, and `graphopt.graph` holds, as bytes, the ONNX model without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.weights import chunks

if TYPE_CHECKING:
    import onnx

SUFFIX = ".safetensors"
GRAPH = "graphopt.graph"
"""Name of the tensor that holds the model without its weights."""
METADATA = {"format": "onnx", "graphopt.archive": "1"}
HEADER_LIMIT = 100_000_000
"""Readers of the format refuse longer headers."""

_NAMES = {
    ir.DataType.BOOL: "BOOL",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT8: "I8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
    ir.DataType.INT16: "I16",
    ir.DataType.UINT16: "U16",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT32: "I32",
    ir.DataType.UINT32: "U32",
    ir.DataType.FLOAT: "F32",
    ir.DataType.INT64: "I64",
    ir.DataType.UINT64: "U64",
    ir.DataType.DOUBLE: "F64",
}
"""Types that the format has; weights of others stay within the graph."""
_SIZES = {name: dtype.bitwidth // 8 for dtype, name in _NAMES.items()}


def holds(name: str, tensor: ir.TensorProtocol) -> bool:
    """Whether a weight is a tensor of its own in an archive."""
    return tensor.dtype in _NAMES and tensor.nbytes > 0 and name not in (GRAPH, "__metadata__")


def pieces(weights: dict[str, ir.TensorProtocol], graph: bytes) -> Iterator[bytes | memoryview]:
    """The bytes of an archive, streamed.

    Args:
        weights: what `holds` accepts, by name.
        graph: the encoded model, whose weights say that they are elsewhere.
    """
    # The widest elements first, so that every tensor is aligned.
    order = sorted(weights.items(), key=lambda item: -item[1].dtype.bitwidth)
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name, tensor in order:
        shape = [int(d) for d in tensor.shape.numpy()]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    header[GRAPH] = {"dtype": "U8", "shape": [len(graph)], "data_offsets": [end, end + len(graph)]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ModelError(f"its {len(weights)} weights need a header of {len(text)} bytes, the format ends before")
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in order:
        yield from chunks(tensor)
    yield graph


def parse(path: Path) -> onnx.ModelProto:
    """The model of an archive, its weights as external tensors that lie in the file of the archive.

    Raises:
        ModelError: it is damaged, hostile, or not an archive of a model.
        OSError: it cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise ModelError("it is no safetensors file, or it is truncated", hint="check that the copy is complete")
        ranges = _ranges(file.read(length), size - 8 - length)
        if GRAPH not in ranges:
            raise ModelError(
                f"it holds weights, but no model ({GRAPH} is missing)", hint="name the .onnx file that they belong to"
            )
        start, end = ranges.pop(GRAPH)
        file.seek(8 + length + start)
        encoded = file.read(end - start)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(encoded)
    except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
        raise ModelError(f"{GRAPH} is not an ONNX protobuf", hint="the file is damaged; copy it again") from error
    for tensor in proto.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        if tensor.name not in ranges:
            raise ModelError("the archive does not hold it", where=f"initialiser {tensor.name}")
        start, end = ranges[tensor.name]
        del tensor.external_data[:]
        for key, value in (("location", path.name), ("offset", 8 + length + start), ("length", end - start)):
            tensor.external_data.add(key=key, value=str(value))
    return proto


def _ranges(text: bytes, size: int) -> dict[str, tuple[int, int]]:
    """The range of every tensor in the bytes behind the header, which they fill without gaps."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"its header is not JSON ({str(error)[:100]})", hint="the file is damaged") from error
    if not isinstance(header, dict):
        raise ModelError("its header is no JSON object", hint="the file is damaged")
    header.pop("__metadata__", None)
    found = {name: _range(name, entry) for name, entry in header.items()}
    position = 0
    for name, (start, end) in sorted(found.items(), key=lambda item: item[1]):
        if start != position:
            raise ModelError(f"it starts at byte {start}, not at {position}", where=f"tensor {name}")
        position = end
    if position != size:
        raise ModelError(f"its tensors take {position} bytes, but it holds {size}", hint="the file is truncated")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _range(name: str, entry: Any) -> tuple[int, int]:
    where = f"tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelError("its entry has not the three parts of the format", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ModelError("its shape or range is not made of natural numbers", where=where)
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ModelError(f"its type {str(dtype)[:40]!r} is unknown", where=where)
    if math.prod(shape) * _SIZES[dtype] != offsets[1] - offsets[0]:
        raise ModelError(f"{dtype} of shape {shape} does not take {offsets[1] - offsets[0]} bytes", where=where)
    return offsets[0], offsets[1]


def _naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
