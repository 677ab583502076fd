"""Einsum, and the products that ONNX Runtime fuses with a transpose: one letter an axis.

An axis of a letter is one axis wherever the letter stands, so its positions are equated. A letter of the result whose
position is zero in any operand is zero in the result. A letter that is missing in the result is summed over: a product
is zero where one of its factors is, so a dead position may go if every computed operand holds zero there.

In an equation, "..." stands for leading axes that broadcast like numpy's; a repeated letter within an operand takes a
diagonal, and its axes are one axis.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
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
    """A sum of products over the indices that the result does not have.

    Attributes:
        factors: which operands are multiplied; empty: all.
    """

    factors: ClassVar[Sequence[int]] = ()

    @abstractmethod
    def terms(self, node: ir.Node) -> Terms | str:
        """The indices of the axes of the factors, or why they are not known."""

    def ends(self, node: ir.Node, g: Labeller, operand: int, axis: int) -> None:
        """Record what may stand in a position that is summed over and dies."""
        g.sink(node, operand, axis, "zero", f"{where(node)}: reads a value that is not zero")

    def _at(self, node: ir.Node) -> Sequence[int]:
        """Operands of the factors."""
        return self.factors or range(len(node.inputs))

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, terms, at = where(node), self.terms(node), self._at(node)
        if isinstance(terms, str):
            g.freeze_node(node, f"{name}: {terms}")
            return
        constants = [shapes.constant_tensor(node.inputs[operand]) is not None for operand in at]
        # A constant is read along an index that ends where something computed has it too; else it makes what ends.
        ending = [index for index in terms.indices() if index not in terms.result]
        read = [index for index in ending if not all(constants[factor] for factor, _ in terms.places(index))]
        factors = []
        for factor, axes in enumerate(terms.operands):
            roles: dict[int, Role] = {a: "consumer" if i in read else "producer" for a, i in enumerate(axes)}
            factors.append(g.operand(node, at[factor], roles))
        labels = {index: self._index(node, g, terms, factors, index) for index in terms.indices()}
        self.follow(node, g, labels)
        g.set(node.outputs[0], {axis: labels.get(index, ()) for axis, index in enumerate(terms.result)})
        for index in ending:
            for factor, axis in terms.places(index):
                if axis in factors[factor] and not (constants[factor] and index in read):
                    self.ends(node, g, at[factor], axis)

    def follow(self, node: ir.Node, g: Labeller, labels: dict[str, Factors]) -> None:
        """Label the other operands (scales, a bias), and tie what they span."""

    def _index(self, node: ir.Node, g: Labeller, terms: Terms, factors: list[Axes], index: str) -> Factors:
        """The labels of an index, equated over all axes that have it; one of size 1 is repeated and imposes nothing."""
        spanning = [
            factors[factor].get(axis, ())
            for factor, axis in terms.places(index)
            if (shapes.dims(_operand(node, self._at(node)[factor])) or ())[axis] != 1
        ]
        if not any(spanning):
            return ()
        labels = spanning[0]
        for other in spanning[1:]:
            labels = g.equate(labels, other, f"{where(node)}: meets an axis that is never shortened")
        return labels

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        for axis in d.axes(output):
            d.set(output, axis, np.where(self.quiet(node, d, axis), 0.0, np.nan))

    def quiet(self, node: ir.Node, d: DeadValues, result_axis: int) -> npt.NDArray[np.bool_]:
        """Where a factor is zero along an axis of the result, and with it the result."""
        terms, size = self.terms(node), d.size(node.outputs[0], result_axis)
        found = np.zeros(size, dtype=bool)
        if isinstance(terms, str):
            return found
        for factor, axis in terms.places(terms.result[result_axis]):
            operand = self._at(node)[factor]
            values, zero = d.operand(node, operand, axis), self.zero(node, operand)
            if values is not None and zero is not None and len(values) == size:
                found |= values == zero
        return found

    def zero(self, node: ir.Node, operand: int) -> float | None:
        """The value of an operand that stands for zero; None where it is not known."""
        return 0.0

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        terms, at = self.terms(node), self._at(node)
        if isinstance(terms, str):
            return []
        known = [shapes.static_dims(_operand(node, at[factor])) for factor in range(len(terms.operands))]
        if any(sizes is None for sizes in known):
            return []
        coefficient: float = 1.0
        axes: tuple[Vector, ...] = ()
        for index in terms.indices():
            factor, axis = max(terms.places(index), key=lambda place: (known[place[0]] or [])[place[1]])
            count, more = c.axis(node, at[factor], axis, (known[factor] or [])[axis])
            coefficient, axes = coefficient * count, (*axes, *more)
        return [(coefficient, axes)]


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _ranks(node: ir.Node, at: Sequence[int]) -> list[int] | None:
    """Ranks of operands; None where one is unknown."""
    known = [shapes.dims(value) if (value := node.inputs[k]) is not None else None for k in at]
    return None if any(shape is None for shape in known) else [len(shape or ()) for shape in known]


def product_terms(node: ir.Node, at: Sequence[int], transposed: Sequence[bool] = (False, False)) -> Terms | str:
    """A matrix product with leading axes; `transposed` tells which factor has its last two axes swapped."""
    ranks = _ranks(node, at)
    if ranks is None:
        return "the rank of an operand is unknown"
    if min(ranks) < 2:
        return "an operand has one axis"
    batch = max(ranks) - 2
    factors = []
    for rank, last, swap in zip(ranks, (("m", "k"), ("k", "n")), transposed, strict=True):
        rows, columns = last[::-1] if swap else last
        factors.append((*(f".{k}" for k in range(batch - rank + 2, batch)), rows, columns))
    return Terms(tuple(factors), (*(f".{k}" for k in range(batch)), "m", "n"))


@rule
class Einsum(Contraction):
    """Einsum: any equation."""

    ops = ("Einsum",)

    def terms(self, node: ir.Node) -> Terms | str:
        ranks = _ranks(node, range(len(node.inputs)))
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
        swapped = [bool(node.attributes.get_int(f"trans{side}", 0)) for side in "AB"]
        terms = product_terms(node, (0, 1), swapped)
        if isinstance(terms, str):
            return terms
        rotated = [bool(node.attributes.get_int(f"transBatch{side}", 0)) for side in "AB"]
        factors = [
            (axes[-2], *axes[:-2], axes[-1]) if turn else axes
            for axes, turn in zip(terms.operands, rotated, strict=True)
        ]
        return Terms(tuple(factors), terms.result)
