"""merge-linear: two linear operators with nothing between them become one.

    W2 (W1 x + b1) + b2 = (W2 W1) x + (b2 + W2 b1)

for MatMul and Gemm, and for convolutions of which one has a 1x1 kernel: before a larger kernel (whose zero padding must
not meet b1), or after it. With channels i -> m -> o the pair holds i m + m o numbers and the product i o: it is taken
where that is no more, so that factorisations of low rank stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.rewriting.constants import Float64, constant
from graphopt.rewriting.edit import cannot_replace, remove_node, replace_value, sole_use
from graphopt.rewriting.linear import LINEAR_OPS, Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.products import composable, composed, composed_size, keeps_second
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import begun, finish
from graphopt.rewriting.windows import Windows, store_windows, windows
from graphopt.sparsity.marks import declared_pattern, role_of


@dataclass(frozen=True)
class MergeLinear(Pass):
    """Multiply two linear operators that follow each other into one, where that takes no more work and no more bytes.

    Algebra: W2 (W1 x + b1) + b2 = (W2 W1) x + (b2 + W2 b1), in float64, rounded once to the weight's dtype.

    Does not fire: where the product has more numbers than the two factors (low rank), where the tensor between is read
    by others or given out, where a weight that must change is shared, where a bias would meet the zero padding of the
    second convolution, where both kernels are larger than one position, on factorised and sparse layers (`armor`,
    `sparsify`: merging fills the zeros). Preserves: the name of the weight that stays.
    Source: associativity; Ding et al. 2021 (arXiv:2103.13425) for the convolutions.
    """

    name: ClassVar[str] = "merge-linear"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge chains link by link, from the inputs on."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model, later=True)
        count = 0
        for graph, opset in scopes(model):
            for node in tuple(graph):
                while (outcome := _merge(node, graph, opset, names)) == "":
                    count += 1
                if outcome is not None:
                    result.skipped.append(Skip(label(node), outcome))
        if count:
            finish(model, result, f"{count} pairs of linear operators multiplied into one")
        return result


def _merge(node: ir.Node, graph: ir.Graph, opset: int, names: Names) -> str | None:
    """Merge `node` with the linear operator behind it: "" where that was done, None where there is none."""
    if node.graph is not graph or not is_onnx(node, *LINEAR_OPS):
        return None
    first = linear_view(node, opset=opset, shared=True)
    if isinstance(first, str):
        return None
    use = sole_use(first.output)
    if use is None or use.idx != 0 or not is_onnx(use.node, *LINEAR_OPS) or constant(use.node.inputs[1]) is None:
        return None
    if use.node.graph is not graph:
        return "what reads it is inside a body"
    if any(role_of(n) is not None or declared_pattern(n) is not None for n in (node, use.node)):
        return "it belongs to a factorised or sparse layer (fold{merge_factors=true} multiplies those out)"
    second = linear_view(use.node, opset=opset)
    if isinstance(second, str):
        return f"{label(use.node)} reads it: {second}"
    reason = composable(first, second) or _too_large(first, second)
    if reason:
        return reason
    origin = [label(n) for n in (node, first.add, second.node, second.add) if n is not None]
    weight, bias = composed(first, second)
    if keeps_second(first, second):
        return _into_second(first, second, weight, bias, names, origin)
    return _into_first(first, second, weight, bias, names, origin)


def _too_large(first: Linear, second: Linear) -> str | None:
    """Why one operator would be more than two: in numbers of its weight, which for these maps decide the work too."""
    freed = second.weight_size + (first.weight_size if sole_use(_weight(first)) else 0)
    size = composed_size(first, second)
    if size <= freed:
        return None
    return f"as one it would have {size} numbers, more than the {freed} that would go (low rank stays)"


def _weight(linear: Linear) -> ir.Value:
    value = linear.node.inputs[1]
    assert value is not None  # linear_view checked it
    return value


def _into_second(
    first: Linear, second: Linear, weight: Float64, bias: Float64, names: Names, origin: list[str]
) -> str | None:
    reason = second.replace(weight, bias, names, origin)
    if reason:
        return reason
    second.node.replace_input_with(0, first.input)
    _remove(first)
    return ""


def _into_first(
    first: Linear, second: Linear, weight: Float64, bias: Float64, names: Names, origin: list[str]
) -> str | None:
    if not sole_use(_weight(first)):
        return "the weight of the first is shared, and would have to be duplicated"
    reason = cannot_replace(second.output, first.output) or first.replace(weight, bias, names, origin)
    if reason:
        return reason
    if is_onnx(first.node, "Conv"):
        inner, outer = windows(first.node, first.kernel), windows(second.node, second.kernel)
        assert isinstance(inner, Windows) and isinstance(outer, Windows)  # composable checked it
        strides = tuple(a * b for a, b in zip(inner.strides, outer.strides, strict=True))
        if strides != inner.strides:
            store_windows(first.node, replace(inner, strides=strides))
    # Gemm and convolutions that got a bias now keep their output; the shapes are those behind the second.
    for value in {first.node.outputs[0], first.output}:
        value.shape = second.output.shape
    replace_value(second.output, first.output)
    _remove(second)
    return ""


def _remove(linear: Linear) -> None:
    if linear.add is not None:
        remove_node(linear.add)
    remove_node(linear.node)
