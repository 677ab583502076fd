"""Which nodes compute sizes at run time, and what leaves these sizes open.

A compiler that wants fixed shapes (TVM, mobile delegates) asks that no tensor's size is computed: no Shape or Size,
and a constant wherever an operator reads sizes, bounds or repetitions.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs

_SIZES: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""The inputs of an operator that decide the size of its result."""

_BY_VALUE = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit"})
"""Operators whose result has a size that only the data tell."""


def computed_sizes(model: ir.Model) -> list[Skip]:
    """The nodes that compute or read sizes at run time, each with the reason; shapes must have been inferred."""
    found = []
    for graph in graphs(model):
        for node in graph:
            if is_onnx(node, "Shape", "Size") and node.inputs[0] is not None:
                found.append(Skip(label(node), f"it reads a size at run time: {_why(node.inputs[0], model)}"))
            for value in _size_operands(node):
                found.append(
                    Skip(label(node), f"its size is computed at run time from {value.name}: {_source(value, model)}")
                )
    return found


def _size_operands(node: ir.Node) -> Iterator[ir.Value]:
    if not is_onnx(node, *_SIZES):
        return
    for index in _SIZES[node.op_type]:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and constant(value) is None:
            yield value


def _source(value: ir.Value, model: ir.Model) -> str:
    """What a computed size comes from: the first Shape or operand above it that is not fixed."""
    todo, seen = [value], {value}
    while todo:
        current = todo.pop()
        node = current.producer()
        if node is None:
            if current.is_graph_input():
                return f"it is input {current.name} of the graph"
            continue
        if is_onnx(node, "Shape", "Size") and node.inputs[0] is not None:
            return _why(node.inputs[0], model)
        if is_onnx(node, *_BY_VALUE):
            return f"it depends on the data ({label(node)})"
        for operand in node.inputs:
            if operand is not None and operand not in seen and constant(operand) is None:
                seen.add(operand)
                todo.append(operand)
    return "it is computed from constants that were left (max_bytes), or in another graph"


def _is_open(value: ir.Value) -> bool:
    return value.shape is None or not all(isinstance(dim, int) for dim in value.shape)


def _why(value: ir.Value, model: ir.Model) -> str:
    """Where the first open dimension above a tensor comes from."""
    if not _is_open(value):
        return f"{value.name} has the fixed shape {value.shape}, but the result is an output of the graph"
    current, seen = value, {value}
    while True:
        node = current.producer()
        if node is None:
            if current.is_graph_input() and current.graph is model.graph:
                return f"input {current.name} leaves {current.shape} open (--dim or --input-shape fixes it)"
            return f"the shape of {current.name} is open in the body it belongs to"
        if is_onnx(node, *_BY_VALUE):
            return f"the size of {current.name} depends on the data ({label(node)})"
        above = [v for v in node.inputs if v is not None and v not in seen and constant(v) is None and _is_open(v)]
        if not above:
            reads = next(_size_operands(node), None)
            if reads is not None and reads not in seen:
                seen.add(reads)
                source = _source(reads, model)
                return f"the size of {current.name} is computed by {label(node)} from {reads.name}: {source}"
            return f"the size of {current.name} is not known from the inputs of {label(node)} ({node.op_type})"
        seen.update(above)
        current = above[0]
