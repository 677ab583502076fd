"""What rules ask of a node: its operator, what a report calls it, what was folded into it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

FOLDED_FROM = "graphopt.folded_from"
"""Key in `metadata_props`: the nodes or values that went into this one, separated by commas."""


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """True if `node` is one of these operators of the standard domain."""
    return node.op_type in op_types and node.domain in ("", "ai.onnx")


def refers_to_caller(node: ir.Node) -> bool:
    """Whether an attribute of `node`, in a model-local function, is given by the function's caller."""
    return any(attribute.is_ref() for attribute in node.attributes.data.values())


def label(node: ir.Node) -> str:
    """How a report names `node`: its name, or its operator and first output where it has none."""
    return node.name or f"{node.op_type}({node.outputs[0].name if node.outputs else ''})"


def mark_origin(item: ir.Node | ir.Value, names: Iterable[str]) -> None:
    """Record in `item.metadata_props` what was folded into it, in order and without repetition."""
    known = item.metadata_props.get(FOLDED_FROM, "")
    merged = dict.fromkeys([*filter(None, known.split(",")), *names])
    item.metadata_props[FOLDED_FROM] = ",".join(merged)
