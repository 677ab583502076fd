"""Operators that do the same on a permuted tensor, with their axes and constants permuted.

With t = Transpose_p(t'), axis a of t is axis p[a] of t'. A rule asks whether a node can work on t' (`permutable`), and
makes it do so (`permute`): attributes that name axes are translated, constants are stored permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.cuts import numbers, rank_of, remove_unread
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies

UNARY = frozenset(
    {
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip"),
        *("Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf"),
        *("IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink"),
        *("Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
"""Elementwise in their first operand; further operands must have one element."""
ELEMENTWISE = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean", "PRelu", "Where", "And", "Or"),
        *("Xor", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "BitwiseAnd", "BitwiseOr"),
        "BitwiseXor",
    }
)
"""Elementwise in all operands, with broadcasting."""
REDUCTIONS = frozenset(
    {
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)
_AXIS = frozenset(("Concat", "Split", "Softmax", "LogSoftmax"))
_FIRST_SOFTMAX_OF_ONE_AXIS = 13


def permutable(node: ir.Node, rank: int, opset: int) -> bool:
    """Whether `node` can work on permuted tensors of this rank, without storing a constant twice."""
    if not is_onnx(node, node.op_type) or any(True for _ in bodies(node)):
        return False
    if any(a.is_ref() for a in node.attributes.values()):
        return False
    if not is_onnx(node, *ELEMENTWISE) and rank_of(node.inputs[0] if node.inputs else None) != rank:
        return False
    rule = _RULES.get(node.op_type)
    return rule is not None and len(node.outputs) >= 1 and rule(node, rank, opset)


def moving_inputs(node: ir.Node) -> list[int]:
    """Places of the operands that are permuted with the node: tensors that are computed."""
    places = range(len(node.inputs)) if is_onnx(node, "Concat", *ELEMENTWISE) else range(min(1, len(node.inputs)))
    return [k for k in places if node.inputs[k] is not None and constant(node.inputs[k]) is None]


def permute(node: ir.Node, perm: Sequence[int], editor: Editor) -> None:
    """Let `node` work on t' instead of t = Transpose_perm(t'); its computed operands are the caller's to replace."""
    rank = len(perm)
    if is_onnx(node, "Concat", *ELEMENTWISE):
        for place, value in enumerate(node.inputs):
            data = array(value)
            if value is not None and data is not None and (data.size > 1 or is_onnx(node, "Concat")):
                full = data.reshape((1,) * (rank - data.ndim) + data.shape)
                moved = editor.constant(node, f"{value.name}_permuted", np.transpose(full, np.argsort(perm)))
                node.replace_input_with(place, moved)
                remove_unread(value)
    if "axis" in node.attributes and node.op_type in _AXIS:
        axis = node.attributes["axis"].as_int()
        node.attributes["axis"] = ir.AttrInt64("axis", perm[axis % rank])
    elif node.op_type in _AXIS:
        node.attributes["axis"] = ir.AttrInt64("axis", perm[_DEFAULT_AXIS.get(node.op_type, 0) % rank])
    if node.op_type in REDUCTIONS:
        _set_numbers(node, "axes", 1, [perm[a % rank] for a in numbers(node, "axes", 1) or ()], editor)
    if is_onnx(node, "Slice"):
        starts = numbers(node, "starts", 1) or []
        axes = numbers(node, "axes", 3) or range(len(starts))
        _set_numbers(node, "axes", 3, [perm[a % rank] for a in axes], editor)
    if is_onnx(node, "Pad"):
        pads = numbers(node, "pads", 1) or []
        shifted = [0] * (2 * rank)
        for axis in range(rank):
            shifted[perm[axis]], shifted[rank + perm[axis]] = pads[axis], pads[rank + axis]
        _set_numbers(node, "pads", 1, shifted, editor)


_DEFAULT_AXIS = {"Softmax": -1, "LogSoftmax": -1}


def _set_numbers(node: ir.Node, name: str, place: int, wanted: list[int], editor: Editor) -> None:
    if not wanted:
        return
    if name in node.attributes or (place >= len(node.inputs) and node.op_type in REDUCTIONS):
        node.attributes[name] = ir.AttrInt64s(name, wanted)
        return
    if place >= len(node.inputs):
        node.resize_inputs(place + 1)
    old = node.inputs[place]
    node.replace_input_with(place, editor.sizes(node, f"{node.outputs[0].name}_{name}", wanted))
    remove_unread(old)


def _unary(node: ir.Node, rank: int, opset: int) -> bool:
    if is_onnx(node, "DequantizeLinear", "QuantizeLinear") and (array(node.inputs[1]) is None):
        return False
    rest = [array(v) for v in node.inputs[1:] if v is not None]
    return len(node.outputs) == 1 and all(data is not None and data.size == 1 for data in rest)


def _elementwise(node: ir.Node, rank: int, opset: int) -> bool:
    computed = 0
    for value in node.inputs:
        tensor = constant(value)
        if value is None:
            return False
        if tensor is None:
            computed += 1
            if value.shape is None or len(value.shape) != rank:
                return False
        elif len(tensor.shape) > rank or (tensor.size > 1 and sole_use(value) is None):
            return False  # a constant that others read would be stored twice
    return computed > 0


def _concat(node: ir.Node, rank: int, opset: int) -> bool:
    return all(
        v is not None and rank_of(v) == rank and (constant(v) is None or sole_use(v) is not None) for v in node.inputs
    )


def _reduction(node: ir.Node, rank: int, opset: int) -> bool:
    if not node.attributes.get_int("keepdims", 1):
        return False
    axes = numbers(node, "axes", 1)
    return axes is not None or (len(node.inputs) < 2 and "axes" not in node.attributes)


def _softmax(node: ir.Node, rank: int, opset: int) -> bool:
    return opset >= _FIRST_SOFTMAX_OF_ONE_AXIS


def _split(node: ir.Node, rank: int, opset: int) -> bool:
    return True


def _slice(node: ir.Node, rank: int, opset: int) -> bool:
    if numbers(node, "starts", 1) is None:
        return False
    return len(node.inputs) < 4 or node.inputs[3] is None or numbers(node, "axes", 3) is not None


def _pad(node: ir.Node, rank: int, opset: int) -> bool:
    pads = numbers(node, "pads", 1)
    return pads is not None and len(pads) == 2 * rank and (len(node.inputs) < 4 or node.inputs[3] is None)


_RULES: dict[str, Callable[[ir.Node, int, int], bool]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "Concat": _concat,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
}
