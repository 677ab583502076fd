"""Products and sums of formulas, in whatever order and grouping a graph computes them (`graphopt.rewriting.match`).

Both are walked from their last node: every way to divide the parts between its two operands is tried, numbers are
gathered on the way. Formulas have three parts or four, so these are few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.found import Found, Free, computed_by, number_of, scalar


class Pattern(ABC):
    """A formula. Arithmetic on patterns, numbers and `Free` numbers makes larger ones."""

    constant: ClassVar[bool] = False
    """Whether it stands for constants only, so that one look tells whether a tensor is it."""

    @abstractmethod
    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """Every way in which `value` is this formula, given what was found so far."""

    @abstractmethod
    def operators(self) -> frozenset[str]:
        """The operators that a node computing this formula may have."""

    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Operators without which no graph holds this formula."""

    def __mul__(self, other: Pattern | Free | float) -> Pattern:
        return _product(self, other)

    def __rmul__(self, other: Free | float) -> Pattern:
        return _product(self, other)

    def __truediv__(self, other: Pattern | float) -> Pattern:
        return _product(self, Inverse(other) if isinstance(other, Pattern) else 1.0 / other)

    def __rtruediv__(self, other: float) -> Pattern:
        return _product(Inverse(self), other) if other != 1 else Inverse(self)

    def __add__(self, other: Pattern | Free | float) -> Pattern:
        return _sum(self, other)

    def __radd__(self, other: Free | float) -> Pattern:
        return _sum(self, other)

    def __sub__(self, other: Pattern | float) -> Pattern:
        return _sum(self, -other)

    def __rsub__(self, other: float) -> Pattern:
        return _sum(-self, other)

    def __neg__(self) -> Pattern:
        return _product(self, -1.0)

    def __pow__(self, count: int) -> Pattern:
        power: Pattern = self
        for _ in range(count - 1):
            power = _product(power, self)
        return power


@dataclass(frozen=True)
class Inverse(Pattern):
    """1 / of, also as the divisor of a product."""

    of: Pattern

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """As a tensor of its own; `Product` meets the divisors."""
        for factor, further in _factors(value, (self,), found):
            if further.close(factor, 1.0):
                yield further

    def needs(self) -> frozenset[str]:
        """Those of its parts; how it is written itself is open."""
        return self.of.needs()

    def operators(self) -> frozenset[str]:
        """A quotient's."""
        return frozenset({"Div", "Reciprocal", "Pow"})


@dataclass(frozen=True)
class Root(Pattern):
    """The square root."""

    of: Pattern

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """Sqrt, or Pow by 0.5."""
        node = computed_by(value, "Sqrt", "Pow")
        if node is None or node.inputs[0] is None:
            return
        if node.op_type == "Pow":
            tensor = scalar(node.inputs[1])
            if tensor is None or number_of(tensor) != 0.5:
                return
        yield from self.of.match(node.inputs[0], found.with_node(node))

    def needs(self) -> frozenset[str]:
        """Those of its parts; how it is written itself is open."""
        return self.of.needs()

    def operators(self) -> frozenset[str]:
        """Those of a root."""
        return frozenset({"Sqrt", "Pow"})


@dataclass(frozen=True)
class Product(Pattern):
    """A number, times a free number where there is one, times the elements, in any order and grouping."""

    elements: tuple[Pattern, ...]
    factor: float = 1.0
    free: Free | None = None

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        for factor, further in _factors(value, self.elements, found):
            bound = further.with_number(self.free or 1.0, factor / self.factor)
            if bound is not None:
                yield bound

    def needs(self) -> frozenset[str]:
        """Those of its parts; how it is written itself is open."""
        return frozenset().union(*(element.needs() for element in self.elements))

    def operators(self) -> frozenset[str]:
        """Those that multiply, and those of an only element whose factor may be 1."""
        return frozenset({"Mul", "Div", "Neg", "Pow", "Reciprocal"}) | (
            self.elements[0].operators() if len(self.elements) == 1 else frozenset()
        )


@dataclass(frozen=True)
class Sum(Pattern):
    """A number plus the elements, in any order and grouping."""

    elements: tuple[Pattern, ...]
    addend: float | Free = 0.0

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        for addend, further in _addends(value, self.elements, found):
            bound = further.with_number(self.addend, addend)
            if bound is not None:
                yield bound

    def needs(self) -> frozenset[str]:
        """Those of its parts; how it is written itself is open."""
        return frozenset().union(*(element.needs() for element in self.elements))

    def operators(self) -> frozenset[str]:
        """Those that add."""
        return frozenset({"Add", "Sub", "Sum"})


_Part = tuple[ir.Value, Sequence[Pattern]]
"""An operand, and the elements that it should consist of."""


def _product(left: Pattern, right: Pattern | Free | float) -> Pattern:
    elements: tuple[Pattern, ...] = ()
    factor, free = 1.0, None
    for part in (left, right):
        if isinstance(part, Product):
            elements, factor, free = (*elements, *part.elements), factor * part.factor, free or part.free
        elif isinstance(part, Pattern):
            elements = (*elements, part)
        elif isinstance(part, Free):
            free = part
        else:
            factor *= part
    return elements[0] if len(elements) == 1 and factor == 1.0 and free is None else Product(elements, factor, free)


def _sum(left: Pattern, right: Pattern | Free | float) -> Pattern:
    elements: list[Pattern] = []
    addend: float | Free = 0.0
    for part in (left, right):
        number = part.addend if isinstance(part, Sum) else 0.0 if isinstance(part, Pattern) else part
        if isinstance(part, Pattern):
            elements.extend(part.elements if isinstance(part, Sum) else (part,))
        if isinstance(number, Free) or isinstance(addend, Free):
            if 0.0 not in (number, addend):
                raise TypeError("a sum has one free number or numbers that are known, not both")
            addend = number if addend == 0.0 else addend
        else:
            addend += number
    return elements[0] if len(elements) == 1 and addend == 0.0 else Sum(tuple(elements), addend)


def _factors(value: ir.Value, elements: Sequence[Pattern], found: Found) -> Iterator[tuple[float, Found]]:
    """Every way in which `value` is a number times the product of `elements`, with that number."""
    node = computed_by(value, "Mul", "Div", "Neg", "Pow", "Reciprocal")
    if node is not None:
        yield from _factors_of(node, elements, found)
    # Last, so that numbers in front of a tensor are found before that tensor itself.
    if len(elements) == 1 and not isinstance(elements[0], Inverse):
        yield from ((1.0, further) for further in elements[0].match(value, found))


def _factors_of(node: ir.Node, elements: Sequence[Pattern], found: Found) -> Iterator[tuple[float, Found]]:
    only = elements[0] if len(elements) == 1 else None
    inside = found.with_node(node)
    a, b = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if a is None:
        return
    match node.op_type:
        case "Neg":
            yield from ((-factor, further) for factor, further in _factors(a, elements, inside))
        case "Reciprocal":
            if isinstance(only, Inverse):
                yield from ((1.0, further) for further in only.of.match(a, inside))
        case "Pow" if b is not None:
            yield from _powers(a, b, elements, inside)
        case "Mul" if b is not None:
            for data, other in ((a, b), (b, a)):
                number = scalar(other)
                if number is not None:
                    read = inside.with_scalar(number)
                    yield from ((f * number_of(number), further) for f, further in _factors(data, elements, read))
            for left, right in _splits(elements):
                (first, here), (second, there) = _easier_first((a, left), (b, right))
                for factor, further in _factors(first, here, inside):
                    yield from ((factor * f, last) for f, last in _factors(second, there, further))
        case "Div" if b is not None:
            number = scalar(b)
            if number is not None and number_of(number) != 0.0:
                read = inside.with_scalar(number)
                yield from ((f / number_of(number), further) for f, further in _factors(a, elements, read))
            dividend = scalar(a)
            if dividend is not None and isinstance(only, Inverse):
                read = inside.with_scalar(dividend)
                yield from ((number_of(dividend), further) for further in only.of.match(b, read))
            for left, right in _splits(elements):
                if len(right) == 1 and isinstance(right[0], Inverse):
                    for factor, further in _factors(a, left, inside):
                        yield from ((factor, last) for last in right[0].of.match(b, further))


def _powers(
    base: ir.Value, exponent: ir.Value, elements: Sequence[Pattern], inside: Found
) -> Iterator[tuple[float, Found]]:
    """`base` to a constant power as a product: of equal elements, or the inverse of a root."""
    tensor = constant(exponent)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return
    power = number_of(tensor)
    if tensor.dtype.is_floating_point():
        inside = inside.with_scalar(tensor)
    first = elements[0]
    if len(elements) == 1 and isinstance(first, Inverse) and power == -0.5:
        root = first.of
        if isinstance(root, Root):
            yield from ((1.0, further) for further in root.of.match(base, inside))
    elif len(elements) >= 2 and power == len(elements) and all(element == first for element in elements):
        yield from ((factor**power, further) for factor, further in _factors(base, (first,), inside))


def _addends(value: ir.Value, elements: Sequence[Pattern], found: Found) -> Iterator[tuple[float, Found]]:
    """Every way in which `value` is a number plus the sum of `elements`, with that number."""
    node = computed_by(value, "Add", "Sub", "Sum")
    if node is not None and len(node.inputs) == 2:
        yield from _addends_of(node, elements, found)
    if len(elements) == 1:
        yield from ((0.0, further) for further in elements[0].match(value, found))


def _addends_of(node: ir.Node, elements: Sequence[Pattern], found: Found) -> Iterator[tuple[float, Found]]:
    if node.inputs[0] is None or node.inputs[1] is None:
        return
    inside = found.with_node(node)
    a, b = node.inputs[0], node.inputs[1]
    subtracted = node.op_type == "Sub"
    number = scalar(b)
    if number is not None:
        k, read = -number_of(number) if subtracted else number_of(number), inside.with_scalar(number)
        yield from ((k + addend, further) for addend, further in _addends(a, elements, read))
    number = scalar(a)
    if number is not None:
        read = inside.with_scalar(number)
        for addend, further in _addends(b, _negated(elements) if subtracted else elements, read):
            yield number_of(number) + (-addend if subtracted else addend), further
    for left, right in _splits(elements):
        (first, here), (second, there) = _easier_first((a, left), (b, _negated(right) if subtracted else right))
        for addend, further in _addends(first, here, inside):
            for other, last in _addends(second, there, further):
                at_a, at_b = (addend, other) if first is a else (other, addend)
                yield at_a + (-at_b if subtracted else at_b), last


def _negated(elements: Sequence[Pattern]) -> tuple[Pattern, ...]:
    return tuple(-element for element in elements)


def _easier_first(one: _Part, other: _Part) -> tuple[_Part, _Part]:
    """A constant is told from another tensor at once, so it is looked for before the other operand is searched."""
    return (other, one) if len(other[1]) == 1 and other[1][0].constant else (one, other)


def _splits(elements: Sequence[Pattern]) -> Iterator[tuple[tuple[Pattern, ...], tuple[Pattern, ...]]]:
    """All ways to divide `elements` between two operands, each of which gets some."""
    places = range(len(elements))
    for count in range(1, len(elements)):
        for chosen in combinations(places, count):
            yield tuple(elements[i] for i in chosen), tuple(elements[i] for i in places if i not in chosen)
