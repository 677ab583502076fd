"""Checks of a model file before anything is built from it: versions, names, and every tensor against its bytes.

These run on the protobuf message because `onnx_ir` repairs or ignores some of what is wrong here (a dangling name
becomes a placeholder, a duplicate initialiser replaces the first). What can be said about the graph is in
`graphopt.files.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.external_data import DataFiles, check_extent, external_fields

if TYPE_CHECKING:
    import onnx

OPSET_MIN = 7
"""Oldest default-domain opset that is read: numpy-style broadcasting begins here."""

MAX_BYTES = 1 << 48
"""No tensor of a real model comes near this; a larger product of dimensions is a broken or hostile file."""


def check_proto(proto: onnx.ModelProto, files: DataFiles) -> None:
    """Check a parsed model file.

    Args:
        proto: the message; external tensors are checked against their files, which are opened through `files`.
        files: the data files of the model's folder.

    Raises:
        ModelError: names the node or tensor and what is wrong with it.
    """
    if not proto.HasField("graph"):
        raise ModelError("it holds no graph, so it is not an ONNX model")
    _check_text(proto)
    check_versions(proto)
    imports = {_domain(entry.domain) for entry in proto.opset_import}
    functions = {(f.domain, f.name) for f in proto.functions}
    _check_graph(proto.graph, set(), imports, functions, files)
    for function in proto.functions:
        _check_function(function, functions, files)


def _check_text(proto: onnx.ModelProto) -> None:
    """Check that names are text: the protobuf runtime hands out the raw bytes of strings that are no valid UTF-8."""
    from google.protobuf.message import Message  # type: ignore[import-untyped]

    pending: list[Any] = [proto]
    while pending:
        message = pending.pop()
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                pending.extend([value] if isinstance(value, Message) else value)
            elif field.type == field.TYPE_STRING:
                for text in [value] if isinstance(value, str | bytes) else value:
                    if isinstance(text, bytes):
                        raise ModelError(f"{field.name} {text[:40]!r} is not UTF-8 text", where=message.DESCRIPTOR.name)


def check_versions(proto: onnx.ModelProto) -> None:
    """Check IR version and default-domain opset.

    Raises:
        ModelError: unsupported or missing versions.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not 3 <= proto.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"ONNX IR version {proto.ir_version} is not supported (3 to {onnx.IR_VERSION} are)",
            hint="export the model again with a current exporter, or upgrade the onnx package",
        )
    seen: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = _domain(entry.domain)
        if seen.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f"opset {domain or 'ai.onnx'} is imported twice, as {seen[domain]} and {entry.version}")
    if not seen:
        raise ModelError("it imports no opset", hint="export the model again; every ONNX model states its opset")
    opset = seen.get("")
    if opset is not None and not OPSET_MIN <= opset <= newest:
        raise ModelError(
            f"opset {opset} is not supported ({OPSET_MIN} to {newest} are)",
            hint="convert it with onnx.version_converter" if opset < OPSET_MIN else "upgrade the onnx package",
        )


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _label(node: onnx.NodeProto) -> str:
    return f"node {node.name or '(unnamed)'} ({node.op_type or 'no operator'})"


def _check_graph(
    graph: onnx.GraphProto,
    outer: set[str],
    imports: set[str],
    functions: set[tuple[str, str]],
    files: DataFiles,
) -> None:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelError("sparse initialisers are not supported", where=f"tensor {name}", hint="store it as dense")
    inputs: set[str] = set()
    for info in graph.input:
        if not info.name:
            raise ModelError("a graph input has no name", where=f"graph {graph.name}")
        if info.name in inputs:
            raise ModelError("two graph inputs have this name", where=f"input {info.name}")
        inputs.add(info.name)
    initializers: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            raise ModelError("an initialiser has no name", where=f"graph {graph.name}")
        if tensor.name in initializers:
            raise ModelError("two initialisers have this name", where=f"initialiser {tensor.name}")
        initializers.add(tensor.name)
        check_tensor(tensor, f"initialiser {tensor.name}", files)
    defined = inputs | initializers
    defined |= _declared(graph.node, defined)
    visible = outer | defined
    for node in graph.node:
        _check_node(node, visible, imports, functions, files)
    for info in graph.output:
        if info.name not in visible:
            raise ModelError("nothing in the graph produces this output", where=f"output {info.name or '(unnamed)'}")
    for info in [*graph.input, *graph.output]:
        _check_dims(info)


def _declared(nodes: Iterable[onnx.NodeProto], taken: set[str]) -> set[str]:
    """The names the nodes define; raises where one is defined twice (single static assignment)."""
    names: set[str] = set()
    for node in nodes:
        for name in node.output:
            if not name:
                continue
            if name in names or name in taken:
                raise ModelError(f"it defines {name!r}, which is already defined", where=_label(node))
            names.add(name)
    return names


def _check_node(
    node: onnx.NodeProto,
    visible: set[str],
    imports: set[str],
    functions: set[tuple[str, str]],
    files: DataFiles,
) -> None:
    if not node.op_type:
        raise ModelError("it names no operator", where=_label(node))
    domain = _domain(node.domain)
    if domain not in imports and (node.domain, node.op_type) not in functions:
        raise ModelError(
            f"its operator set {domain or 'ai.onnx'!r} is not among the imports of the model",
            where=_label(node),
            hint=f"add an opset_import for {domain or 'ai.onnx'!r}",
        )
    for name in node.input:
        if name and name not in visible:
            raise ModelError(f"it reads {name!r}, which nothing defines", where=_label(node))
    attributes: set[str] = set()
    for attribute in node.attribute:
        where = f"{_label(node)}, attribute {attribute.name or '(unnamed)'}"
        if not attribute.name or attribute.name in attributes:
            raise ModelError("an attribute needs a name of its own", where=where)
        attributes.add(attribute.name)
        if attribute.ref_attr_name:
            continue
        _check_attribute_type(attribute, where)
        for tensor in _attribute_tensors(attribute):
            check_tensor(tensor, where, files)
        for graph in _attribute_graphs(attribute):
            _check_graph(graph, visible, imports, functions, files)


def _check_attribute_type(attribute: onnx.AttributeProto, where: str) -> None:
    """Check that the value stands in the field that the declared type names."""
    types = attribute.AttributeType
    singular = {types.FLOAT: "f", types.INT: "i", types.STRING: "s", types.TENSOR: "t", types.GRAPH: "g"}
    repeated = {
        types.FLOATS: "floats",
        types.INTS: "ints",
        types.STRINGS: "strings",
        types.TENSORS: "tensors",
        types.GRAPHS: "graphs",
        types.TYPE_PROTOS: "type_protos",
    }
    if attribute.type in {types.SPARSE_TENSOR, types.SPARSE_TENSORS}:
        raise ModelError("sparse tensors are not supported", where=where, hint="store it as dense")
    if attribute.type == types.TYPE_PROTO:
        return
    if attribute.type not in singular and attribute.type not in repeated:
        raise ModelError(f"attribute type {attribute.type} is unknown", where=where)
    declared = singular.get(attribute.type)
    # proto3 writers leave a zero out, so an absent scalar is its default; a tensor or graph has no default.
    if declared in {"t", "g"} and not attribute.HasField(declared):
        raise ModelError("it holds no value of its declared type", where=where)
    for kind, field in singular.items():
        if kind != attribute.type and attribute.HasField(field):
            raise ModelError(
                f"it is declared {types.Name(attribute.type)} but holds a value of type {types.Name(kind)}", where=where
            )


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.type == attribute.TENSOR:
        yield attribute.t
    elif attribute.type == attribute.TENSORS:
        yield from attribute.tensors


def _attribute_graphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.type == attribute.GRAPH:
        yield attribute.g
    elif attribute.type == attribute.GRAPHS:
        yield from attribute.graphs


def _check_function(function: onnx.FunctionProto, functions: set[tuple[str, str]], files: DataFiles) -> None:
    where = f"function {function.domain}::{function.name}"
    visible = set(function.input)
    if len(visible) != len(function.input):
        raise ModelError("two inputs have the same name", where=where)
    visible |= _declared(function.node, visible)
    imports = {_domain(entry.domain) for entry in function.opset_import}
    for node in function.node:
        _check_node(node, visible, imports, functions, files)
    for name in function.output:
        if name not in visible:
            raise ModelError(f"nothing produces its output {name!r}", where=where)


def _check_dims(info: onnx.ValueInfoProto) -> None:
    if info.type.WhichOneof("value") != "tensor_type":
        return
    for dim in info.type.tensor_type.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value < 0:
            raise ModelError(
                f"dimension {dim.dim_value} is negative",
                where=f"tensor {info.name}",
                hint="use a named dimension for an unknown size",
            )


def tensor_bytes(dims: Iterable[int], dtype: ir.DataType, where: str) -> int:
    """Bytes that a tensor of this shape takes.

    Raises:
        ModelError: a negative dimension, or a size that no machine holds.
    """
    sizes = tuple(dims)
    if any(size < 0 for size in sizes):
        raise ModelError(f"shape {list(sizes)} has a negative dimension", where=where)
    nbytes = (math.prod(sizes) * dtype.bitwidth + 7) // 8
    if nbytes > MAX_BYTES:
        raise ModelError(f"shape {list(sizes)} needs {nbytes} bytes, more than any machine holds", where=where)
    return nbytes


def check_tensor(tensor: onnx.TensorProto, where: str, files: DataFiles) -> None:
    """Check one tensor: known type, sane shape, and exactly the bytes that the shape needs.

    Raises:
        ModelError: says what contradicts what.
    """
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelError(f"tensor data type {tensor.data_type} is unknown", where=where) from error
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError("its tensor states no data type", where=where)
    if tensor.HasField("segment"):
        raise ModelError("segmented tensors are not supported", where=where)
    if dtype == ir.DataType.STRING:
        _check_strings(tensor, where)
        return
    nbytes = tensor_bytes(tensor.dims, dtype, where)
    if tensor.data_location == tensor.EXTERNAL:
        location, offset, length = external_fields(tensor, where)
        check_extent(files.open(location, where), offset, length, nbytes, where)
        return
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
        if held != nbytes:
            raise ModelError(
                f"{dtype.name} shape {list(tensor.dims)} needs {nbytes} bytes, but it holds {held}", where=where
            )
        return
    _check_typed_data(tensor, dtype, where)


def _check_strings(tensor: onnx.TensorProto, where: str) -> None:
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"shape {list(tensor.dims)} has a negative dimension", where=where)
    if tensor.data_location == tensor.EXTERNAL or tensor.HasField("raw_data"):
        raise ModelError("strings can be neither external nor raw data", where=where)
    if math.prod(tensor.dims) != len(tensor.string_data):
        raise ModelError(f"shape {list(tensor.dims)} contradicts its {len(tensor.string_data)} strings", where=where)


def _check_typed_data(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    """Check a tensor held in a typed field; complex numbers take two entries, sub-byte types share entries."""
    count = math.prod(tensor.dims)
    names = ir.DataType
    if dtype in {names.FLOAT, names.COMPLEX64}:
        field, needed = "float_data", count * (2 if dtype == names.COMPLEX64 else 1)
    elif dtype in {names.DOUBLE, names.COMPLEX128}:
        field, needed = "double_data", count * (2 if dtype == names.COMPLEX128 else 1)
    elif dtype == names.INT64:
        field, needed = "int64_data", count
    elif dtype in {names.UINT64, names.UINT32}:
        field, needed = "uint64_data", count
    else:
        field, needed = "int32_data", (count * dtype.bitwidth + 7) // 8 if dtype.bitwidth in {2, 4} else count
    held = len(getattr(tensor, field))
    if held != needed:
        raise ModelError(
            f"{dtype.name} shape {list(tensor.dims)} needs {needed} entries of {field}, but it holds {held}",
            where=where,
        )
