"""Which inputs and outputs of a node follow when a model becomes float16 or bfloat16: read off the operator schemas.

A schema names the type of every input and output: a concrete type (scales of Resize are float32), or a variable with
the types that it may be. Where the variable admits the half type, everything of this variable becomes half, the rest
stays as it is. Nothing is listed by operator, so operators of later opsets and of ONNX Runtime's own domain are read
the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx_ir as ir

from graphopt.rewriting.nodes import is_onnx

TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "output_dtype")
"""Attributes that give the type of a result which no input determines."""

CONTROL_FLOW = ("If", "Loop", "Scan")
TENSOR_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclass(frozen=True)
class Signature:
    """What of a node becomes half, if it is float32.

    Attributes:
        inputs: for each input whether it takes the half type.
        free: for each input whether it takes either type, because nothing else depends on it (Shape, Cast, IsNaN).
        outputs: for each output whether it has the half type then.
        attribute: the attribute that says so, if no input does.
    """

    inputs: tuple[bool, ...]
    free: tuple[bool, ...]
    outputs: tuple[bool, ...]
    attribute: str | None = None


@dataclass(frozen=True)
class _Schema:
    """Type names of formal inputs and outputs, what a variable may be, and attributes."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: Mapping[str, frozenset[str]]
    attributes: frozenset[str]

    def admits(self, kind: str, half: str) -> bool:
        return half in self.allowed.get(kind, ())


def is_float32(value: ir.Value | None) -> bool:
    """Whether a value is a tensor of float32."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def signature(node: ir.Node, opsets: Mapping[str, int], half: ir.DataType) -> Signature | str:
    """Read the signature of a node, or why it stays in float32.

    Args:
        node: with inferred types; no If, Loop or Scan.
        opsets: of the model, by domain.
        half: FLOAT16 or BFLOAT16.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 1) if not domain else 1)
    schema = _schema(domain, node.op_type, version)
    name = half.name.lower()
    if schema is None:
        return f"there is no schema of {node.domain or 'ai.onnx'}.{node.op_type} that tells its types"
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.name and isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            return "it handles sequences or optional values, which stay as they are"
    kinds = [_formal(schema.inputs, i) for i in range(len(node.inputs))]
    made = [_formal(schema.outputs, i) for i in range(len(node.outputs))]
    takes = [schema.admits(kind, TENSOR_NAMES[half]) for kind in kinds]
    for value, taken in zip(node.inputs, takes, strict=True):
        if taken and value is not None and value.type is None:
            return f"the type of its input {value.name!r} is unknown"
    bound = {kind for kind, value in zip(kinds, node.inputs, strict=True) if value is not None}
    attribute = _type_attribute(node, schema, made, bound)
    gives = [schema.admits(kind, TENSOR_NAMES[half]) and (kind in bound or attribute is not None) for kind in made]
    for value, given in zip(node.outputs, gives, strict=True):
        if given and value.name and value.uses() and value.type is None:
            return f"the type of its output {value.name!r} is unknown"
    follows = any(t and is_float32(v) for t, v in zip(takes, node.inputs, strict=True))
    follows = follows or any(g and is_float32(v) for g, v in zip(gives, node.outputs, strict=True))
    touches = any(is_float32(v) for v in (*node.inputs, *node.outputs))
    if touches and not follows:
        return f"opset {version} has no {name} for {node.op_type}"
    floats = [kind for kind, value in zip(kinds, node.inputs, strict=True) if is_float32(value)]
    free = tuple(t and kind not in made and floats.count(kind) == 1 for kind, t in zip(kinds, takes, strict=True))
    return Signature(tuple(takes), free, tuple(gives), attribute)


def control_admits(node: ir.Node, opsets: Mapping[str, int], half: ir.DataType) -> bool:
    """Whether an If, Loop or Scan of this opset may carry the half type."""
    schema = _schema("", node.op_type, opsets.get("", opsets.get("ai.onnx", 1)))
    return schema is not None and schema.admits("V", TENSOR_NAMES[half])


def _formal(kinds: Sequence[str], index: int) -> str:
    """Type of an actual parameter; the last formal one may stand for many."""
    return kinds[min(index, len(kinds) - 1)] if kinds else ""


def _type_attribute(node: ir.Node, schema: _Schema, made: Sequence[str], bound: set[str]) -> str | None:
    """The attribute to change where a float32 result gets its type from no input."""
    if not any(kind not in bound and is_float32(v) for kind, v in zip(made, node.outputs, strict=True)):
        return None
    if is_onnx(node, "ConstantOfShape"):
        return "value"
    return next((name for name in TYPE_ATTRIBUTES if name in schema.attributes), None)


@cache
def _schema(domain: str, op_type: str, version: int) -> _Schema | None:
    if domain == "com.microsoft":
        return _runtime_schemas().get(op_type)
    from onnx import defs

    try:
        found = defs.get_schema(op_type, version, domain)
    except defs.SchemaError:
        return None
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in found.type_constraints}
    return _Schema(
        tuple(i.type_str for i in found.inputs), tuple(o.type_str for o in found.outputs), allowed,
        frozenset(found.attributes),
    )  # fmt: skip


@cache
def _runtime_schemas() -> dict[str, _Schema]:
    """Schemas of ONNX Runtime's own operators, from the installed one."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    found: dict[str, Any] = {}
    for schema in runtime.get_all_operator_schema():
        known = found.get(schema.name)
        if schema.domain == "com.microsoft" and (known is None or known.since_version < schema.since_version):
            found[schema.name] = schema
    return {
        name: _Schema(
            tuple(i.typeStr for i in schema.inputs),
            tuple(o.typeStr for o in schema.outputs),
            {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
            frozenset(schema.attributes),
        )
        for name, schema in found.items()
    }
