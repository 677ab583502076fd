"""What a formula was found to be in a graph (`graphopt.rewriting.match`), and how its numbers are read and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.nodes import is_onnx

ULPS = 4.0
"""A number may be off by this many units in the last place of its type: each exporter rounds in its own way."""

_EPSILON = {ir.DataType.DOUBLE: 2.0**-52, ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}


@dataclass(frozen=True)
class Free:
    """A number that is found, not given. Where it is met again it must be the same."""

    name: str


@dataclass(frozen=True)
class Found:
    """A match, or the part of one that was matched so far; never changed in place.

    Attributes:
        values: tensors, by the names that the pattern gives them.
        numbers: scalar constants and numeric attributes, by name.
        axes: axes of reductions, by name, counted from 0 where the rank is known; None: all axes.
        nodes: what the pattern consists of.
        scalars: the scalar constants that were read.
    """

    values: Mapping[str, ir.Value] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    nodes: frozenset[ir.Node] = frozenset()
    scalars: tuple[ir.TensorProtocol, ...] = ()

    def with_node(self, node: ir.Node) -> Found:
        """This, and `node` belongs to it."""
        return Found(self.values, self.numbers, self.axes, self.nodes | {node}, self.scalars)

    def with_scalar(self, tensor: ir.TensorProtocol) -> Found:
        """This, and the scalar was read."""
        return Found(self.values, self.numbers, self.axes, self.nodes, (*self.scalars, tensor))

    def with_value(self, name: str, value: ir.Value) -> Found | None:
        """This with a tensor named; None where another tensor has the name."""
        known = self.values.get(name)
        if known is not None:
            return self if known is value else None
        return Found({**self.values, name: value}, self.numbers, self.axes, self.nodes, self.scalars)

    def with_number(self, wanted: float | Free, number: float) -> Found | None:
        """This, if `number` is the one that is wanted, or free and from now on known."""
        if isinstance(wanted, Free):
            if wanted.name not in self.numbers:
                return replace(self, numbers={**self.numbers, wanted.name: number})
            wanted = self.numbers[wanted.name]
        return self if self.close(number, wanted) else None

    def with_axes(self, name: str, axes: tuple[int, ...] | None) -> Found | None:
        """This with axes named; None where the name stands for other axes."""
        if name not in self.axes:
            return replace(self, axes={**self.axes, name: axes})
        return self if self.axes[name] == axes else None

    def close(self, number: float, wanted: float) -> bool:
        """Whether they are the same number up to the rounding of the coarsest type that a scalar came in."""
        return math.isclose(number, wanted, rel_tol=ULPS * max(map(_epsilon, self.scalars), default=2.0**-23))


def _epsilon(tensor: ir.TensorProtocol) -> float:
    """The distance from 1 to the next number of its type."""
    return _EPSILON.get(tensor.dtype, 2.0**-23)


def scalar(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The floating-point constant of one element that `value` holds; None where it is none."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return None
    return tensor


def number_of(tensor: ir.TensorProtocol) -> float:
    """The number that a constant of one element is."""
    return float(np.asarray(tensor.numpy()).reshape(()).astype(np.float64))


def computed_by(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The node that computes `value`, where it has one of these operators of the standard domain."""
    node = value.producer()
    return node if node is not None and is_onnx(node, *op_types) else None


def number_attribute(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute; NaN where a function's caller gives it."""
    found: Any = node.attributes.get(name)
    return float("nan") if found is not None and found.is_ref() else float(default if found is None else found.value)


def reduced_axes(node: ir.Node) -> tuple[bool, tuple[int, ...] | None]:
    """Over which axes a reduction runs: whether that is known, and the axes; None: over all."""
    given: Sequence[int] | None = None
    if "axes" in node.attributes:
        if node.attributes["axes"].is_ref():
            return False, None
        given = node.attributes["axes"].as_ints()
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        found = array(node.inputs[1])
        if found is None:
            return False, None
        given = [int(axis) for axis in found.ravel()]
    if not given:
        return number_attribute(node, "noop_with_empty_axes", 0) == 0, None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return True, tuple(sorted(given))
    return True, tuple(sorted(axis % len(shape) for axis in given))
