"""Factors that belong to a pattern which runtimes fuse into one operator: taken out of it, the pattern is lost.

An exporter writes an activation or a normalisation as a few elementwise operators, and runtimes find them again by
their exact form. What those with a factor at their end have in common is that a tensor meets itself:

    x * g(x), times a number     g elementwise: Gelu by erf or tanh (0.5), Swish, and their relatives
    x * g(x) or x / g(x), scaled and shifted per channel     g with a mean: LayerNormalization, RMSNormalization

Folded into the next layer such a factor saves one operator and costs the fusion of five to ten.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx

DEPTH = 16
"""Nodes followed back from where a tensor meets itself; the longest pattern known (Gelu by tanh) has nine."""

_BENDS = {
    "Erf": "Gelu",
    "Tanh": "Gelu",
    "Sigmoid": "Swish",
    "Softplus": "Mish",
    "Exp": "Swish",
}
"""Operators that make a gate of a tensor, and the activation they are known from. HardSwish (Clip) is not among them:
ONNX Runtime does not fuse its written-out form, and its 1/6 costs an operator wherever it stays."""
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Reciprocal", "Cast", "Identity", "Log", "Abs"}
_MEANS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}


def fused_pattern(node: ir.Node) -> str | None:
    """The pattern that `node`, a Mul, Div, Add or Sub by a constant, is the end of; None where it ends none.

    A product of a tensor with itself alone is none, nor are two parts of a tensor that gate each other (GLU), nor
    gates that read more than the tensor they gate (squeeze-and-excitation).
    """
    sides = [v for v in node.inputs if v is not None]
    data = [v for v in sides if constant(v) is None]
    factors = [tensor for tensor in map(constant, sides) if tensor is not None]
    if len(data) != 1 or len(factors) != 1:
        return None
    join = data[0].producer()
    if join is None:
        return None
    scalar = factors[0].size == 1
    if scalar and is_onnx(node, "Mul", "Div"):
        gate = _gate(join)
        if gate:
            return gate
    if is_onnx(node, "Mul", "Div"):
        return "normalisation" if _normalises(join) else None
    scaled = [v.producer() for v in join.inputs if v is not None and constant(v) is None]
    if is_onnx(join, "Mul") and len(scaled) == 1 and scaled[0] is not None and _normalises(scaled[0]):
        return "normalisation"
    return None


def _gate(join: ir.Node) -> str | None:
    """The activation that `join` is, where it multiplies a tensor by an elementwise function of that tensor."""
    reached = _branches(join, {*_ELEMENTWISE, *_BENDS}) if is_onnx(join, "Mul") else None
    if reached is None:
        return None
    operators = {op for ops in reached for op in ops}
    return next((name for op, name in _BENDS.items() if op in operators), None)


def _normalises(join: ir.Node) -> bool:
    """Whether `join` divides a tensor by a function of its own mean, or multiplies it by one."""
    reached = _branches(join, {*_ELEMENTWISE, *_MEANS}) if is_onnx(join, "Mul", "Div") else None
    return reached is not None and any(_MEANS & ops for ops in reached)


def _branches(join: ir.Node, through: set[str]) -> list[set[str]] | None:
    """The operators passed on either way back from `join`, where both ways reach one tensor; else None."""
    left, right = join.inputs[0], join.inputs[1]
    if left is None or right is None or left is right or constant(left) is not None or constant(right) is not None:
        return None
    ways = [_back(value, through) for value in (left, right)]
    return [operators for _, operators in ways] if ways[0][0] & ways[1][0] else None


def _back(start: ir.Value, through: set[str]) -> tuple[set[ir.Value], set[str]]:
    """The tensors that `start` is computed from by operators in `through`, itself included, and those operators."""
    values: set[ir.Value] = {start}
    operators: set[str] = set()
    pending = [start]
    for _ in range(DEPTH):
        if not pending:
            break
        node = pending.pop(0).producer()
        if node is None or not is_onnx(node, *through):
            continue
        operators.add(node.op_type)
        for value in node.inputs:
            if value is not None and value not in values and constant(value) is None:
                values.add(value)
                pending.append(value)
    return values, operators
