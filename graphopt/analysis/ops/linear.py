"""Gemm and MatMul, with constant or computed operands.

Both tie the contracted axis of their operands; the rows of the result are those of A, the columns those of B. A dead
position k of constant value v contributes v * B[k, :], a constant row that becomes (part of) a bias.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats, elementwise_value
from graphopt.analysis.folding import fold_constants
from graphopt.analysis.labels import Axes
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import CostView, Labeller, OpRule, Product, Role, rule, where


def _flags(node: ir.Node) -> tuple[int, int]:
    """transA and transB of a Gemm."""
    return int(node.attributes.get_int("transA", 0) or 0), int(node.attributes.get_int("transB", 0) or 0)


def _constant_result(weight: Floats, inputs: Floats | None) -> Floats:
    """Constant value of each column of x @ weight, weight [K, N], given constants of x (NaN: varies)."""
    inputs = np.full(len(weight), np.nan) if inputs is None else inputs
    usable = ~np.isnan(inputs)
    known = ~((weight != 0) & ~usable[:, None]).any(axis=0)
    return np.where(known, np.where(usable, inputs, 0.0) @ weight, np.nan)


def _contracted(node: ir.Node, g: Labeller, a_k: int | None, b_k: int | None, *, foldable: bool) -> None:
    """Record where the inner axis ends: a product is zero where one side is, so a constant side need not be asked."""
    reason = f"{where(node)}: reads an unknown value"
    a_constant, b_constant = (shapes.constant_tensor(node.inputs[k]) is not None for k in (0, 1))
    if a_k is not None and (not a_constant or b_constant):
        g.sink(node, 0, a_k, "constant" if foldable and b_constant else "zero", reason)
    if b_k is not None and not b_constant:
        g.sink(node, 1, b_k, "zero", reason)


@rule
class Gemm(OpRule):
    """Gemm: alpha A' B' + beta C, A' [M, K], B' [K, N], C broadcastable to [M, N]."""

    ops = ("Gemm",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        ta, tb = _flags(node)
        a_k, a_m, b_k, b_n = (0, 1, 1, 0) if ta and tb else (0, 1, 0, 1) if ta else (1, 0, 1, 0) if tb else (1, 0, 0, 1)
        a = g.operand(node, 0, {a_m: "producer", a_k: "consumer"})
        b = g.operand(node, 1, {b_n: "producer", b_k: "consumer"})
        if a.get(a_k) or b.get(b_k):
            g.equate(a.get(a_k, ()), b.get(b_k, ()), f"{name}: its inner axis is never removed")
        out: Axes = {0: a.get(a_m, ()), 1: b.get(b_n, ())}
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            c, shape = g.operand(node, 2, role="producer"), shapes.dims(bias) or ()
            for axis in (0, 1):
                own = axis - 2 + len(shape)
                if own >= 0 and shape[own] != 1 and (c.get(own) or out[axis]):
                    out[axis] = g.equate(
                        out[axis], c.get(own, ()), f"{name}: its result meets '{bias.name}', which is never shortened"
                    )
        g.set(node.outputs[0], out)
        _contracted(node, g, a_k if a_k in a else None, b_k if b_k in b else None, foldable=not ta)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output, source = node.outputs[0], node.inputs[0]
        ta, tb = _flags(node)
        if 1 not in d.axes(output) or shapes.constant_tensor(node.inputs[1]) is None or source is None:
            return
        if d.hypothetical:
            result = np.zeros(d.size(output, 1))
        elif ta:
            return
        else:
            weight = shapes.constant(node.inputs[1])
            assert weight is not None
            matrix = weight.astype(np.float64).T if tb else weight.astype(np.float64)
            result = node.attributes.get_float("alpha", 1.0) * _constant_result(matrix, d.of(source, 1))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = elementwise_value(node, 2, output, 1, d)
            result = result + node.attributes.get_float("beta", 1.0) * bias
        d.set(output, 1, result)

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        weight, out = node.inputs[1], shapes.static_dims(node.outputs[0])
        size = shapes.static_dims(weight) if weight is not None else None
        if size is None or out is None:
            return []
        first, one = c.axis(node, 1, 0, size[0])
        second, two = c.axis(node, 1, 1, size[1])
        return [(out[0] * first * second, (*one, *two))]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        ta, tb = _flags(node)
        source = node.inputs[0]
        if not ta and source is not None and shapes.constant_tensor(node.inputs[1]) is not None:
            alpha = float(node.attributes.get_float("alpha", 1.0) or 0.0)
            beta = float(node.attributes.get_float("beta", 1.0) or 0.0)
            fold_constants(r, node, source, 1, weight=1, bias=2, transposed=not tb, alpha=alpha, beta=beta)


def _batch(axis: int, rank: int, a_rank: int, b_rank: int) -> dict[int, int]:
    """Operand -> its axis for a leading axis of a matrix product; negative where an operand does not have it."""
    leading = rank - (a_rank > 1) - (b_rank > 1)
    return {k: axis - leading + own - 2 for k, own in enumerate((a_rank, b_rank)) if own > 2}


@rule
class MatMul(OpRule):
    """MatMul: numpy's matmul; A [..., M, K], B [..., K, N], leading axes broadcast; 1-D operands have no M or N."""

    ops = ("MatMul",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        left, right = node.inputs[0], node.inputs[1]
        a_shape = shapes.dims(left) if left is not None else None
        b_shape = shapes.dims(right) if right is not None else None
        if a_shape is None or b_shape is None or left is None or right is None:
            g.freeze_node(node, f"{name}: the rank of an operand is unknown")
            return
        ra, rb = len(a_shape), len(b_shape)
        a_k, b_k = ra - 1, max(rb - 2, 0)
        a_roles: dict[int, Role] = {a_k: "consumer", **({ra - 2: "producer"} if ra > 1 else {})}
        b_roles: dict[int, Role] = {b_k: "consumer", **({rb - 1: "producer"} if rb > 1 else {})}
        a, b = g.operand(node, 0, a_roles), g.operand(node, 1, b_roles)
        if a.get(a_k) or b.get(b_k):
            g.equate(a.get(a_k, ()), b.get(b_k, ()), f"{name}: its inner axis is never removed")
        batch = max(ra, rb) - 2
        out: Axes = {}
        for axis in range(batch):
            sides = [
                labels.get(own, ())
                for labels, shape, own in ((a, a_shape, axis - batch + ra - 2), (b, b_shape, axis - batch + rb - 2))
                if own >= 0 and shape[own] != 1
            ]
            if any(sides):
                one = sides[0]
                for other in sides[1:]:
                    one = g.equate(one, other, f"{name}: a leading axis is never shortened on one side")
                out[axis] = one
                if shapes.constant_tensor(left) is None and shapes.constant_tensor(right) is None:
                    g.heads(one)
        rank = batch + (ra > 1) + (rb > 1) if batch > 0 else (ra > 1) + (rb > 1)
        if ra > 1:
            out[rank - 1 - (rb > 1)] = a.get(ra - 2, ())
        if rb > 1:
            out[rank - 1] = b.get(rb - 1, ())
        g.set(node.outputs[0], out)
        _contracted(node, g, a_k if a_k in a else None, b_k if b_k in b else None, foldable=rb == 2)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output, left, right = node.outputs[0], node.inputs[0], node.inputs[1]
        if left is None or right is None:
            return
        rank = len(shapes.dims(output) or ())
        a_rank, b_rank = len(shapes.dims(left) or ()), len(shapes.dims(right) or ())
        constant = shapes.constant_tensor(right) is not None
        for axis in d.axes(output):
            size = d.size(output, axis)
            from_b = b_rank > 1 and axis == rank - 1
            if from_b and constant:
                weight = None if d.hypothetical else shapes.constant(right)
                if weight is None:
                    d.set(output, axis, np.zeros(size))
                elif b_rank == 2:
                    d.set(output, axis, _constant_result(weight.astype(np.float64), d.of(left, a_rank - 1)))
                continue
            # A row, column or matrix of zeros in either operand gives zeros; other constants meet the unknown.
            row = a_rank > 1 and axis == rank - 1 - (b_rank > 1)
            places = {0: a_rank - 2} if row else {1: b_rank - 1} if from_b else _batch(axis, rank, a_rank, b_rank)
            quiet = np.zeros(size, dtype=bool)
            for operand, own in places.items():
                values = d.operand(node, operand, own) if own >= 0 else None
                if values is not None and len(values) == size:
                    quiet |= values == 0
            d.set(output, axis, np.where(quiet, 0.0, np.nan))

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        left, out = node.inputs[0], shapes.static_dims(node.outputs[0])
        inner = shapes.static_dims(left) if left is not None else None
        if out is None or not inner:
            return []
        coefficient, axes = c.axis(node, 0, len(inner) - 1, inner[-1])
        for axis, size in enumerate(out):
            factor, more = c.result(node, axis, size)
            coefficient, axes = coefficient * factor, (*axes, *more)
        return [(coefficient, axes)]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        source, size = node.inputs[0], shapes.sizes(node.inputs[1])
        if source is not None and size is not None and len(size) == 2:
            rank = len(shapes.dims(source) or ())
            fold_constants(r, node, source, rank - 1, weight=1, bias=None, transposed=True)
