"""Number formats, sizes and operator sets: what TensorRT has no type for, and what it changes on reading."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.files.opset import opset_of
from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs
from graphopt.tensorrt.findings import Finding, error, warning
from graphopt.tensorrt.versions import Version, newest_opset

D = ir.DataType
NATIVE = (D.FLOAT, D.FLOAT16, D.BFLOAT16, D.INT32, D.INT64, D.BOOL, D.INT8, D.UINT8, D.INT4, D.FLOAT8E4M3FN, D.DOUBLE)
RANKS = 8
OLDEST_OPSET = 9
INT64_SINCE: Version = (9, 0)
"""Before, whole numbers of 64 bits were cast down to 32 and clamped (operators.md of TensorRT 8.5)."""
TABLE = "onnx-tensorrt operators.md for TensorRT 10.15"


def check_types(model: ir.Model, version: Version) -> Iterator[Finding]:
    """Types of all tensors, bodies included, ranks, and the operator set."""
    yield from _opset(model, version)
    for graph in graphs(model):
        border = graph is model.graph
        for value in (*graph.inputs, *graph.initializers.values()):
            yield from _value(value, value.name or "", version)
        for node in graph:
            if is_onnx(node, "Constant"):
                yield from _constant(node)
            for value in node.outputs:
                yield from _value(value, node, version)
            yield from _bytes(node, border)


def _opset(model: ir.Model, version: Version) -> Iterator[Finding]:
    have, newest = opset_of(model), newest_opset(version)
    if have < OLDEST_OPSET:
        yield error(
            "opset",
            "",
            f"operator set {have} is older than {OLDEST_OPSET}, the oldest that TensorRT reads",
            f"export it with opset {OLDEST_OPSET} to {newest}",
            TABLE,
        )
    elif have > newest:
        text = f"operator set {have} is newer than {newest}, for which TensorRT {version[0]}.{version[1]} was made"
        yield warning("opset", "", text, f"export it with opset {newest} or older, or use a newer TensorRT", TABLE)


def _value(value: ir.Value, at: ir.Node | str, version: Version) -> Iterator[Finding]:
    kind = value.dtype
    if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
        yield error(
            "types",
            at,
            "it has a sequence or an optional value, which TensorRT has not",
            "write it with plain tensors (Split, Concat)",
            TABLE,
        )
    elif kind is not None and kind not in NATIVE and not _quantisable(value):
        yield error(
            "types",
            at,
            f"{kind.name.lower()} is no type of TensorRT",
            "cast it to int32, int64 or a float, or keep it outside the model",
            TABLE,
        )
    elif kind == D.DOUBLE:
        yield warning(
            "float64",
            at,
            "float64 is cast down to float32 on reading, numbers beyond its range are clamped",
            "cast it to float32 yourself, so that inputs and outputs have their declared type",
            TABLE,
        )
    elif kind == D.INT64 and version < INT64_SINCE:
        yield from _wide(value, at)
    known = shapes.dims(value)
    if known is not None and len(known) > RANKS:
        yield error(
            "rank",
            at,
            f"it has {len(known)} axes, and TensorRT has tensors of at most {RANKS}",
            "merge axes by Reshape",
            "NvInfer.h, Dims::MAX_DIMS",
        )


def _quantisable(value: ir.Value) -> bool:
    """4-bit floats, which only DequantizeLinear reads; the rules of quantised tensors judge them."""
    return value.dtype is not None and value.dtype.name == "FLOAT4E2M1"


def _wide(value: ir.Value, at: ir.Node | str) -> Iterator[Finding]:
    data = array(value)
    if data is None or not data.size:
        return
    limits = np.iinfo(np.int32)
    if int(data.max()) > limits.max or int(data.min()) < limits.min:
        ends = all(is_onnx(use.node, "Slice", "Loop") for use in value.uses())
        make = warning if ends else error
        yield make(
            "int64",
            at,
            "a number of 64 bits is beyond 32, to which this TensorRT cuts it down",
            "use TensorRT 10, or a smaller number",
            "onnx-tensorrt operators.md for TensorRT 8.5",
        )


def _constant(node: ir.Node) -> Iterator[Finding]:
    for name in ("sparse_value", "value_string", "value_strings"):
        if name in node.attributes:
            yield error("types", node, f"Constant with {name}", "store it as an initialiser (fold)", TABLE)


def _bytes(node: ir.Node, border: bool) -> Iterator[Finding]:
    """uint8 stands at inputs and outputs of the model alone, with a Cast behind or before it."""
    for value in node.inputs:
        if value is None or value.dtype != D.UINT8 or is_onnx(node, "Cast", "QuantizeLinear", "DequantizeLinear"):
            continue
        yield error(
            "uint8",
            node,
            f"it computes with {value.name!r}, which is uint8: TensorRT has that at inputs and "
            "outputs of a model alone",
            "put a Cast to float or int32 before it",
            TABLE,
        )
    for value in node.outputs:
        given = value.is_graph_output() and border
        if value.dtype == D.UINT8 and not given and not is_onnx(node, "QuantizeLinear", "Cast"):
            yield error("uint8", node, "it gives uint8 inside the model", "compute it in int32 or float", TABLE)
