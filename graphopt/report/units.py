"""What of a model can be pruned and what cannot, in the form that people and scripts read; from `graphopt.analysis`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.report.data import Units
from graphopt.report.text import names

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.analysis.frozen import Frozen
    from graphopt.analysis.units import Coupling


@dataclass
class UnitGroup:
    """Units whose members are slices of the same parameters along the same axes: the channels of one layer, say.

    Attributes:
        mode: what kind of unit they are, see `graphopt.analysis.members.Mode`.
        members: "parameter axis n" of each.
        units: how many there are.
        exact: how many of them are exact to remove once zero.
        parameters: elements that they own, where each is removed alone.
        macs: multiply-accumulates that they cause, likewise.
        reasons: why some are not exact.
    """

    mode: str
    members: tuple[str, ...]
    units: int = 0
    exact: int = 0
    parameters: int = 0
    macs: int = 0
    reasons: list[str] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """A row of a table."""
        return {
            "units": self.units,
            "kind": self.mode.replace("_", " "),
            "exact": self.exact,
            "parameters": self.parameters,
            "MACs": self.macs,
            "members": names(self.members, 4),
            "why not exact": names(self.reasons, 2, 300),
        }


def summarise(model: ir.Model) -> Units:
    """Analyse a model and say in short what can be pruned. Shapes must have been inferred."""
    from graphopt.analysis.units import analyse

    return summary(model, analyse(model))


def summary(model: ir.Model, coupling: Coupling) -> Units:
    """What an analysis found, in short."""
    from graphopt.analysis import savings
    from graphopt.analysis.cost import model_stats

    stats = model_stats(model)
    found = Units(
        units=len(coupling.units),
        exact=sum(unit.exact for unit in coupling.units),
        parameters=stats.parameters,
        prunable_parameters=round(savings.parameters(coupling).reachable),
        exact_parameters=round(savings.parameters(coupling, exact=True).reachable),
        frozen=frozen_rows(coupling.frozen),
    )
    if stats.macs is not None:
        found.macs = stats.macs
        found.prunable_macs = round(savings.macs(coupling).reachable)
        found.exact_macs = round(savings.macs(coupling, exact=True).reachable)
    return found


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


def groups(coupling: Coupling) -> list[UnitGroup]:
    """The units by the parameters and axes they are slices of, those that save most first."""
    from graphopt.analysis import savings

    found: dict[tuple[str, tuple[str, ...]], UnitGroup] = {}
    parameters, macs = savings.parameters(coupling).alone, savings.macs(coupling).alone
    for unit in coupling.units:
        key = unit.mode, tuple(sorted(f"{member.parameter} axis {member.axis}" for member in unit.members))
        group = found.setdefault(key, UnitGroup(*key))
        group.units += 1
        group.exact += unit.exact
        group.parameters += round(parameters[unit.id])
        group.macs += round(macs[unit.id])
        if unit.reason and unit.reason not in group.reasons:
            group.reasons.append(unit.reason)
    return sorted(found.values(), key=lambda group: (-group.parameters, group.members))


def units_to_dicts(coupling: Coupling) -> list[dict[str, Any]]:
    """Every unit with its members and what it saves where it alone goes, for JSON."""
    from graphopt.analysis import savings

    parameters, macs = savings.parameters(coupling).alone, savings.macs(coupling).alone
    return [
        {
            "id": unit.id,
            "mode": unit.mode,
            "exact": unit.exact,
            "reason": unit.reason or None,
            "saves": {"parameters": round(parameters[unit.id]), "macs": round(macs[unit.id])},
            "members": [
                {"parameter": m.parameter, "axis": m.axis, "indices": list(m.indices), "role": m.role}
                for m in unit.members
            ],
        }
        for unit in coupling.units
    ]
