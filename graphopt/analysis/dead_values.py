"""What a consumer sees where a unit died: zero, a known constant, or something unknown.

Computed along the labelled axes of every tensor by the `dead` methods of the operator rules, twice over: if the unit's
producers were zeroed (which units are exact?), and with the parameters as they are (which are dead already?).

A position may carry several units, a head and a place within heads, and which of them died makes a difference: a copy
of a key that is not read is no zero, a key that died is. Units are therefore given *colours*, so that no position
carries two of one colour, and the hypothetical question is asked colour by colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.labels import Axes, Factors, Solution, Vector
from graphopt.analysis.rules import Use, node_key, rule_for

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass
class DeadValues:
    """The value at each position of a labelled axis if that position's unit were dead; NaN where it is unknown.

    Attributes:
        labels: labels of activations, by tensor.
        solution: units of labels.
        uses: uses of parameters, by node and operand.
        hypothetical: True: producers of the unit are taken as zeroed (which units are zero-invariant?). False:
            parameters as they are (which units are dead already?).
        colours: (units + 1,), which units are asked about together.
        colour: the one that is being asked about.
    """

    labels: Mapping[str, Axes]
    solution: Solution
    uses: Mapping[tuple[str, int], Use]
    hypothetical: bool
    colours: Vector
    colour: int = 0
    _values: dict[int, dict[tuple[str, int], Floats]] = field(default_factory=dict)
    _live: dict[tuple[int, str, int], Mask] = field(default_factory=dict)

    def every_colour(self) -> Iterator[int]:
        """Ask about one colour after the other: `values` and all that reads and sets them follow."""
        for colour in range(int(self.colours.max(initial=0)) + 1):
            self.colour = colour
            yield colour

    @property
    def values(self) -> dict[tuple[str, int], Floats]:
        """What is known so far, by tensor and axis, for units of the current colour."""
        return self._values.setdefault(self.colour, {})

    def asked(self, factors: Factors) -> Mask:
        """Which positions of an axis are asked about: those that carry a unit of the current colour, or all."""
        asked = np.full(len(factors[0]), not self.hypothetical)
        for units in self.solution.units(factors) if self.hypothetical else ():
            asked |= (units != 0) & (self.colours[units] == self.colour)
        return asked

    def _asked(self, name: str, axis: int) -> Mask:
        key = (self.colour, name, axis)
        if key not in self._live:
            self._live[key] = self.asked(self.labels[name][axis])
        return self._live[key]

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

    def axes(self, value: ir.Value | None) -> list[int]:
        """Labelled axes of a value of which anything is asked."""
        name = value.name or "" if value is not None else ""
        return [axis for axis in self.labels.get(name, ()) if self._asked(name, axis).any()]

    def operand_axes(self, node: ir.Node, index: int) -> list[int]:
        """Such axes of an operand, parameter or activation."""
        use = self.uses.get((node_key(node), index))
        if use is None:
            return self.axes(node.inputs[index])
        return [axis for axis, factors in use.axes.items() if self.asked(factors).any()]

    def held(self, value: ir.Value, axis: int, dead: Mask) -> Floats:
        """What positions of an axis hold where units died.

        Args:
            value: a computed tensor.
            axis: one of its axes.
            dead: (units + 1,), the units that died.

        Returns:
            One number a position; NaN where it is unknown or infinite. Of several dead units of a position the first
            known is told: what follows from one of them follows whatever else dies.
        """
        factors = self.solution.units(self.labels[value.name or ""][axis])
        result = np.full(self.size(value, axis), np.nan)
        for colour in self.every_colour():
            found = self.of(value, axis)
            if found is None:
                continue
            mine = [dead[f] & ((self.colours[f] == colour) | (not self.hypothetical)) for f in factors]
            known = np.logical_or.reduce(mine) & np.isfinite(found)
            result = np.where(np.isnan(result) & known, found, result)
        return result

    def of(self, value: ir.Value, axis: int) -> Floats | None:
        """Dead values along an axis of a computed tensor; None where nothing is known."""
        return self.values.get((value.name or "", axis))

    def set(self, value: ir.Value, axis: int, dead: Floats) -> None:
        """Record dead values of an output: what its type overflows at is infinite, a fraction in integers unknown."""
        largest = _LARGEST_HALF if value.dtype == ir.DataType.FLOAT16 else _LARGEST
        holds = ~np.isnan(dead)
        dead = np.where(np.abs(dead) > largest, np.copysign(np.inf, dead), dead)
        if value.dtype is not None and value.dtype.is_integer():
            holds &= np.isfinite(dead) & (dead == np.rint(dead))
        if self.hypothetical:
            holds &= self._asked(value.name or "", axis)
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
            return np.where(self.asked(use.axes[axis]), 0.0, np.nan)
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


def colours(rows: Iterable[Vector], count: int) -> Vector:
    """A colour for each unit, so that no row has two of one colour; greedy in the order of the units.

    Args:
        rows: arrays (n, degree) of unit ids, 0 = none.
        count: number of units.

    Returns:
        (count + 1,), from 0.
    """
    keys = [np.empty(0, dtype=np.int64)]
    for each in rows:
        for one in range(each.shape[1]):
            for other in range(one + 1, each.shape[1]):
                low, high = np.minimum(each[:, one], each[:, other]), np.maximum(each[:, one], each[:, other])
                keys.append(np.unique((high * (count + 1) + low)[(low != 0) & (low != high)]))
    found = np.unique(np.concatenate(keys))  # by the later unit, then the earlier one
    pairs = np.stack([found % (count + 1), found // (count + 1)], axis=1)
    result = np.zeros(count + 1, dtype=np.int64)
    later, starts, lengths = np.unique(pairs[:, 1], return_index=True, return_counts=True)
    for unit, start, end in zip(later, starts, starts + lengths, strict=True):
        taken = set(result[pairs[start:end, 0]].tolist())
        result[unit] = next(colour for colour in range(len(taken) + 1) if colour not in taken)
    return result


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
