"""How large a model is, by which folding judges what it did."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.rewriting.nodes import FOLDED_FROM, is_onnx
from graphopt.rewriting.scopes import scopes


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        nodes: nodes in the main graph, all bodies and functions, without Constant nodes, which only store a tensor.
        bytes: about what the file takes: tensors plus names and attributes, without the provenance we add.
    """

    nodes: int
    bytes: int


def node_bytes(node: ir.Node) -> int:
    """About how many bytes `node` takes in a file, tensors in its attributes included and bodies not."""
    total = 8 + len(node.name or "") + len(node.op_type) + len(node.domain)
    for value in node.inputs:
        if value is not None:
            total += 2 + len(value.name or "")
    for value in node.outputs:
        # It stands there twice: once more with its shape.
        total += 2 + len(value.name or "") + 16 + len(value.name or "")
    for key, text in node.metadata_props.items():
        if key != FOLDED_FROM:
            total += 4 + len(key) + len(text)
    # The dictionary itself: its wrapper looks every key up again.
    for attribute in node.attributes.data.values():
        total += _attribute_bytes(attribute)
    return total


def _attribute_bytes(attribute: ir.Attr) -> int:
    total = 6 + len(attribute.name)
    if attribute.is_ref():
        return total
    if attribute.type == ir.AttributeType.TENSOR:
        total += attribute.value.nbytes + 16
    elif attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
        total += 4 * len(attribute.value)
    elif attribute.type == ir.AttributeType.STRING:
        total += len(attribute.as_string())
    return total


def initializer_bytes(value: ir.Value) -> int:
    """About how many bytes an initializer takes in a file."""
    tensor = value.const_value
    return 16 + len(value.name or "") + (tensor.nbytes if tensor is not None else 0)


def size(model: ir.Model) -> Size:
    """Measure `model`, model-local functions included, in O(nodes); no weight is read."""
    nodes = total = 0
    for graph, _ in scopes(model):
        for node in graph:
            nodes += not is_onnx(node, "Constant")
            total += node_bytes(node)
        total += sum(initializer_bytes(v) for v in graph.initializers.values())
    return Size(nodes, total)
