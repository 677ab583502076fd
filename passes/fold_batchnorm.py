"""fold-batchnorm: BatchNormalization into the linear operator before it, or into those after it.

In inference BatchNormalization is one affine map per channel (axis 1):

    y = a x + c      a = scale / sqrt(var + epsilon)      c = bias - a mean

After a linear operator, a (W x + b) + c = (a W) x + (a b + c). Before one, W (a x + c) + b = (W a) x + (b + W c), which
holds with zero padding only where c = 0. `graphopt.rewriting.linear` does both and knows the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import ModelError
from graphopt.rewriting.affine import inference_affine
from graphopt.rewriting.constants import Float64, allow_private_initializers, freeze_note, freeze_overridable
from graphopt.rewriting.edit import bypass, cannot_replace, sole_use
from graphopt.rewriting.linear import LINEAR_OPS, Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import scopes, settle_functions


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul (+ Add) around it.

    Algebra: y = a x + c with a = scale / sqrt(var + epsilon), c = bias - a mean. After a linear operator W' = a W,
    b' = a b + c; before one W' = W a, b' = b + W c. In float64, rounded once to the weight's dtype.

    Does not fire: in training mode (before opset 14 the listed running statistics mean it), with statistics per pixel
    (`spatial=0`), where a parameter is not constant, where the weight is shared, where the tensor between is read by
    others or given out, before a zero-padded or transposed convolution unless c = 0, where the result overflows or
    becomes subnormal. Preserves: names of nodes and parameters; a convolution without bias gets one.
    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2, and the identities above.
    """

    name: ClassVar[str] = "fold-batchnorm"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold every BatchNormalization of `model` that can be folded exactly."""
        result = PassResult(changed=False)
        norms = [(n, opset) for graph, opset in scopes(model) for n in graph if is_onnx(n, "BatchNormalization")]
        if not norms:
            return result
        if not self.keep_overridable and (frozen := freeze_overridable(model)):
            result.changed = True
            result.notes.append(freeze_note(frozen))
        names = Names(model, later=True)
        counts = {"the linear operator before it": 0, "those after it": 0}
        for node, opset in norms:
            reason = self._fold(node, opset, names, counts)
            if reason:
                result.skipped.append(Skip(label(node), reason))
        for where, count in counts.items():
            if count:
                result.notes.append(f"{count} BatchNormalization folded into {where}")
                result.changed = True
        if any(counts.values()):
            settle_functions(model)
        if any(counts.values()) and (note := allow_private_initializers(model)):
            result.notes.append(note)
        return result

    @staticmethod
    def _fold(node: ir.Node, opset: int, names: Names, counts: dict[str, int]) -> str | None:
        affine = inference_affine(node, opset)
        if isinstance(affine, str):
            return affine
        scale, shift = affine
        after = _into_producer(node, scale, shift, opset, names)
        if after is None:
            counts["the linear operator before it"] += 1
            return None
        before = _into_consumers(node, scale, shift, opset, names)
        if before is None:
            counts["those after it"] += 1
            return None
        return f"before it: {after}; after it: {before}"


def _channels_on_axis_1(linear: Linear, value: ir.Value) -> str | None:
    if not is_onnx(linear.node, "MatMul"):
        return None
    if value.shape is None:
        return "the rank of the MatMul's tensor is unknown"
    rank = len(value.shape)
    return None if rank == 2 else f"MatMul's channels are on axis {rank - 1} of {rank}, BatchNormalization's on axis 1"


def _into_producer(node: ir.Node, scale: Float64, shift: Float64, opset: int, names: Names) -> str | None:
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if source is None or producer is None:
        return "its input is a graph input or a constant"
    # The bias of a MatMul is an Add of its own.
    if is_onnx(producer, "Add"):
        products = [v.producer() for v in producer.inputs if v is not None]
        producer = next((p for p in products if p is not None and is_onnx(p, "MatMul")), producer)
    linear = linear_view(producer, opset=opset)
    if isinstance(linear, str):
        return linear
    if linear.output is not source:
        return f"{producer.op_type} reaches it through an Add that is not a constant bias"
    if producer.graph is not node.graph:
        return f"{label(producer)} is outside this body"
    if not sole_use(source):
        return "the tensor between is read by others or given out"
    if linear.outputs != scale.size:
        return f"{linear.outputs} channels, but {scale.size} numbers per parameter"
    reason = _channels_on_axis_1(linear, source) or cannot_replace(node.outputs[0], source)
    reason = reason or linear.fold_after(scale, shift, names, [label(node)])
    if reason:
        return reason
    # A MatMul may have got an Add behind it, and then that is what the normalisation read.
    new = node.inputs[0]
    assert new is not None
    return bypass(node, new)


def _into_consumers(node: ir.Node, scale: Float64, shift: Float64, opset: int, names: Names) -> str | None:
    value = node.outputs[0]
    source = node.inputs[0]
    if value.is_graph_output():
        return "its result is given out"
    if source is None or not value.uses():
        return "nothing reads it"
    views: list[Linear] = []
    for use in value.uses():
        if not is_onnx(use.node, *LINEAR_OPS) or use.idx != 0:
            return f"{use.node.op_type} reads it and is not a linear operator on it"
        if use.node.graph is not node.graph:
            return f"the {use.node.op_type} that reads it is inside a body"
        linear = linear_view(use.node, opset=opset)
        if isinstance(linear, str):
            return f"{use.node.op_type} reads it: {linear}"
        if linear.inputs != scale.size:
            return f"{use.node.op_type} reads it and has {linear.inputs} input channels, not {scale.size}"
        reason = _channels_on_axis_1(linear, value) or linear.before_blocked(scale, shift)
        if reason:
            return f"{use.node.op_type} reads it: {reason}"
        views.append(linear)
    # All or none: a normalisation that stays for one reader is not saved by folding it into another.
    for linear in views:
        reason = linear.fold_before(scale, shift, names, [label(node)])
        if reason:
            raise ModelError(reason, where=label(linear.node), hint="report this: before_blocked allowed it")
    return bypass(node, source)
