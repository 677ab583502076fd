"""compute-weights: a weight that is computed from constants becomes a constant.

    g v / ||v||                 weight normalisation
    W / (u^T W v)               spectral normalisation, its vectors at rest
    (W - mean W) / deviation    standardised weights

in float64, rounded once, and at any size: each is as large as what it is computed from. Constant folding does the same
for other constants in the model's own type and below its `max_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import new_initializer, remove_unread, replace_value
from graphopt.rewriting.linear import LINEAR_OPS
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.row_blocks import finite_in
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.size import initializer_bytes, node_bytes
from graphopt.rewriting.weight_formulas import computed, formula_nodes
from graphopt.rewriting.weight_pass import begun, finish


@dataclass(frozen=True)
class ComputeWeights(Pass):
    """Compute weights that the model derives from constants: weight norm, spectral norm, standardised weights.

    Algebra: what the operators say, in float64, rounded once to the weight's type.

    Does not fire: where the result takes more room than what it replaces (its source is read by others too), where it
    is not finite, on formulas with operators other than arithmetic, reductions, products and reshapes (constant folding
    takes those). Preserves: the function; every reader of the computed weight reads the one constant.
    Source: Salimans & Kingma 2016 (arXiv:1602.07868), Miyato et al. 2018 (arXiv:1802.05957), for what is computed.
    """

    name: ClassVar[str] = "compute-weights"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Compute the weights of all linear operators."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model, later=True)
        count = 0
        for graph, opset in scopes(model):
            for node in tuple(graph):
                weight = node.inputs[1] if is_onnx(node, *LINEAR_OPS) and len(node.inputs) > 1 else None
                if weight is None or constant(weight) is not None:
                    continue
                nodes = formula_nodes(weight)
                if nodes is None:
                    continue
                reason = _compute(weight, nodes, opset, names)
                if reason:
                    result.skipped.append(Skip(label(node), f"its weight stays computed: {reason}"))
                else:
                    count += 1
        if count:
            finish(model, result, f"{count} weights computed ahead")
        return result


def _compute(weight: ir.Value, nodes: list[ir.Node], opset: int, names: Names) -> str | None:
    dtype, graph = weight.dtype or _dtype(nodes), nodes[-1].graph
    if dtype is None or not dtype.is_floating_point() or not isinstance(graph, ir.Graph):
        return "its type is not known"
    if weight.is_graph_output():
        return "it is a graph output"
    data = computed(nodes, opset)
    if data is None:
        return "an operand of its formula is not what the operator asks for"
    if not finite_in(data, dtype.numpy()):
        return "it would not be finite"
    growth = data.size * dtype.itemsize - _freed(weight, nodes)
    if growth > 0:
        return f"it takes {growth:.0f} bytes more than what only it is computed from"
    value = new_initializer(graph, names.fresh(str(weight.name)), data, dtype)
    mark_origin(value, [label(node) for node in nodes])
    replace_value(weight, value)
    remove_unread(nodes[-1])
    return None


def _dtype(nodes: list[ir.Node]) -> ir.DataType | None:
    """Type of the constants that a formula begins with, where shapes and types were not inferred (functions)."""
    tensors = [constant(v) for node in nodes for v in node.inputs]
    found = {t.dtype for t in tensors if t is not None and t.dtype.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _freed(weight: ir.Value, nodes: list[ir.Node]) -> int:
    """Bytes of the nodes and constants that nothing reads once `weight` is a constant."""
    dead: set[ir.Node] = set()
    for node in reversed(nodes):
        if node.outputs[0] is weight or all(use.node in dead for use in node.outputs[0].uses()):
            dead.add(node)
    constants = dict.fromkeys(v for node in dead for v in node.inputs if v is not None and constant(v) is not None)
    unread = [v for v in constants if not v.is_graph_output() and all(use.node in dead for use in v.uses())]
    freed = sum(node_bytes(node) for node in dead)
    for value in unread:
        tensor = constant(value)
        freed += initializer_bytes(value) if value.is_initializer() else (tensor.nbytes if tensor is not None else 0)
    return freed
