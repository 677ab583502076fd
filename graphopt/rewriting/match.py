"""Formulas that are looked for in a graph.

    x = Tensor("x")
    gelu = x * (1 + op("Erf", x * math.sqrt(0.5))) * 0.5

A pattern is a formula, and what is matched is the formula and not its spelling. Products are flattened: in whatever
order and grouping an exporter multiplies, `x / 2`, `0.5 * x`, `-x` and `x ** 2` are products with a number in front,
and the numbers of a product are multiplied before they are compared. Sums likewise, with `Sub` as a sum with a negated
part. Everything else is matched operator by operator. Matching backtracks, so that `x` may itself be a product.

What a match found (`Found`): values and numbers by name, axes of reductions, and the nodes inside. That nothing else
reads what is inside is checked where patterns are applied (`graphopt.rewriting.recognise`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import ClassVar

import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.formulas import Pattern
from graphopt.rewriting.found import Found, Free, computed_by, number_attribute, number_of, reduced_axes, scalar


@dataclass(frozen=True)
class Tensor(Pattern):
    """A computed tensor. Where it is met again it must be the same one."""

    name: str

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        bound = found.with_value(self.name, value) if constant(value) is None else None
        if bound is not None:
            yield bound

    def needs(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def operators(self) -> frozenset[str]:
        """Any: a rule must not have it at its root."""
        return frozenset()


@dataclass(frozen=True)
class Parameter(Pattern):
    """A floating-point constant of any shape."""

    name: str
    constant: ClassVar[bool] = True

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        tensor = constant(value)
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16:
            bound = found.with_value(self.name, value)
            if bound is not None:
                yield bound

    def needs(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def operators(self) -> frozenset[str]:
        """None: no operator makes it."""
        return frozenset()


@dataclass(frozen=True)
class Scalar(Pattern):
    """A floating-point constant of one element: this number, or a free one."""

    number: float | Free

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        tensor = scalar(value)
        if tensor is not None:
            bound = found.with_scalar(tensor).with_number(self.number, number_of(tensor))
            if bound is None:
                return
            if isinstance(self.number, Free) and self.number.name not in bound.values:
                bound = replace(bound, values={**bound.values, self.number.name: value})
            yield bound

    def needs(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def operators(self) -> frozenset[str]:
        """None: no operator makes it."""
        return frozenset()


@dataclass(frozen=True)
class Attribute:
    """A numeric attribute: what it must be, or where it goes, and what it is where a node does not tell."""

    number: float | Free
    default: float


@dataclass(frozen=True)
class Op(Pattern):
    """One operator, input by input; with `commutes` in any order of the inputs. Attributes not named must be absent."""

    op_type: str
    inputs: tuple[Pattern, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    commutes: bool = False

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        node = computed_by(value, self.op_type)
        if node is None or set(node.attributes) - set(self.attributes) or len(node.outputs) != 1:
            return
        inputs = [v for v in node.inputs if v is not None]
        if len(inputs) != len(self.inputs) or len(node.inputs) != len(inputs):
            return
        start: Found | None = found.with_node(node)
        for name, wanted in self.attributes.items():
            start = start and start.with_number(wanted.number, number_attribute(node, name, wanted.default))
        if start is not None:
            for patterns in permutations(self.inputs) if self.commutes else (self.inputs,):
                yield from _each(patterns, inputs, start)

    def needs(self) -> frozenset[str]:
        """Its own, and those of what it reads."""
        return frozenset({self.op_type}).union(*(pattern.needs() for pattern in self.inputs))

    def operators(self) -> frozenset[str]:
        """Its own."""
        return frozenset({self.op_type})


@dataclass(frozen=True)
class CastTo(Pattern):
    """A Cast of `of`, to one type or to any."""

    of: Pattern
    to: ir.DataType | None = None

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        node = computed_by(value, "Cast")
        if node is None or node.inputs[0] is None:
            return
        if self.to is None or number_attribute(node, "to", 0) == self.to:
            yield from self.of.match(node.inputs[0], found.with_node(node))

    def needs(self) -> frozenset[str]:
        """Its own, and those of what it reads."""
        return frozenset({"Cast"}) | self.of.needs()

    def operators(self) -> frozenset[str]:
        """Cast."""
        return frozenset({"Cast"})


@dataclass(frozen=True)
class Reduce(Pattern):
    """A reduction that keeps its axes as axes of size 1; the same name stands for the same axes."""

    op_type: str
    of: Pattern
    axes: str = "axes"

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        node = computed_by(value, self.op_type)
        if node is None or node.inputs[0] is None or number_attribute(node, "keepdims", 1) != 1:
            return
        known, axes = reduced_axes(node)
        start = found.with_node(node).with_axes(self.axes, axes) if known else None
        if start is not None:
            yield from self.of.match(node.inputs[0], start)

    def needs(self) -> frozenset[str]:
        """Its own, and those of what it reads."""
        return frozenset({self.op_type}) | self.of.needs()

    def operators(self) -> frozenset[str]:
        """Its own."""
        return frozenset({self.op_type})


@dataclass(frozen=True)
class Either(Pattern):
    """One of several formulas for the same thing."""

    forms: tuple[Pattern, ...]

    def match(self, value: ir.Value, found: Found) -> Iterator[Found]:
        """See the class."""
        for form in self.forms:
            yield from form.match(value, found)

    def needs(self) -> frozenset[str]:
        """Those of every form."""
        return frozenset.intersection(*(form.needs() for form in self.forms))

    def operators(self) -> frozenset[str]:
        """Those of all forms."""
        return frozenset().union(*(form.operators() for form in self.forms))


def op(op_type: str, *inputs: Pattern | float, commutes: bool = False, **attributes: Attribute) -> Op:
    """A node of this operator; numbers among the inputs are scalar constants."""
    patterns = tuple(p if isinstance(p, Pattern) else Scalar(p) for p in inputs)
    return Op(op_type, patterns, attributes, commutes)


def either(*forms: Pattern) -> Pattern:
    """One of several formulas."""
    return Either(forms)


def _each(patterns: Sequence[Pattern], values: Sequence[ir.Value], found: Found) -> Iterator[Found]:
    """Every way in which the values are the patterns, one by one."""
    if not patterns:
        yield found
        return
    for further in patterns[0].match(values[0], found):
        yield from _each(patterns[1:], values[1:], further)
