"""What a removal leaves of every axis of a model: the questions that rules ask before they rewrite a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import node_key

if TYPE_CHECKING:
    from graphopt.analysis.labels import Factors
    from graphopt.analysis.rules import Use
    from graphopt.analysis.units import Coupling

Mask = npt.NDArray[np.bool_]


class Survivors:
    """Which positions of every axis stay once some units are gone.

    Attributes:
        coupling: the analysis of the dense model.
        alive: by unit id whether it stays; entry 0, no unit at all, does.
        uses: every labelled use of a parameter, by node and operand.
    """

    def __init__(self, coupling: Coupling, dead: set[int]) -> None:
        self.coupling = coupling
        self.alive = np.ones(len(coupling.units) + 1, dtype=bool)
        self.alive[list(dead)] = False
        self.uses: dict[tuple[str, int], Use] = {(use.node, use.index): use for use in coupling.uses}

    def mask(self, value: ir.Value, axis: int) -> Mask | None:
        """Which positions of a computed value's axis stay; None where all do."""
        return self.staying(self.coupling.axis_units(value.name or "", axis))

    def shortened(self, value: ir.Value, axis: int) -> bool:
        """True where the axis loses positions."""
        return self.mask(value, axis) is not None

    def size(self, value: ir.Value, axis: int) -> int | None:
        """Size of an axis before the removal; None for a symbolic one."""
        shape = shapes.dims(value)
        found = shape[axis] if shape is not None else None
        return found if isinstance(found, int) else None

    def count(self, value: ir.Value, axis: int, default: int) -> int:
        """Size of an axis after the removal."""
        mask = self.mask(value, axis)
        return default if mask is None else int(mask.sum())

    def operand_mask(self, node: ir.Node, index: int, axis: int) -> Mask | None:
        """As `mask`, for an operand of a node, which may be a parameter."""
        use = self.uses.get((node_key(node), index))
        if use is not None:
            return self.use_mask(use, axis)
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.mask(value, axis)

    def use_mask(self, use: Use, axis: int) -> Mask | None:
        """As `mask`, for an axis of a parameter as one node uses it."""
        return self.staying(self.coupling.solution.units(use.axes.get(axis, ())))

    def operand_count(self, node: ir.Node, index: int, axis: int) -> int:
        """Size of an operand's axis after the removal; its shape must be known."""
        mask = self.operand_mask(node, index, axis)
        if mask is not None:
            return int(mask.sum())
        value = node.inputs[index]
        size = self.size(value, axis) if value is not None else None
        assert size is not None
        return size

    def operand_places(
        self, node: ir.Node, index: int, axis: int, positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where dense positions of an operand's axis are after the removal; removed ones are left out."""
        mask = self.operand_mask(node, index, axis)
        if mask is None:
            return positions
        return (np.cumsum(mask) - 1)[positions[mask[positions]]]

    def staying(self, factors: Factors) -> Mask | None:
        """Which positions of an axis stay, given the unit ids of each; None where all do."""
        if not factors:
            return None
        mask = np.logical_and.reduce([self.alive[vector] for vector in factors])
        return None if mask.all() else mask
