"""Bodies of If, Loop and Scan: compared, written out where their node stands, and their outputs dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import replace_value
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import bodies

_RANDOM = ("Bernoulli", "Multinomial")


def drop_output(node: ir.Node, index: int) -> None:
    """Take output `index`, which nobody reads, from a node; those behind it move up."""
    outputs = list(node.outputs)
    for place in range(index, len(outputs) - 1):
        old, following = outputs[place], outputs[place + 1]
        name, old.name = following.name, None
        following.name = None
        old.name, old.type, old.shape = name, following.type, following.shape
        following.replace_all_uses_with(old, replace_graph_outputs=True)
    node.resize_outputs(len(outputs) - 1)


def equal_graphs(one: ir.Graph, other: ir.Graph) -> str | None:
    """None where two bodies without inputs compute the same; "" where they do not, else a reason not to look."""
    matched: dict[ir.Value, ir.Value] = {}
    if len(one.outputs) != len(other.outputs) or len(one) != len(other):
        return ""
    for left, right in zip(one, other, strict=True):
        if not left.outputs or left.op_type.startswith("Random") or is_onnx(left, *_RANDOM):
            return "its branches look alike, but hold a random operator or a node without outputs"
        if any(True for node in (left, right) for _ in bodies(node)) or not _alike(left, right, matched):
            return ""
        matched.update(zip(left.outputs, right.outputs, strict=True))
    return None if all(_same(a, b, matched) for a, b in zip(one.outputs, other.outputs, strict=True)) else ""


def _alike(left: ir.Node, right: ir.Node, matched: dict[ir.Value, ir.Value]) -> bool:
    if left.op_identifier() != right.op_identifier() or left.attributes.keys() != right.attributes.keys():
        return False
    if len(left.outputs) != len(right.outputs) or len(left.inputs) != len(right.inputs):
        return False
    for name, attribute in left.attributes.items():
        there = right.attributes[name]
        if attribute.is_ref() or there.is_ref() or attribute.type != there.type:
            return False
        if attribute.type == ir.AttributeType.TENSOR:
            if not _equal(attribute.as_tensor(), there.as_tensor()):
                return False
        elif attribute.value != there.value:
            return False
    return all(_same(a, b, matched) for a, b in zip(left.inputs, right.inputs, strict=True))


def _same(a: ir.Value | None, b: ir.Value | None, matched: dict[ir.Value, ir.Value]) -> bool:
    if a is b or a is None or b is None:
        return a is b
    if a in matched:
        return matched[a] is b
    left, right = constant(a), constant(b)
    return left is not None and right is not None and _equal(left, right)


def _equal(left: ir.TensorProtocol, right: ir.TensorProtocol) -> bool:
    if left.dtype != right.dtype or list(left.shape) != list(right.shape) or left.dtype == ir.DataType.STRING:
        return False
    a, b = (np.array(t.numpy(), order="C").tobytes() for t in (left, right))
    return a == b


def inline(
    node: ir.Node, body: ir.Graph, operands: Sequence[ir.Value | None], editor: Editor, *, skip: int = 0
) -> str | None:
    """Put the nodes of `body` where `node` stands and take `node` away.

    Args:
        node: an If or a Loop that runs its body exactly once.
        body: that body.
        operands: what its inputs stand for.
        editor: gives names that are free.
        skip: outputs of the body in front of those of the node.

    Returns:
        None where it was done, otherwise the reason why it cannot be.
    """
    graph = node.graph
    results = list(body.outputs)[skip:]
    if not isinstance(graph, ir.Graph) or any(v is None for v in operands):
        return "an operand of it is missing"
    inner = {v for n in body for v in n.outputs}
    for output, result in zip(node.outputs, results, strict=True):
        if output.is_graph_output() and (result not in inner or results.count(result) > 1):
            return "it gives out what it only passes on"
    for value, operand in zip(body.inputs, operands, strict=True):
        assert operand is not None  # checked above
        value.replace_all_uses_with(operand, replace_graph_outputs=True)
    results = list(body.outputs)[skip:]
    body.outputs.clear()
    taken = editor.names_outside(body)

    def free(name: str) -> str:
        return editor.fresh(name) if name in taken else name

    for name, value in tuple(body.initializers.items()):
        body.initializers.pop(name)
        value.name = free(name)
        graph.register_initializer(value)
    for moved in tuple(body):
        body.remove(moved)
        if moved.name:
            moved.name = free(moved.name)
        for value in moved.outputs:
            if value.name:
                value.name = free(value.name)
        graph.insert_before(node, moved)
    for output, result in zip(node.outputs, results, strict=True):
        replace_value(output, result)
        if (maker := result.producer()) is not None:
            mark_origin(maker, [label(node)])
    graph.remove(node, safe=True)
    return None
