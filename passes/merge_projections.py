"""merge-projections: linear operators that read one tensor become one, and a Split.

    [W_q x + b_q ; W_k x + b_k ; W_v x + b_v] = [W_q ; W_k ; W_v] x + [b_q ; b_k ; b_v]

Q, K and V of attention (of different widths where keys are shared by groups of queries), gate and up of a gated
feed-forward block. One wide product instead of several narrow ones, for a copy of its result.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import new_initializer, remove_node, replace_value
from graphopt.rewriting.linear import Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import begun, finish
from graphopt.sparsity.marks import declared_pattern, role_of


@dataclass(frozen=True)
class MergeProjections(Pass):
    """Make one MatMul or Gemm, and a Split, of those that multiply the same tensor: Q, K and V, gate and up.

    Algebra: the rows of several weights are the rows of one. Nothing is rounded anew but Gemm's alpha and beta.

    When it gains is the target's business, and `fold` leaves it: on ONNX Runtime with one thread nothing was gained
    (docs/decisions.md). Does not fire: on weights that are shared or computed, on
    factorised and sparse layers, where the type differs, where the last axis is not known to be the channels'.
    Preserves: number of bytes; the weights get one name, which is made of those of the first.
    """

    name: ClassVar[str] = "merge-projections"
    effect: ClassVar[Effect] = Effect.EXACT
    least: int = option(2, "projections of one tensor from which on they are merged", low=2)
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge in every graph of `model`."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model)
        merged = 0
        for graph, opset in scopes(model):
            families: dict[tuple[object, ...], list[Linear]] = defaultdict(list)
            for node in graph:
                if is_onnx(node, "MatMul", "Gemm") and len(node.inputs) > 1 and constant(node.inputs[1]) is not None:
                    found = _projection(node, opset)
                    if isinstance(found, str):
                        result.skipped.append(Skip(label(node), found))
                    else:
                        families[found.input, node.op_type, constant(node.inputs[1]).dtype].append(found)  # type: ignore[union-attr]
            for family in families.values():
                if len(family) >= self.least:
                    reason = _merge(family, graph, opset, names)
                    merged += 0 if reason else len(family)
                    result.skipped.extend(Skip(label(linear.node), reason) for linear in family if reason)
        if merged:
            finish(model, result, f"{merged} projections merged with others of the same tensor")
        return result


def _projection(node: ir.Node, opset: int) -> Linear | str:
    if role_of(node) is not None or declared_pattern(node) is not None:
        return "it belongs to a factorised or sparse layer"
    return linear_view(node, opset=opset)


def _merge(family: list[Linear], graph: ir.Graph, opset: int, names: Names) -> str | None:
    first = family[0]
    weight, source = first.node.inputs[1], first.input
    tensor = constant(weight)
    assert weight is not None and tensor is not None  # linear_view checked it
    if any(sum(output is linear.output for output in graph.outputs) > 1 for linear in family):
        return "one of the results is given out twice"
    matrix = np.concatenate([linear.matrices()[0, :, :, 0] for linear in family])
    bias = np.concatenate([linear.bias() for linear in family])
    gemm = is_onnx(first.node, "Gemm")
    transposed = gemm and first.node.attributes.get_int("transB", 0) != 0
    stem = names.fresh(f"{weight.name}_merged")
    wide = new_initializer(graph, stem, matrix if transposed else matrix.T, tensor.dtype)
    mark_origin(wide, [str(linear.node.inputs[1].name) for linear in family if linear.node.inputs[1] is not None])
    attributes = [ir.AttrInt64("transB", 1)] if transposed else []
    inputs = [source, wide]
    offset = new_initializer(graph, names.fresh(f"{stem}_bias"), bias, tensor.dtype) if bias.any() else None
    if gemm and offset is not None:
        inputs.append(offset)
    product = ir.Value(name=names.fresh(f"{stem}_product"))
    nodes = [ir.Node("", first.node.op_type, inputs, attributes, outputs=[product], name=names.fresh(f"{stem}_node"))]
    if not gemm and offset is not None:
        total = ir.Value(name=names.fresh(f"{stem}_sum"))
        nodes.append(ir.Node("", "Add", [product, offset], outputs=[total], name=names.fresh(f"{stem}_add")))
        product = total
    nodes.append(_split(product, family, graph, opset, stem, names))
    for node in nodes:
        mark_origin(node, [label(linear.node) for linear in family])
    graph.insert_before(first.node, nodes)
    for linear, part in zip(family, nodes[-1].outputs, strict=True):
        part.shape, part.type = linear.output.shape, linear.output.type
        replace_value(linear.output, part)
        if linear.add is not None:
            remove_node(linear.add)
        remove_node(linear.node)
    return None


def _split(value: ir.Value, family: list[Linear], graph: ir.Graph, opset: int, stem: str, names: Names) -> ir.Node:
    widths = [linear.outputs for linear in family]
    outputs = [ir.Value(name=names.fresh(f"{stem}_part")) for _ in family]
    attributes = [ir.AttrInt64("axis", -1)]
    inputs = [value]
    if opset < 13:
        attributes.append(ir.AttrInt64s("split", widths))
    else:
        inputs.append(new_initializer(graph, names.fresh(f"{stem}_widths"), np.array(widths), ir.DataType.INT64))
    return ir.Node("", "Split", inputs, attributes, outputs=outputs, name=names.fresh(f"{stem}_split"))
