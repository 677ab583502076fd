"""Convolutions and products of integers that stand for real numbers: x = (q - z) s.

A position whose integer is the zero point z is a real zero, and that is what a sum may lose. Zeroing a weight writes
q = 0, which is a real zero where the weight's zero point is 0, as symmetric quantisation has it. Scales and zero points
that are given by column follow their axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Factors
from graphopt.analysis.ops.contraction import Contraction, Terms, product_terms
from graphopt.analysis.ops.convolution import Convolution
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import CostView, Labeller, OpRule, Product, Role, rule, where


def _given(node: ir.Node, index: int | None) -> bool:
    return index is not None and index < len(node.inputs) and node.inputs[index] is not None


def zero_point(node: ir.Node, index: int | None) -> float | None:
    """A zero point, 0 where there is none; None where it is computed or differs by position."""
    if index is None or not _given(node, index):
        return 0.0
    array = shapes.constant(node.inputs[index])
    same = array is not None and array.size and (array == array.ravel()[0]).all()
    return float(array.ravel()[0]) if array is not None and same else None


def _quantised_here(node: ir.Node, data: int, zero: int | None) -> bool:
    """Whether an operand and its zero point come from one DynamicQuantizeLinear, which asks for zeros itself."""
    value, point = node.inputs[data], node.inputs[zero] if zero is not None and _given(node, zero) else None
    source = value.producer() if value is not None else None
    return source is not None and source.op_type == "DynamicQuantizeLinear" and point is source.outputs[2]


def _ends(node: ir.Node, g: Labeller, data: int, zero: int | None, axis: int, factors: Factors = ()) -> None:
    """Dead positions of an operand must hold its zero point."""
    name, point = where(node), zero_point(node, zero)
    if _quantised_here(node, data, zero):
        g.sink(node, data, axis, "anything", f"{name}: its operand was quantised with zeros in place", factors)
    elif point is None:
        g.sink(node, data, axis, "none", f"{name}: its zero point is not known", factors)
    else:
        g.sink(node, data, axis, "zero", f"{name}: reads a value that is not zero", factors, zero=point)


@rule
class DynamicQuantizeLinear(OpRule):
    """Scale and zero point from the least and greatest of all elements and 0: zeros do not move them."""

    ops = ("DynamicQuantizeLinear",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        for axis in x:
            g.sink(node, 0, axis, "zero", f"{where(node)}: a value that is not zero moves its scale")
        g.set(node.outputs[0], x)


class _QuantizedConvolution(Convolution):
    """Per output channel: bias, and scales and zero points of the weight."""

    data_zero: ClassVar[int]
    weight_zero: ClassVar[int]
    result_zero: ClassVar[int | None] = None
    by_channel: ClassVar[Sequence[int]]
    folds = False

    def label(self, node: ir.Node, g: Labeller) -> None:
        if node.attributes.get_int("channels_last", 0):
            g.freeze_node(node, f"{where(node)}: its channels come last")
            return
        super().label(node, g)
        labels = g.of(node.outputs[0])
        for index in self.by_channel:
            own = g.operand(node, index).get(0, ())
            if own:
                channels = g.equate(labels.get(1, ()), own, f"{where(node)}: its output channels are never removed")
                g.set(node.outputs[0], {**labels, 1: channels})

    def ends(self, node: ir.Node, g: Labeller, *, constants: bool, factors: Factors) -> None:
        _ends(node, g, 0, self.data_zero, 1, factors)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        filters = d.operand(node, self.weight, self.writes) if 1 in d.axes(output) else None
        zero, result = zero_point(node, self.weight_zero), zero_point(node, self.result_zero)
        if filters is None or zero is None or result is None:
            return
        bias = d.operand(node, self.bias, 0) if _given(node, self.bias) else np.zeros(len(filters))
        if bias is not None and len(filters) == d.size(output, 1):
            d.set(output, 1, np.where((filters == zero) & (bias == 0), result, np.nan))


@rule
class QLinearConv(_QuantizedConvolution):
    """Convolution of quantised numbers; scale and zero point of the weight may be given by channel."""

    ops = ("QLinearConv",)
    weight, bias = 3, 8
    data_zero, weight_zero, result_zero = 2, 5, 7
    by_channel = (4, 5)


@rule
class MicrosoftQLinearConv(QLinearConv):
    """The same, possibly with channels last, which stay."""

    ops = ("QLinearConv",)
    domain = "com.microsoft"


@rule
class ConvInteger(_QuantizedConvolution):
    """Convolution of integers, less their zero points, as integers."""

    ops = ("ConvInteger",)
    weight, bias = 1, 4
    data_zero, weight_zero = 2, 3
    by_channel = (3,)


class _QuantizedProduct(Contraction):
    """A matrix product of quantised factors.

    Attributes:
        zeros: the operands that hold the zero points of the factors.
        columns: operands with a value for each column of the result: scales, zero points.
        bias: operand of the bias.
        result_zero: operand of the result's zero point.
    """

    factors = (0, 1)
    zeros: ClassVar[tuple[int | None, int | None]]
    columns: ClassVar[Sequence[int]] = ()
    bias: ClassVar[int | None] = None
    result_zero: ClassVar[int | None] = None

    def terms(self, node: ir.Node) -> Terms | str:
        return product_terms(node, self.factors)

    def follow(self, node: ir.Node, g: Labeller, labels: dict[str, Factors]) -> None:
        for index in (*self.columns, *([] if self.bias is None else [self.bias])):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None:
                continue
            own = g.operand(node, index, role="producer" if index == self.bias else "follower")
            last = len(shapes.dims(value) or ()) - 1
            g.freeze(own, f"{where(node)}: rows have no units here", but=(last,))
            if own.get(last):
                labels["n"] = g.equate(labels.get("n", ()), own[last], f"{where(node)}: its columns are never removed")

    def ends(self, node: ir.Node, g: Labeller, operand: int, axis: int) -> None:
        _ends(node, g, operand, self._zero_of(operand), axis)

    def zero(self, node: ir.Node, operand: int) -> float | None:
        return zero_point(node, self._zero_of(operand))

    def _zero_of(self, operand: int) -> int | None:
        return self.zeros[self.factors.index(operand)]

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output, result = node.outputs[0], zero_point(node, self.result_zero)
        if result is None:
            return
        for axis in d.axes(output):
            quiet = self.quiet(node, d, axis)
            if self.bias is not None and _given(node, self.bias):
                last = axis == len(shapes.dims(output) or ()) - 1
                bias = d.operand(node, self.bias, len(shapes.sizes(node.inputs[self.bias]) or (0,)) - 1)
                quiet &= (bias == 0) if last and bias is not None else False
            d.set(output, axis, np.where(quiet, result, np.nan))


@rule
class MatMulInteger(_QuantizedProduct):
    """Product of integers, less their zero points, as integers."""

    ops = ("MatMulInteger",)
    zeros = (2, 3)
    columns = (3,)


@rule
class QLinearMatMul(_QuantizedProduct):
    """Product of quantised numbers."""

    ops = ("QLinearMatMul",)
    factors = (0, 3)
    zeros = (2, 5)
    columns = (4, 5)
    result_zero = 7


@rule
class MatMulIntegerToFloat(_QuantizedProduct):
    """Product of quantised numbers as real ones, plus bias."""

    ops = ("MatMulIntegerToFloat",)
    domain = "com.microsoft"
    zeros = (4, 5)
    columns = (3, 5)
    bias = 6


@rule
class DynamicQuantizeMatMul(_QuantizedProduct):
    """Product of real numbers, quantised on the way, and quantised ones, plus bias."""

    ops = ("DynamicQuantizeMatMul",)
    domain = "com.microsoft"
    zeros = (None, 3)
    columns = (2, 3)
    bias = 4


@rule
class QGemm(_QuantizedProduct):
    """alpha A' B' + C of quantised numbers, as quantised or real ones."""

    ops = ("QGemm",)
    domain = "com.microsoft"
    factors = (0, 3)
    zeros = (2, 5)
    columns = (4, 5)
    bias = 6
    result_zero = 8

    def terms(self, node: ir.Node) -> Terms | str:
        return product_terms(node, self.factors, [bool(node.attributes.get_int(f"trans{side}", 0)) for side in "AB"])


@rule
class MatMulNBits(OpRule):
    """x times weights in packed blocks: its columns are units, with their scales; blocks along the inner axis stay."""

    ops = ("MatMulNBits",)
    domain = "com.microsoft"

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, shape = where(node), shapes.dims(node.outputs[0])
        x, packed = g.operand(node, 0), g.operand(node, 1, only=(0,))
        if shape is None:
            g.freeze_node(node, f"{name}: the rank of its input is unknown")
            return
        last = len(shape) - 1
        g.freeze(x, f"{name}: its weights are packed in blocks along this axis", only=(last,))
        columns = packed.get(0, ())
        roles: dict[int, Role] = {2: "producer", 3: "follower", 5: "producer"}
        for index, role in roles.items():
            if _given(node, index):
                columns = self._tie(node, g, index, role, columns)
        g.set(node.outputs[0], {**{a: f for a, f in x.items() if a < last}, last: columns})

    @staticmethod
    def _tie(node: ir.Node, g: Labeller, index: int, role: Role, columns: Factors) -> Factors:
        """Scales and zero points of a column stand one behind the other, or in a row of their own."""
        own = g.operand(node, index, role=role, only=(0,))
        told = f"{where(node)}: its columns are never removed"
        if not own.get(0) or not columns:
            g.freeze(own, told)
            g.table.freeze(columns, told)
            return columns
        blocks, rest = divmod(len(own[0][0]), len(columns[0]))
        if rest:
            g.freeze(own, f"{where(node)}: columns share a byte")
            g.table.freeze(columns, f"{where(node)}: columns share a byte")
            return columns
        g.equate(tuple(np.repeat(vector, blocks) for vector in columns), own[0], told)
        return columns

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        last = len(shapes.dims(output) or ()) - 1
        for axis in d.axes(output):
            scales = d.operand(node, 2, 0) if axis == last else None
            if axis != last:
                values = d.operand(node, 0, axis)
                zero = None if values is None or _given(node, 5) else values == 0
            else:
                zero = None if scales is None else (scales.reshape(d.size(output, axis), -1) == 0).all(axis=1)
                bias = d.operand(node, 5, 0) if _given(node, 5) else 0.0
                zero = zero & (bias == 0) if zero is not None and bias is not None else None
            if zero is not None:
                d.set(output, axis, np.where(zero, 0.0, np.nan))

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        out = shapes.static_dims(node.outputs[0])
        inner = node.attributes.get_int("K", 0)
        if out is None or not inner:
            return []
        coefficient, axes = c.result(node, len(out) - 1, out[-1])
        return [(float(inner * np.prod(out[:-1])) * coefficient, axes)]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        mask = r.operand_mask(node, 1, 0)
        if mask is not None:
            node.attributes.add(ir.AttrInt64("N", int(mask.sum())))
