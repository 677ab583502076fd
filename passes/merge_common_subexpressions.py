"""merge-common-subexpressions: two nodes that compute the same from the same become one.

f(x) computed twice is f(x) computed once: same operator, same inputs (the same value objects), same attributes, same
number of outputs, and f deterministic. Add, Mul and other commutative operators match in either order, which is exact
in floating point too (commutative, only not associative).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.edit import cannot_replace, remove_node, replace_value
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import bodies

RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
COMMUTATIVE = ("Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
_LARGEST_TENSOR_ATTRIBUTE = 1024
"""Bytes; larger constants are the business of dedupe-initializers, which does not build keys of them."""


@dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Merge nodes that compute the same function of the same inputs; a body also reuses what is computed outside it.

    Does not fire: on random operators, Dropout with a training mode, operators of unknown domains, nodes with bodies,
    and where both results are graph outputs. Preserves: graph outputs and their names; the first node stays.
    """

    name: ClassVar[str] = "merge-common-subexpressions"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge in the main graph, model-local functions and all bodies."""
        result = PassResult(changed=False)
        merged = _merge(model.graph, {}, result)
        merged += sum(_merge(function.graph, {}, result) for function in model.functions.values())
        if merged:
            result.changed = True
            result.notes.append(f"{merged} nodes merged with an equal one")
        return result


def _merge(graph: ir.Graph, outer: dict[Any, ir.Node], result: PassResult) -> int:
    seen = dict(outer)
    merged = 0
    for node in tuple(graph):
        for body in bodies(node):
            # What was computed so far dominates the body, so the body may read it.
            merged += _merge(body, seen, result)
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node:
            continue
        reason = next(
            filter(None, (cannot_replace(o, n) for o, n in zip(node.outputs, first.outputs, strict=True))), None
        )
        if reason:
            result.skipped.append(Skip(label(node), f"equal to another {node.op_type}, but {reason}"))
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            replace_value(old, new)
        mark_origin(first, [label(node)])
        remove_node(node)
        merged += 1
    return merged


def _key(node: ir.Node) -> Any:
    """What equal nodes have in common; None where the node must not be merged."""
    if node.domain not in _KNOWN_DOMAINS or is_onnx(node, *RANDOM, "Constant") or node.op_type.startswith("Random"):
        return None
    if is_onnx(node, "Dropout") and len(node.inputs) > 2:
        return None
    if is_onnx(node, "BatchNormalization") and node.attributes.get_int("training_mode", 0) != 0:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            if value.nbytes > _LARGEST_TENSOR_ATTRIBUTE:
                return None
            value = (value.dtype, tuple(value.shape), value.tobytes())
        elif attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            value = tuple(value)
        elif attribute.type not in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            return None
        attributes.append((name, attribute.type, value))
    inputs = [id(v) for v in node.inputs]
    if is_onnx(node, *COMMUTATIVE):
        inputs.sort()
    # An output that is left out (empty name) may be another one than in the node it is compared with.
    present = tuple(bool(v.name) for v in node.outputs)
    return (node.op_identifier(), tuple(inputs), tuple(attributes), present)
