"""What a consumer sees where a unit died: zero, a known constant, or something unknown.

Computed along the labelled axes of every tensor by the `dead` methods of the operator rules, twice over: if the unit's
producers were zeroed (which units are exact?), and with the parameters as they are (which are dead already?).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.labels import Axes
from graphopt.analysis.rules import Use, node_key, rule_for

Floats = npt.NDArray[np.float64]


@dataclass
class DeadValues:
    """The value at each position of a labelled axis if that position's unit were dead; NaN where it is unknown.

    Attributes:
        hypothetical: True: producers of the unit are taken as zeroed (which units are zero-invariant?). False:
            parameters as they are (which units are dead already?).
    """

    labels: dict[str, Axes]
    hypothetical: bool
    uses: dict[tuple[str, int], Use]
    values: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def walk(self, graph: ir.Graph) -> None:
        """Tell the dead values of all results in a graph, in its order; what was known of them is forgotten."""
        for node in graph:
            for value in node.outputs:
                for axis in self.axes(value):
                    self.values.pop((value.name or "", axis), None)
            handler = rule_for(node)
            if handler is not None:
                handler.dead(node, self)

    def size(self, value: ir.Value, axis: int) -> int:
        """Number of positions of a labelled axis."""
        return len(self.labels[value.name or ""][axis][0])

    def axes(self, value: ir.Value | None) -> Iterable[int]:
        """Labelled axes of a value."""
        return self.labels.get(value.name or "", {}) if value is not None else ()

    def operand_axes(self, node: ir.Node, index: int) -> Iterable[int]:
        """Labelled axes of an operand, parameter or activation."""
        use = self.uses.get((node_key(node), index))
        return use.axes if use is not None else self.axes(node.inputs[index])

    def of(self, value: ir.Value, axis: int) -> Floats | None:
        """Dead values along an axis of a computed tensor; None where nothing is known."""
        return self.values.get((value.name or "", axis))

    def set(self, value: ir.Value, axis: int, dead: Floats) -> None:
        """Record dead values of an output; what its type cannot hold (infinity, fractions) counts as unknown."""
        largest = _LARGEST_HALF if value.dtype == ir.DataType.FLOAT16 else _LARGEST
        holds = np.abs(dead) <= largest
        if value.dtype is not None and value.dtype.is_integer():
            holds &= dead == np.rint(dead)
        self.values[value.name or "", axis] = np.where(holds, dead, np.nan)

    def operand(self, node: ir.Node, index: int, axis: int) -> Floats | None:
        """Dead values of an operand along an axis, parameters included: 0 for a producer, else the slice's constant."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        sizes = shapes.sizes(value)
        if sizes is None:
            return self.of(value, axis)
        use = self.uses.get((node_key(node), index))
        if self.hypothetical and use is not None and self._zeroed(use, value, axis):
            return np.zeros(sizes[axis])
        array = shapes.constant(value)
        assert array is not None
        if not _numeric(array) or not array.size:
            return None
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
        uniform = (rows == rows[:, :1]).all(axis=1)
        return np.where(uniform, rows[:, 0], np.nan)

    def _zeroed(self, use: Use, value: ir.Value, axis: int) -> bool:
        """Whether zeroing a unit zeroes this slice: a tied parameter that is a producer anywhere is zero everywhere."""
        if use.roles.get(axis) == "producer":
            return True
        return (use.parameter, axis) in self._tied_producers and shapes.is_tied(value)

    @cached_property
    def _tied_producers(self) -> frozenset[tuple[str, int]]:
        return frozenset(
            (u.parameter, axis) for u in self.uses.values() for axis, role in u.roles.items() if role == "producer"
        )


_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_HALF = float(np.finfo(np.float16).max)


def _numeric(array: npt.NDArray[np.generic]) -> bool:
    return array.dtype.kind in "fiub" or array.dtype.name == "bfloat16"


def elementwise_value(node: ir.Node, index: int, output: ir.Value, axis: int, d: DeadValues) -> Floats:
    """Dead values that an operand brings to an axis of a broadcast result; NaN where unknown."""
    value = node.inputs[index]
    assert value is not None
    size = d.size(output, axis)
    unknown = np.full(size, np.nan)
    shape, rank = shapes.dims(value), len(shapes.dims(output) or ())
    if shape is None:
        return unknown
    own = axis - rank + len(shape)
    if own >= 0 and shape[own] != 1:
        found = d.operand(node, index, own)
        return unknown if found is None or len(found) != size else found
    array = shapes.constant(value)
    if array is None or array.size == 0 or not _numeric(array) or not (array == array.ravel()[0]).all():
        return unknown
    return np.full(size, float(array.ravel()[0]))
