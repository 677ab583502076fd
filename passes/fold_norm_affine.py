"""fold-norm-affine: the scale and shift of a normalisation go into the linear layers that read it, all of them.

    W (g n(x) + b) + c = (W diag(g)) n(x) + (c + W b)

LayerNormalization and RMSNormalization keep an input for the scale, which holds ones afterwards: no operator is saved.
Written out as arithmetic, Mul and Add vanish, but then ONNX Runtime no longer finds the normalisation. So `fold` leaves
both alone; this pass is for what comes after: rotations of the stream, center-norms, formats with shared scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import ModelError
from graphopt.rewriting.constants import Float64, constant, float64
from graphopt.rewriting.edit import drop_if_unused, new_initializer
from graphopt.rewriting.linear import LINEAR_OPS, Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import begun, finish

_CONTRIB = "SimplifiedLayerNormalization"


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold scale and bias of LayerNormalization and RMSNormalization into the MatMul and Gemm that read them.

    Algebra: W (g n(x) + b) + c = (W diag(g)) n(x) + (c + W b), in float64, rounded once. The scale holds ones then, and
    the bias is left out.

    Not part of `fold`: the operator keeps its scale, so nothing is faster. Does not fire: where one reader is no linear
    layer with a weight of its own, where the scale runs along more axes than the last, where a product without a bias
    would need one (an operator more), where all scales are one and all shifts zero.
    Preserves: names of nodes and weights; the scale gets a name of its own.
    Source: Ashkboos et al. 2024 (SliceGPT, arXiv:2401.15024), section 3.
    """

    name: ClassVar[str] = "fold-norm-affine"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold the affine part of every normalisation of `model`."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model)
        count = 0
        for graph, opset in scopes(model):
            for node in graph:
                if not is_onnx(node, "LayerNormalization", "RMSNormalization", _CONTRIB):
                    continue
                reason = _fold(node, graph, opset, names)
                if reason:
                    result.skipped.append(Skip(label(node), reason))
                else:
                    count += 1
        if count:
            finish(model, result, f"scale and shift of {count} normalisations folded into the layers behind them")
        return result


def _fold(node: ir.Node, graph: ir.Graph, opset: int, names: Names) -> str | None:
    scale = float64(node.inputs[1]) if len(node.inputs) > 1 else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    shift = float64(bias) if bias is not None else np.zeros(1)
    if scale is None or shift is None:
        return "its scale or bias is not a floating-point constant"
    if scale.ndim > 1 or shift.ndim > 1:
        return "its scale runs along several axes"
    if (scale == 1).all() and not shift.any():
        return "its scale is one already"
    readers = _readers(node, scale, shift, opset)
    if isinstance(readers, str):
        return readers
    for linear in readers:
        if reason := linear.fold_before(scale, shift, names, [label(node)]):
            raise ModelError(reason, where=label(linear.node), hint="report this: before_blocked allowed it")
    old = node.inputs[1]
    tensor = constant(old)
    assert old is not None and tensor is not None  # float64 read it
    ones = new_initializer(graph, names.fresh(f"{old.name}_ones"), np.ones(scale.shape), tensor.dtype)
    mark_origin(ones, [str(old.name)])
    node.replace_input_with(1, ones)
    drop_if_unused(old)
    if bias is not None:
        node.replace_input_with(2, None)
        node.resize_inputs(2)
        drop_if_unused(bias)
    return None


def _readers(node: ir.Node, scale: Float64, shift: Float64, opset: int) -> list[Linear] | str:
    """The linear layers that read a normalisation, where all its readers are some that take scale and shift."""
    value = node.outputs[0]
    if value.is_graph_output() or not value.uses():
        return "its result is given out"
    found = []
    for use in value.uses():
        if use.idx != 0 or not is_onnx(use.node, *LINEAR_OPS) or use.node.graph is not node.graph:
            return f"{use.node.op_type} reads it, and is no linear layer beside it"
        linear = linear_view(use.node, opset=opset)
        if isinstance(linear, str):
            return f"{label(use.node)} reads it: {linear}"
        if not is_onnx(use.node, "MatMul", "Gemm") or scale.size not in (1, linear.inputs):
            return f"{label(use.node)} reads it along another axis"
        if shift.any() and is_onnx(use.node, "MatMul") and linear.add is None:
            return f"{label(use.node)} would need an Add for a bias"
        if reason := linear.before_blocked(scale, shift):
            return f"{label(use.node)} reads it: {reason}"
        found.append(linear)
    return found
