"""The weight of a linear node as a runtime's compiler sees it: through DequantizeLinear, QuantizeLinear, Transpose.

Integers behind a DequantizeLinear, or floats behind QuantizeLinear and DequantizeLinear, which the runtime quantises
itself, with Transposes between that a compiler folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx
from graphopt.sparsity.shapes import Objection, Shape

if TYPE_CHECKING:
    from graphopt.target import Target


@dataclass(frozen=True)
class Weight:
    """The constant weight of a linear node.

    Attributes:
        name: of the stored tensor.
        rows: (outputs, ..., input channels of a group) as stored: floats, or integers.
        zero: the number that stands for zero.
        shape: of the layer.
        dtype: as stored.
        dequantise: the DequantizeLinear behind it; None for a weight in float.
        quantise: the QuantizeLinear in front of `dequantise`.
        turned: a Transpose stands behind `dequantise`.
        channel_axis: of the tensor that `dequantise` gives: its output channels.
    """

    name: str
    rows: npt.NDArray[Any]
    zero: int
    shape: Shape
    dtype: ir.DataType
    dequantise: ir.Node | None
    quantise: ir.Node | None
    turned: bool
    channel_axis: int


@dataclass(frozen=True)
class WrittenAs:
    """How a layer's operands are written.

    Attributes:
        type: in which a target multiplies them.
        objection: what is wrong with their quantisation; None where nothing is.
        turned: a Transpose stands between weight and product, behind the DequantizeLinear.
    """

    type: str
    objection: Objection | None = None
    turned: bool = False


def weight_of(node: ir.Node) -> Weight | Objection:
    """The weight of a Conv, ConvTranspose, Gemm or MatMul, or why no sparse kernel can hold it."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    turns, dequantise, quantise = 0, None, None
    while value is not None and constant(value) is None:
        before = value.producer()
        if before is None or not before.inputs:
            break
        if is_onnx(before, "Transpose") and _swaps(before):
            turns += 1
        elif is_onnx(before, "DequantizeLinear") and dequantise is None:
            dequantise, after = before, turns
        elif is_onnx(before, "QuantizeLinear") and dequantise is not None and quantise is None:
            quantise = before
        elif not is_onnx(before, "Identity"):
            break
        value = before.inputs[0]
    tensor = constant(value)
    if value is None or tensor is None:
        return _no_weight(node, value)
    if tensor.dtype == ir.DataType.STRING:
        return Objection("type", "its weight holds strings")
    array = np.asarray(tensor.numpy())
    array = array.T if turns % 2 else array
    convolution = is_onnx(node, "Conv", "ConvTranspose")
    if array.ndim < 3 if convolution else array.ndim != 2:
        dims = "x".join(map(str, array.shape)) or "a number"
        return Objection("batched", f"its weight is {dims}: the product is batched, and its weight no matrix")
    rows, outputs_axis = _along_inputs(node, array)
    turned = dequantise is not None and bool(after % 2)
    zero = _zero(dequantise) if quantise is None else 0
    groups = max(1, node.attributes.get_int("group", 1)) if convolution else 1
    outputs = int(rows.shape[0])
    shape = Shape(
        int(rows.shape[-1]),
        outputs if is_onnx(node, "ConvTranspose") else outputs // groups,
        int(np.prod(array.shape[2:])) if convolution else 1,
        groups,
        convolution=convolution and max(array.shape[2:]) > 1,  # 1x1 is a product of matrices
        transposed=is_onnx(node, "ConvTranspose"),
    )
    return Weight(
        str(value.name), rows, zero, shape, tensor.dtype, dequantise, quantise, turned,
        1 - outputs_axis if turned else outputs_axis,
    )  # fmt: skip


def written_as(node: ir.Node, weight: Weight, target: Target) -> WrittenAs:
    """In which type a target multiplies a layer, and whether its Q/DQ are of the form that takes."""
    if weight.dequantise is None:
        kind = target.dtype if target.dtype != "model" else _name(weight.dtype)
        return WrittenAs(kind if weight.dtype.is_floating_point() else _name(weight.dtype))
    kind = _name(weight.dtype) if weight.quantise is None else _quantised_type(weight.quantise)
    wrong = _badly_quantised(weight) or _badly_fed(node, kind, target.sparse.symmetric)
    return WrittenAs(kind, wrong, weight.turned)


def multiplies_activations(node: ir.Node) -> bool:
    """Whether neither operand of a MatMul or Gemm comes from constants alone."""
    return is_onnx(node, "MatMul", "Gemm") and not any(_from_constants(value) for value in node.inputs[:2])


def _from_constants(value: ir.Value | None, steps: int = 6) -> bool:
    """Whether a value is a stored tensor, or is made of such in a few steps."""
    if value is None or value.is_initializer() or constant(value) is not None:
        return True
    before = value.producer()
    if before is None or not before.inputs or not steps:
        return False
    return all(_from_constants(each, steps - 1) for each in before.inputs)


def _swaps(transpose: ir.Node) -> bool:
    perm = transpose.attributes.get_ints("perm", None)
    return perm is None or list(perm) == [1, 0]


def _no_weight(node: ir.Node, value: ir.Value | None) -> Objection:
    if is_onnx(node, "MatMul") and constant(node.inputs[0]) is not None:
        return Objection("operand", "its constant is the left operand, and kernels keep the zeros of the right one")
    if value is None:
        return Objection("constant", "it has no weight")
    if value.is_initializer():
        override = "its weight is an input of the graph as well, which a caller may override; fold makes it constant"
        return Objection("constant", override)
    producer = value.producer()
    what = "an input of the graph" if producer is None else f"computed by {producer.op_type}"
    return Objection("constant", f"its weight is {what}")


def _along_inputs(node: ir.Node, weight: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """(outputs, ..., inputs) and the axis of the weight that counts outputs."""
    if is_onnx(node, "Conv"):
        return np.moveaxis(weight, 1, -1), 0
    if is_onnx(node, "ConvTranspose"):
        return np.moveaxis(weight, (0, 1), (-1, 0)), 1
    transposed = is_onnx(node, "Gemm") and node.attributes.get_int("transB", 0) != 0
    return (weight, 0) if transposed else (weight.T, 1)


def _zero(dequantise: ir.Node | None) -> int:
    points = None if dequantise is None else _zero_points(dequantise)
    return int(points.flat[0]) if points is not None and points.size else 0


def _zero_points(node: ir.Node) -> npt.NDArray[np.int64] | None:
    """The zero points of a Q or DQ; None where it has none, which stands for 0, or they are not constant."""
    tensor = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if tensor is None else np.asarray(tensor.numpy()).astype(np.int64)


def _quantised_type(quantise: ir.Node) -> str:
    dtype = quantise.outputs[0].dtype
    point = constant(quantise.inputs[2]) if len(quantise.inputs) > 2 else None
    dtype = point.dtype if point is not None else dtype
    return "uint8" if dtype is None else _name(dtype)  # the standard's default


def _badly_quantised(weight: Weight) -> Objection | None:
    node = weight.dequantise
    assert node is not None  # `written_as` asked
    for pair in (node, weight.quantise):
        problem = None if pair is None else _off_zero(pair, "its weight")
        if problem is not None:
            return problem
    scale = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if scale is None:
        return Objection("dequantised", "the scales of its weight are computed")
    if node.attributes.get_int("block_size", 0):
        return Objection("channel-axis", "its weight has scales by blocks")
    rank = weight.rows.ndim
    axis = node.attributes.get_int("axis", 1)
    if scale.size > 1 and axis % rank != weight.channel_axis:
        return Objection("channel-axis", f"the scales of its weight run along axis {axis}, not its output channels")
    return None


def _badly_fed(node: ir.Node, kind: str, symmetric: bool) -> Objection | None:
    value = node.inputs[0]
    pair = value.producer() if value is not None else None
    if pair is None or not is_onnx(pair, "DequantizeLinear") or not pair.inputs or pair.inputs[0] is None:
        return Objection("dequantised", f"its weight is {kind}, its input in float: no product of integers")
    source = pair.inputs[0].dtype
    if symmetric and source is not None and _name(source) != kind:
        return Objection("zero-point", f"its weight is {kind} and its input {_name(source)}")
    return _off_zero(pair, "its input") if symmetric else None


def _off_zero(pair: ir.Node, what: str) -> Objection | None:
    if len(pair.inputs) > 2 and pair.inputs[2] is not None:
        points = _zero_points(pair)
        if points is None or points.any():
            return Objection("zero-point", f"{what} has a zero point other than 0")
    return None


def _name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
