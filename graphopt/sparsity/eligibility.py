"""Which layers of a model a target's kernels that skip 2:4 zeros may execute, told without the target at hand.

Every rule is data of the target (`graphopt.target.SparseKernels`, `QuantScheme`), with its source. A runtime that times
its kernels decides by time, so three verdicts are possible:

    may        nothing that is known keeps sparse kernels from being chosen
    unlikely   they are legal, and seen to be slower than dense ones
    not        they are not legal, or the weight is not 2:4

Found by looking: weights in float, in integers behind a DequantizeLinear, or in float behind Q and DQ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.found import fullest_groups
from graphopt.sparsity.marks import role_of
from graphopt.sparsity.shapes import Objection, Shape, not_taken, too_small
from graphopt.sparsity.verdicts import Eligibility, LayerVerdict
from graphopt.sparsity.weights import Weight, WrittenAs, multiplies_activations, weight_of, written_as

if TYPE_CHECKING:
    from graphopt.target import Target

GROUP, KEPT = 4, 2


def eligibility(model: ir.Model, target: Target) -> Eligibility:
    """Judge every linear node of a model, bodies included.

    Args:
        model: any model; not changed.
        target: whose kernels.
    """
    if not target.sparsity_2_4:
        return Eligibility(target.name, kernels=False)
    rows = [_judge(node, target, inside=graph is not model.graph) for graph, node in _layers(model)]
    own = [row for row in rows if row.role not in ("in", "out")]
    return Eligibility(target.name, True, target.sparse.note, len(own), sum(row.parameters for row in own), rows)


def _layers(model: ir.Model) -> Iterator[tuple[ir.Graph, ir.Node]]:
    """Linear nodes; products of two activations, which have no weight to be sparse, are none."""
    for graph in graphs(model):
        for node in graph:
            if is_onnx(node, "Conv", "ConvTranspose", "Gemm", "MatMul") and not multiplies_activations(node):
                yield graph, node


def _judge(node: ir.Node, target: Target, *, inside: bool) -> LayerVerdict:
    row = LayerVerdict(label(node), node.op_type, "not", role=role_of(node) or "")
    if row.role in ("in", "out"):
        return _objected(row, Objection("wrapper", "the wrapper of a sparse core, dense by intent"), target)
    found = weight_of(node)
    if isinstance(found, Objection):
        return _objected(row, found, target)
    shape = found.shape
    row.weight, row.parameters, row.groups = found.name, int(found.rows.size), shape.groups
    row.inputs, row.outputs = shape.inputs, shape.outputs
    row.sparse = _is_sparse(found)
    written = written_as(node, found, target)
    row.type = written.type
    against = _against(row, found, written, target)
    if against is not None:
        return _objected(row, against, target)
    row.verdict = "unlikely"
    against = _slower(node, shape, written, target, inside)
    if against is not None:
        return _objected(row, against, target)
    row.verdict = "may"
    return row


def _objected(row: LayerVerdict, found: Objection, target: Target) -> LayerVerdict:
    row.rule, row.reason = found.rule, found.reason
    row.source = target.sparse.sources.get(found.rule, "")
    return row


def _against(row: LayerVerdict, weight: Weight, written: WrittenAs, target: Target) -> Objection | None:
    """Why sparse kernels are not legal, what the user can change least about first."""
    found = not_taken(weight.shape, target.sparse) or written.objection
    if found is not None:
        return found
    if written.type not in target.sparse.types:
        taken = ", ".join(target.sparse.types)
        return Objection("type", f"it multiplies in {written.type}, and the kernels that skip zeros take {taken}")
    return None if row.sparse else _dense(weight)


def _slower(node: ir.Node, shape: Shape, written: WrittenAs, target: Target, inside: bool) -> Objection | None:
    """Why legal sparse kernels are not likely to be chosen."""
    found = too_small(shape, target.sparse)
    if found is not None:
        return found
    if inside:
        return Objection("body", "it stands in the body of an If, Loop or Scan, where no sparse kernel was seen")
    if written.turned:
        return Objection("dequantised", "a Transpose stands between its DequantizeLinear and the product")
    wants_int8 = target.quant is not None and target.quant.sparse_outputs and written.type == "int8"
    if wants_int8 and not _written_in_int8(node):
        return Objection("output", "its output leaves in float, where the dense kernel was seen to win")
    return None


def _is_sparse(weight: Weight) -> bool:
    most = fullest_groups(weight.rows, [GROUP], weight.zero)
    return most.get(GROUP, GROUP) <= KEPT


def _dense(weight: Weight) -> Objection:
    if weight.shape.inputs < GROUP:
        return Objection("pattern", f"{weight.shape.inputs} input channels are fewer than a group of {GROUP}")
    across = np.swapaxes(weight.rows, 0, -1)
    if fullest_groups(across, [GROUP], weight.zero).get(GROUP, GROUP) <= KEPT:
        return Objection("pattern", "it is 2:4 along its output channels; the kernels want it along the input channels")
    return Objection("pattern", "dense: more than 2 nonzeros in groups of 4 input channels")


EPILOGUE = ("Add", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Mul")
"""What a product takes up behind it before it writes its output."""


def _written_in_int8(node: ir.Node) -> bool:
    """Whether every reader of a product's output, past what is fused into it, is a QuantizeLinear."""
    value, seen = node.outputs[0], 0
    while not value.is_graph_output() and seen < GROUP:
        readers = [use.node for use in value.uses()]
        if readers and all(is_onnx(reader, "QuantizeLinear") for reader in readers):
            return True
        if len(set(readers)) != 1 or not is_onnx(readers[0], *EPILOGUE):
            return False
        value, seen = readers[0].outputs[0], seen + 1
    return False
