"""Einsum, and the products that ONNX Runtime fuses with a transpose: one letter an axis.

An axis of a letter is one axis wherever the letter stands, so its positions are equated. A letter of the result whose
position is zero in any operand is zero in the result. A letter that is missing in the result is summed over: a product
is zero where one of its factors is, so a dead position may go if every computed operand holds zero there.

In an equation, "..." stands for leading axes that broadcast like numpy's; a repeated letter within an operand takes a
diagonal, and its axes are one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Axes, Factors, Vector
from graphopt.analysis.rules import CostView, Labeller, OpRule, Product, Role, rule, where


@dataclass(frozen=True)
class Terms:
    """A product with an index for every axis.

    Attributes:
        operands: for each operand, the index of each axis.
        result: the index of each axis of the result.
    """

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]

    def places(self, index: str) -> Iterator[tuple[int, int]]:
        """(operand, axis) wherever an index stands."""
        for operand, axes in enumerate(self.operands):
            yield from ((operand, axis) for axis, other in enumerate(axes) if other == index)

    def indices(self) -> list[str]:
        """Every index once."""
        return list(dict.fromkeys(index for axes in self.operands for index in axes))


def parse_equation(equation: str, ranks: Sequence[int]) -> Terms | str:
    """Read an equation of Einsum, or say what is wrong with it.

    Args:
        equation: "bij,bjk->bik"; without an arrow the result has the letters that stand once, in alphabetical order
            behind the ellipsis.
        ranks: number of axes of each operand.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if len(parts) != len(ranks):
        return f"its equation names {len(parts)} operands of {len(ranks)}"
    hidden = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    if any((own and "..." not in part) or own < 0 for part, own in zip(parts, hidden, strict=True)):
        return "its equation does not fit the ranks of its operands"
    most = max(hidden)

    def expand(part: str, leading: int) -> tuple[str, ...]:
        before, _, after = part.partition("...") if "..." in part else ("", "", part)
        return (*before, *(f".{k}" for k in range(most - leading, most)), *after)

    operands = tuple(expand(part, own) for part, own in zip(parts, hidden, strict=True))
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * (most > 0) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    result = expand(right, most) if "..." in right else tuple(right)
    return Terms(operands, result)


class Contraction(OpRule):
    """A sum of products over the indices that the result does not have."""

    def terms(self, node: ir.Node) -> Terms | str:
        """The indices of the axes, or why they are not known."""
        raise NotImplementedError

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, terms = where(node), self.terms(node)
        if isinstance(terms, str):
            g.freeze_node(node, f"{name}: {terms}")
            return
        constants = [shapes.constant_tensor(value) is not None for value in node.inputs]
        # A constant is read along an index that ends where something computed has it too; else it makes what ends.
        read = [
            i for i in terms.indices() if i not in terms.result and not all(constants[o] for o, _ in terms.places(i))
        ]
        operands = []
        for operand, axes in enumerate(terms.operands):
            roles: dict[int, Role] = {a: "consumer" if i in read else "producer" for a, i in enumerate(axes)}
            operands.append(g.operand(node, operand, roles))
        labels = {index: self._index(node, g, terms, operands, index) for index in terms.indices()}
        g.set(node.outputs[0], {axis: labels.get(index, ()) for axis, index in enumerate(terms.result)})
        for index in terms.indices():
            for operand, axis in terms.places(index):
                asked = index not in terms.result and not (constants[operand] and index in read)
                if asked and axis in operands[operand]:
                    g.sink(node, operand, axis, "zero", f"{name}: reads a value that is not zero")

    @staticmethod
    def _index(node: ir.Node, g: Labeller, terms: Terms, operands: list[Axes], index: str) -> Factors:
        """The labels of an index, equated over all axes that have it; one of size 1 is repeated and imposes nothing."""
        spanning = [
            operands[operand].get(axis, ())
            for operand, axis in terms.places(index)
            if (shapes.dims(_operand(node, operand)) or ())[axis] != 1
        ]
        if not any(spanning):
            return ()
        factors = spanning[0]
        for other in spanning[1:]:
            factors = g.equate(factors, other, f"{where(node)}: meets an axis that is never shortened")
        return factors

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        terms, output = self.terms(node), node.outputs[0]
        if isinstance(terms, str):
            return
        for result_axis in d.axes(output):
            size = d.size(output, result_axis)
            quiet = np.zeros(size, dtype=bool)
            for operand, axis in terms.places(terms.result[result_axis]):
                values = d.operand(node, operand, axis)
                if values is not None and len(values) == size:
                    quiet |= values == 0
            d.set(output, result_axis, np.where(quiet, 0.0, np.nan))

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        terms = self.terms(node)
        if isinstance(terms, str):
            return []
        known = [shapes.static_dims(_operand(node, operand)) for operand in range(len(terms.operands))]
        if any(sizes is None for sizes in known):
            return []
        coefficient: float = 1.0
        axes: tuple[Vector, ...] = ()
        for index in terms.indices():
            operand, axis = max(terms.places(index), key=lambda place: (known[place[0]] or [])[place[1]])
            factor, more = c.axis(node, operand, axis, (known[operand] or [])[axis])
            coefficient, axes = coefficient * factor, (*axes, *more)
        return [(coefficient, axes)]


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _ranks(node: ir.Node, count: int) -> list[int] | None:
    """Ranks of the first operands; None where one is unknown."""
    known = [shapes.dims(value) if value is not None else None for value in node.inputs[:count]]
    return None if any(shape is None for shape in known) else [len(shape or ()) for shape in known]


@rule
class Einsum(Contraction):
    """Einsum: any equation."""

    ops = ("Einsum",)

    def terms(self, node: ir.Node) -> Terms | str:
        ranks = _ranks(node, len(node.inputs))
        if ranks is None:
            return "the rank of an operand is unknown"
        return parse_equation(str(node.attributes.get_string("equation", "")), ranks)


@rule
class FusedMatMul(Contraction):
    """FusedMatMul: alpha A' B', where the last two axes of A and B may be swapped (transA, transB), or, in a batch, all
    leading axes rotated behind the rows (transBatchA, transBatchB: [M, batch..., K] is read as [batch..., M, K])."""

    ops = ("FusedMatMul", "TransposeMatMul")
    domain = "com.microsoft"

    def terms(self, node: ir.Node) -> Terms | str:
        ranks = _ranks(node, 2)
        if ranks is None:
            return "the rank of an operand is unknown"
        batch = max(*ranks, 2) - 2
        operands = []
        for rank, side, last in zip(ranks, "AB", (("m", "k"), ("k", "n")), strict=True):
            if rank < 2:
                return "an operand has one axis"
            leading = [f".{k}" for k in range(batch - rank + 2, batch)]
            rows, columns = last[::-1] if node.attributes.get_int(f"trans{side}", 0) else last
            rotated = node.attributes.get_int(f"transBatch{side}", 0)
            operands.append((rows, *leading, columns) if rotated else (*leading, rows, columns))
        return Terms(tuple(operands), (*(f".{k}" for k in range(batch)), "m", "n"))
