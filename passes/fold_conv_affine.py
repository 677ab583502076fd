"""fold-conv-affine: Mul, Div, Add and Sub by a constant per channel into the linear operator before or after.

With k constant along all axes but the channel axis, each of them is y = a x + c:

    x * k: a = k      x / k: a = 1/k      x + k: c = k      x - k: c = -k      k - x: a = -1, c = k

and folds like a BatchNormalization (`graphopt.rewriting.linear`). Chains such as Conv - Mul - Add go link by link.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.rewriting.activations import fused_pattern
from graphopt.rewriting.affine import arithmetic_affine, per_channel
from graphopt.rewriting.constants import Float64, allow_private_initializers, constant, float64
from graphopt.rewriting.edit import bypass, cannot_replace, sole_use
from graphopt.rewriting.growth import grows
from graphopt.rewriting.linear import LINEAR_OPS, Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import scopes, settle_functions
from graphopt.rewriting.weight_pass import begun


@dataclass(frozen=True)
class FoldConvAffine(Pass):
    """Fold a Mul, Div, Add or Sub by a per-channel constant into the Conv, ConvTranspose, Gemm or MatMul beside it.

    Algebra: a (W x + b) + c = (a W) x + (a b + c); W (a x + c) + b = (W a) x + (b + W c). In float64, rounded once.

    Does not fire: where the constant varies along another axis or would broadcast the tensor to a larger one, where the
    weight is shared or not constant, where the tensor between is read by others or given out, for a shift before a
    zero-padded or transposed convolution, where the result overflows, becomes subnormal or divides by zero, and where
    the factor ends an activation or normalisation that runtimes fuse (the 0.5 of a Gelu).
    Preserves: names of nodes and parameters.
    """

    name: ClassVar[str] = "fold-conv-affine"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold every affine node of `model` that can be folded exactly, chains link by link."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model, later=True)
        count = 0
        for graph, opset in scopes(model):
            for node in tuple(graph):
                if node.graph is not graph or not is_onnx(node, "Mul", "Div", "Add", "Sub"):
                    continue
                outcome = _fold(node, opset, names)
                if outcome == "":
                    count += 1
                elif outcome is not None:
                    result.skipped.append(Skip(label(node), outcome))
        if count:
            settle_functions(model)
            result.changed = True
            result.notes.append(f"{count} Mul/Div/Add/Sub by constants folded into linear operators")
            if note := allow_private_initializers(model):
                result.notes.append(note)
        return result


def _fold(node: ir.Node, opset: int, names: Names) -> str | None:
    """Fold `node`: "" where that was done, None where there is no linear operator beside it, else the reason."""
    sides = [constant(v) for v in node.inputs]
    if len(sides) != 2 or (sides[0] is None) == (sides[1] is None):
        return None
    which = 0 if sides[0] is not None else 1
    source, operand = node.inputs[1 - which], node.inputs[which]
    factor = float64(operand)
    if source is None or factor is None:
        return None
    producer = _linear_before(source)
    use = sole_use(node.outputs[0])
    follower = use.node if use and use.idx == 0 and is_onnx(use.node, *LINEAR_OPS) else None
    if producer is None and follower is None:
        return None
    pattern = fused_pattern(node)
    if pattern is not None:
        return f"part of a {pattern} that runtimes fuse"
    affine = arithmetic_affine(node, factor, constant_first=which == 0)
    if isinstance(affine, str):
        return affine
    reasons = []
    if producer is not None:
        reason = _into_producer(node, source, producer, affine, opset, names)
        if reason is None:
            return ""
        if reason == "is the bias":
            return None
        reasons.append(f"before it: {reason}")
    if follower is not None:
        reason = _into_consumer(node, source, follower, affine, opset, names)
        if reason is None:
            return ""
        reasons.append(f"after it: {reason}")
    return "; ".join(reasons)


def _linear_before(source: ir.Value) -> ir.Node | None:
    producer = source.producer()
    if producer is not None and is_onnx(producer, "Add"):
        # The bias of a MatMul is an Add of its own.
        above = (v.producer() for v in producer.inputs if v is not None)
        return next((p for p in above if p is not None and is_onnx(p, "MatMul")), None)
    if producer is None or not is_onnx(producer, *LINEAR_OPS):
        return None
    # A product of two activations (attention) has no weight and is no near miss.
    return None if is_onnx(producer, "MatMul") and all(constant(v) is None for v in producer.inputs) else producer


def _into_producer(
    node: ir.Node, source: ir.Value, producer: ir.Node, affine: tuple[Float64, Float64], opset: int, names: Names
) -> str | None:
    linear = linear_view(producer, opset=opset)
    if isinstance(linear, str):
        return linear
    if linear.add is node:
        return "is the bias"
    if linear.output is not source:
        return f"{label(producer)} reaches it through an Add that is not a constant bias"
    if producer.graph is not node.graph:
        return f"{label(producer)} is outside this body"
    if not sole_use(source):
        return "the tensor between is read by others or given out"
    rank = _rank(linear, source)
    if rank is None:
        return "the rank of the MatMul's tensor is unknown"
    scale, shift = (per_channel(a, rank, linear.channel_axis(rank), linear.outputs) for a in affine)
    if scale is None or shift is None:
        return f"its constant of shape {affine[0].shape} is not one number per output channel ({linear.outputs})"
    reason = cannot_replace(node.outputs[0], source) or grows([(linear, shift)], node)
    reason = reason or linear.fold_after(scale, shift, names, [label(node)])
    if reason:
        return reason
    new = next(v for v in node.inputs if constant(v) is None)
    assert new is not None
    return bypass(node, new)


def _into_consumer(
    node: ir.Node, source: ir.Value, follower: ir.Node, affine: tuple[Float64, Float64], opset: int, names: Names
) -> str | None:
    linear = linear_view(follower, opset=opset)
    if isinstance(linear, str):
        return linear
    if follower.graph is not node.graph:
        return f"the {follower.op_type} that reads it is inside a body"
    if source.shape is None:
        return "the shape of what it reads is unknown"
    rank = len(source.shape)
    axis = linear.channel_axis(rank)
    if axis >= rank or source.shape[axis] != linear.inputs:
        return f"what it reads is not known to have {linear.inputs} channels, so its constant may broadcast it"
    scale, shift = (per_channel(a, rank, axis, linear.inputs) for a in affine)
    if scale is None or shift is None:
        return f"its constant of shape {affine[0].shape} is not one number per input channel ({linear.inputs})"
    reason = grows([(linear, shift)], node)
    return reason or linear.fold_before(scale, shift, names, [label(node)]) or bypass(node, source)


def _rank(linear: Linear, value: ir.Value) -> int | None:
    if is_onnx(linear.node, "MatMul"):
        return None if value.shape is None else len(value.shape)
    tensor = constant(linear.node.inputs[1])
    return None if tensor is None else len(tensor.shape)
