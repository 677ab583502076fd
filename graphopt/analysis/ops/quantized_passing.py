"""Quantised tensors added, multiplied, joined, pooled or activated: what is zero in every operand stays zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats
from graphopt.analysis.labels import Axes
from graphopt.analysis.ops.elementwise import ElementwiseVariadic
from graphopt.analysis.ops.quantized_products import zero_point
from graphopt.analysis.rules import Labeller, OpRule, Role, rule, where


@rule
class QLinearArithmetic(ElementwiseVariadic):
    """Sum or product of quantised numbers, position by position."""

    ops = ("QLinearAdd", "QLinearMul")
    domain = "com.microsoft"

    def operands(self, node: ir.Node) -> list[int]:
        return [0, 3]

    def role(self, node: ir.Node, index: int) -> Role:
        return "producer" if node.op_type == "QLinearAdd" else "follower"

    def apply(self, node: ir.Node, values: Sequence[Floats]) -> Floats | None:
        zeros, result = (zero_point(node, 2), zero_point(node, 5)), zero_point(node, 7)
        if result is None or None in zeros:
            return None
        zero = [held == point for held, point in zip(values, zeros, strict=True)]
        quiet = zero[0] & zero[1] if node.op_type == "QLinearAdd" else zero[0] | zero[1]
        return np.where(quiet, result, np.nan)


@rule
class QLinearPassing(OpRule):
    """Functions of one quantised tensor: activations position by position, pools channel by channel."""

    ops = ("QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool")
    domain = "com.microsoft"

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        if node.op_type.endswith("Pool"):
            rank = len(shapes.dims(node.outputs[0]) or ())
            passing = (0, rank - 1 if node.attributes.get_int("channels_last", 0) else 1)
            g.freeze(x, f"{where(node)}: the axis is pooled over", but=passing)
            x = {axis: labels for axis, labels in x.items() if axis in passing}
        g.set(node.outputs[0], x)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        zero, result = zero_point(node, 2), zero_point(node, 4)
        if zero is None or result is None or node.op_type == "QLinearSigmoid":
            return
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None:
                d.set(node.outputs[0], axis, np.where(values == zero, result, np.nan))


@rule
class QLinearConcat(OpRule):
    """Quantised tensors joined along an axis, each with its scale and zero point: y's, then three operands a tensor."""

    ops = ("QLinearConcat",)
    domain = "com.microsoft"

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, rank = where(node), len(shapes.dims(node.outputs[0]) or ())
        joined = int(node.attributes.get_int("axis", 0) or 0) % max(rank, 1)
        parts = {index: g.operand(node, index, role="producer") for index in range(2, len(node.inputs), 3)}
        result: Axes = {}
        for axis in range(rank):
            several = [labels.get(axis, ()) for labels in parts.values()]
            if not any(several):
                continue
            if axis != joined:
                result[axis] = several[0]
                for other in several[1:]:
                    result[axis] = g.equate(result[axis], other, f"{name}: an operand is never shortened")
                continue
            columns = []
            for index, labels in zip(parts, several, strict=True):
                value = node.inputs[index]
                size = (shapes.dims(value) or ())[axis] if value is not None else None
                if not isinstance(size, int):
                    g.freeze_node(node, f"{name}: joined with an axis of unknown size")
                    return
                columns.append(g.table.product(labels) if labels else np.zeros(size, dtype=np.int64))
            result[axis] = (np.concatenate(columns),)
        g.set(node.outputs[0], result)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output, result = node.outputs[0], zero_point(node, 1)
        joined = int(node.attributes.get_int("axis", 0) or 0) % max(len(shapes.dims(output) or ()), 1)
        if result is None or joined not in d.axes(output):
            return
        parts = []
        for index in range(2, len(node.inputs), 3):
            value, zero = node.inputs[index], zero_point(node, index + 2)
            size = (shapes.static_dims(value) or [0] * (joined + 1))[joined] if value is not None else 0
            held = d.operand(node, index, joined)
            unknown = held is None or zero is None
            parts.append(np.full(size, np.nan) if unknown else np.where(held == zero, result, np.nan))
        if sum(len(part) for part in parts) == d.size(output, joined):
            d.set(output, joined, np.concatenate(parts))
