"""What of a model can be pruned and what cannot, in the form that people and scripts read; from `graphopt.analysis`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.report.data import Units
from graphopt.report.text import names

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.analysis.units import Coupling, Frozen, Unit


@dataclass
class UnitGroup:
    """Units whose members are slices of the same parameters along the same axes: the channels of one layer, say.

    Attributes:
        members: "parameter axis n" of each.
        units: how many there are.
        exact: how many of them are exact to remove once zero.
        parameters: elements that all of them own together, where a unit is removed alone.
        reasons: why some are not exact.
    """

    members: tuple[str, ...]
    units: int = 0
    exact: int = 0
    parameters: int = 0
    reasons: list[str] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """A row of a table."""
        return {
            "units": self.units,
            "exact": self.exact,
            "parameters": self.parameters,
            "members": names(self.members, 4),
            "why not exact": names(self.reasons, 2, 300),
        }


def summarise(model: ir.Model) -> Units:
    """Analyse a model and say in short what can be pruned. Shapes must have been inferred."""
    from graphopt.analysis.units import analyse

    return summary(model, analyse(model))


def summary(model: ir.Model, coupling: Coupling) -> Units:
    """What an analysis found, in short."""
    from graphopt.analysis.cost import model_stats

    return Units(
        units=len(coupling.units),
        exact=sum(unit.exact for unit in coupling.units),
        prunable_parameters=prunable_parameters(model, coupling),
        parameters=model_stats(model).parameters,
        frozen=frozen_rows(coupling.frozen),
    )


def prunable_parameters(model: ir.Model, coupling: Coupling) -> int:
    """Parameter elements that belong to at least one unit.

    An element stays iff none of its positions along labelled axes belongs to a unit, so of a parameter with sizes s_i,
    of which f_i positions are free of units, prod(s_i) - prod(f_i) elements can go.
    """
    import numpy as np

    free: dict[str, dict[int, Any]] = {}
    for use in coupling.uses:
        for axis, factors in use.axes.items():
            axes = free.setdefault(use.parameter, {})
            for vector in coupling.solution.units(factors):
                mask = np.asarray(vector) == 0
                axes[axis] = axes[axis] & mask if axis in axes else mask
    total = 0
    for name, shape in _shapes(model, free).items():
        every = left = 1
        for axis, size in enumerate(shape):
            every *= size
            left *= int(free[name][axis].sum()) if axis in free[name] else size
        total += every - left
    return total


def frozen_rows(frozen: Iterable[Frozen]) -> list[dict[str, Any]]:
    """Frozen axes by reason, the most positions first."""
    groups: dict[str, list[Frozen]] = {}
    for axis in frozen:
        groups.setdefault(axis.reason, []).append(axis)
    rows = [
        {
            "where": names((f"{axis.tensor} axis {axis.axis}" for axis in found), 3),
            "reason": reason,
            "units": sum(axis.positions for axis in found),
        }
        for reason, found in groups.items()
    ]
    return sorted(rows, key=lambda row: (-int(str(row["units"])), str(row["reason"])))


def groups(model: ir.Model, coupling: Coupling) -> list[UnitGroup]:
    """The units by the parameters and axes they are slices of, the largest first."""
    found: dict[tuple[str, ...], UnitGroup] = {}
    shapes = _shapes(model, {member.parameter for unit in coupling.units for member in unit.members})
    for unit in coupling.units:
        key = tuple(sorted(f"{member.parameter} axis {member.axis}" for member in unit.members))
        group = found.setdefault(key, UnitGroup(key))
        group.units += 1
        group.exact += unit.exact
        group.parameters += _elements(unit, shapes)
        if unit.reason and unit.reason not in group.reasons:
            group.reasons.append(unit.reason)
    return sorted(found.values(), key=lambda group: (-group.parameters, group.members))


def unit_to_dict(unit: Unit) -> dict[str, Any]:
    """A unit with all its members, for JSON."""
    return {
        "id": unit.id,
        "exact": unit.exact,
        "reason": unit.reason or None,
        "members": [
            {"parameter": m.parameter, "axis": m.axis, "indices": list(m.indices), "role": m.role} for m in unit.members
        ],
    }


def _elements(unit: Unit, shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements of parameters that go with a unit."""
    taken: dict[str, dict[int, set[int]]] = {}
    for member in unit.members:
        taken.setdefault(member.parameter, {}).setdefault(member.axis, set()).update(member.indices)
    total = 0
    for name, axes in taken.items():
        every = left = 1
        for axis, size in enumerate(shapes.get(name, ())):
            every *= size
            left *= size - len(axes.get(axis, ()))
        total += every - left
    return total


def _shapes(model: ir.Model, wanted: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters: initializers and outputs of Constant nodes."""
    from graphopt.analysis.shapes import constant_tensor

    known = dict(model.graph.initializers)
    for node in model.graph:
        if node.op_type == "Constant":
            known.setdefault(node.outputs[0].name or "", node.outputs[0])
    found: dict[str, tuple[int, ...]] = {}
    for name in wanted:
        tensor = constant_tensor(known[name]) if name in known else None
        if tensor is not None:
            found[name] = tuple(tensor.shape.numpy())
    return found
