"""unstack-means: a mean or sum over tensors that were stacked for it is taken without the stack.

    ReduceSum(Concat(Unsqueeze(a), Unsqueeze(b), ...))  =  a + b + ...          over the axis of the stack
    ReduceMean(...)                                     =  (a + b + ...) / n

Averaged experts and ensembles are exported that way; as a sum they are branches that `merge-branches` adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.edit import new_initializer, remove_unread, replace_value, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import finish


@dataclass(frozen=True)
class UnstackMeans(Pass):
    """Write ReduceMean and ReduceSum over the axis of a stack as a sum of what was stacked.

    Algebra: the sum over an axis along which tensors were stacked is their sum; the mean divides it by n.

    Does not fire: where the stack is read by others or given out, where other axes are reduced too or the axis is kept,
    where the parts are not known to have one shape and a floating-point type (a sum would broadcast them).
    Preserves: names of what stays.
    """

    name: ClassVar[str] = "unstack-means"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Unstack every mean and sum of `model`."""
        result = PassResult(changed=False)
        names = Names(model, later=True)
        count = 0
        for graph, _ in scopes(model):
            for node in tuple(graph):
                parts = _stacked(node)
                if parts is None:
                    continue
                reason = parts if isinstance(parts, str) else _unstack(node, parts, graph, names)
                if reason:
                    result.skipped.append(Skip(label(node), reason))
                else:
                    count += 1
        if count:
            finish(model, result, f"{count} means and sums of stacks taken without the stack")
        return result


def _axes(node: ir.Node) -> tuple[int, ...] | None:
    if "axes" in node.attributes and not node.attributes["axes"].is_ref():
        return tuple(node.attributes.get_ints("axes", ()))
    data = array(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if data is None else tuple(int(a) for a in data.ravel())


def _stacked(node: ir.Node) -> list[ir.Value] | str | None:
    """What a reduction reduces a stack of; None where it reduces no stack, else the reason it stays."""
    if not is_onnx(node, "ReduceMean", "ReduceSum") or node.inputs[0] is None:
        return None
    concat = node.inputs[0].producer()
    if concat is None or not is_onnx(concat, "Concat") or len(concat.inputs) < 2:
        return None
    layers = [v.producer() if v is not None else None for v in concat.inputs]
    if any(n is None or not is_onnx(n, "Unsqueeze") for n in layers) or concat.graph is not node.graph:
        return None
    if not sole_use(node.inputs[0]):
        return "the stack is read by others too"
    parts = [n.inputs[0] for n in layers if n is not None]
    first = parts[0]
    if first is None or first.shape is None or first.dtype is None or not first.dtype.is_floating_point():
        return "the shape of what is stacked is not known, or it is not floating-point"
    rank = len(first.shape) + 1
    found = [_axes(n) for n in (node, *layers) if n is not None]
    wanted = concat.attributes.get_int("axis", 0) % rank
    if node.attributes.get_int("keepdims", 1) or any(a is None or [x % rank for x in a] != [wanted] for a in found):
        return "it does not reduce just the axis of the stack"
    if any(p is None or p.shape != first.shape or None in [getattr(d, "value", d) for d in p.shape] for p in parts):
        return "the parts are not known to have one shape"
    return [p for p in parts if p is not None]


def _unstack(node: ir.Node, parts: list[ir.Value], graph: ir.Graph, names: Names) -> str | None:
    output, dtype = node.outputs[0], parts[0].dtype
    assert dtype is not None  # _stacked checked it
    if all(constant(p) is not None for p in parts):
        return "it is constant"
    total = ir.Value(name=names.fresh(f"{output.name}_sum"), shape=output.shape, type=output.type)
    nodes = [ir.Node("", "Sum", parts, outputs=[total], name=names.fresh(f"{label(node)}_sum"))]
    if is_onnx(node, "ReduceMean"):
        number = new_initializer(graph, names.fresh(f"{output.name}_count"), np.array(float(len(parts))), dtype)
        mean = ir.Value(name=names.fresh(f"{output.name}_mean"), shape=output.shape, type=output.type)
        nodes.append(ir.Node("", "Div", [total, number], outputs=[mean], name=names.fresh(f"{label(node)}_mean")))
    for new in nodes:
        mark_origin(new, [label(node)])
    graph.insert_after(node, nodes)
    replace_value(output, nodes[-1].outputs[0])
    remove_unread(node)
    return None
