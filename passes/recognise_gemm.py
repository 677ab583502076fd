"""recognise-gemm: a product of matrices and the bias behind it are one Gemm.

    MatMul(A, W) + b = Gemm(A, W, b)                         A and W matrices, b one number per column
    Gemm(A, W) + b = Gemm(A, W, b)
    Reshape(MatMul(Reshape(A), W) + b) = Reshape(Gemm(Reshape(A), W, b))      A a stack: its rows under each other

Runtimes do the same where they can (ONNX Runtime: MatMulAddFusion), so that the kernel is the one that ran before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.files.reshape_targets import result_dims
from graphopt.rewriting.constants import constant
from graphopt.rewriting.cuts import made_by, set_inputs, sizes
from graphopt.rewriting.edit import cannot_replace, remove_node, replace_value, sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.layout import RESHAPES, Dims, target_of
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.sparsity.marks import is_wrapper, role_of

_FIRST_WITH_BROADCAST = 7
_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types for which every runtime has both products."""


@dataclass(frozen=True)
class RecogniseGemm(Pass):
    """Write a product of matrices and its bias as one Gemm, and that of a stack of them where reshapes stand around it.

    Algebra: see the head of the file. Does not fire: where something else reads the product, where the rank of an
    operand is unknown, where the bias is computed or varies from row to row, on a stack without a Reshape before and
    behind it (two more would be needed), on quantised operands and parts of sparse layers, on types without Gemm.
    Preserves: the name of the result; equal up to rounding.
    """

    name: ClassVar[str] = "recognise-gemm"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge every product with the bias behind it."""
        result = PassResult(changed=False)
        editor = Editor(model)
        count = 0
        for add, opset in editor.nodes():
            if not is_onnx(add, "Add") or opset < _FIRST_WITH_BROADCAST:
                continue
            found = _product(add)
            if found is None:
                continue
            product, bias = found
            reason = _merge(product, bias, add, editor)
            if reason is None:
                count += 1
            elif reason:
                result.skipped.append(Skip(label(add), reason))
        editor.close()
        if count:
            result.changed = True
            result.notes.append(f"{count} products and their biases became Gemm")
        return result


def _product(add: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The MatMul or Gemm without a bias that `add` reads, and the constant beside it."""
    for place, other in enumerate(reversed(add.inputs)):
        node = made_by(add.inputs[place], add, "MatMul", "Gemm")
        if node is None or other is None or constant(other) is None:
            continue
        if not (is_onnx(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None):
            return node, other
    return None


def _merge(product: ir.Node, bias: ir.Value, add: ir.Node, editor: Editor) -> str | None:
    """Merge the two; otherwise why not, "" where that is no news."""
    left, weight = product.inputs[0], product.inputs[1]
    if left is None or weight is None or left.dtype not in _TYPES:
        return "there is no Gemm of this type"
    if role_of(product) or role_of(add) or any(made_by(v, product, "DequantizeLinear") for v in (left, weight)):
        return "the product belongs to a quantised or sparse layer"
    if sole_use(product.outputs[0]) is None:
        return "the product is also read elsewhere"
    rows, matrix = sizes(left), sizes(weight)
    if rows is None or matrix is None:
        return "the rank of an operand is unknown"
    if len(matrix) != 2 or len(rows) < 2:
        return ""
    columns = matrix[0 if product.attributes.get_int("transB", 0) else 1]
    if not _fits(bias, columns):
        return "the bias is not one number per column of the product"
    reason = cannot_replace(add.outputs[0], product.outputs[0])
    if reason is not None:
        return reason
    if len(rows) > 2 and not _flatten(product, add, rows, matrix, editor):
        return ""
    _take_bias(product, bias, add)
    return None


def _fits(bias: ir.Value, columns: int | str | None) -> bool:
    tensor = constant(bias)
    assert tensor is not None  # _product looked
    shape = [int(d) for d in tensor.shape.numpy()]
    return len(shape) <= 2 and (math.prod(shape) == 1 or (math.prod(shape) == columns == shape[-1]))


def _flatten(product: ir.Node, add: ir.Node, rows: Dims, matrix: Dims, editor: Editor) -> bool:
    """Let the Reshape before a stack put its rows under each other, and the one behind `add` take them apart."""
    before = made_by(product.inputs[0], product, *RESHAPES)
    use = sole_use(add.outputs[0])
    behind = use.node if use is not None and use.idx == 0 and is_onnx(use.node, *RESHAPES) else None
    if before is None or behind is None or behind.graph is not add.graph or is_wrapper(before) or is_wrapper(behind):
        return False
    if sole_use(before.outputs[0]) is None or any(a.is_ref() for a in behind.attributes.values()):
        return False
    source, wanted = sizes(before.inputs[0]), sizes(behind.outputs[0]) or _told(behind)
    if source is None or wanted is None or not isinstance(matrix[0], int):
        return False
    count = _count(rows[:-1])
    first, last = target_of(source, [count, matrix[0]]), target_of([count, matrix[1]], wanted)
    if first is None or last is None:
        return False
    for node, target, dims in ((before, first, [count, matrix[0]]), (behind, last, list(wanted))):
        node.op_type = "Reshape"
        node.attributes.clear()
        name = f"{node.outputs[0].name}_shape"
        set_inputs(node, [node.inputs[0], editor.sizes(node, name, target)])
        if not node.outputs[0].is_graph_output():
            node.outputs[0].shape = ir.Shape(dims)
    product.outputs[0].shape = ir.Shape([count, matrix[1]])
    return True


def _told(node: ir.Node) -> Dims | None:
    """The shape of a graph output, whose declared shape proves nothing."""
    told = result_dims(node) if is_onnx(node, "Reshape") else None
    return None if told is None else [d if isinstance(d, int | str) else None for d in told]


def _count(dims: Dims) -> int | None:
    """How many rows a stack has; None where a size of it has no number."""
    known = [d for d in dims if isinstance(d, int)]
    return math.prod(known) if len(known) == len(dims) else None


def _take_bias(product: ir.Node, bias: ir.Value, add: ir.Node) -> None:
    name = label(add)
    product.op_type = "Gemm"
    product.resize_inputs(3)
    product.replace_input_with(2, bias)
    product.attributes.pop("beta", None)
    result = product.outputs[0]
    shape = result.shape
    replace_value(add.outputs[0], result)
    if shape is not None and not result.is_graph_output():
        result.shape = shape
    mark_origin(product, [name])
    remove_node(add)
