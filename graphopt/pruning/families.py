"""Families of units: those of one kind on the same axes of the same parameters, so that they compete with each other.

Also which linear layers read a family, and which of its units may be considered at all: units that some operator cannot
do without are left out, unless that operator is a layer whose weights are refitted afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from graphopt.analysis.members import Mode
from graphopt.analysis.rules import Sink
from graphopt.analysis.units import Coupling, Unit
from graphopt.rewriting.layers import Layer

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Candidates:
    """Units of one kind on the same axes of the same parameters.

    Attributes:
        name: the parameter axis that makes most of them, for messages.
        units: unit ids, ascending.
        layers: keys of the linear layers that read them, in graph order.
        others: sinks of other kinds.
    """

    name: str
    units: tuple[int, ...]
    layers: tuple[str, ...]
    others: tuple[Sink, ...]


def candidates(
    coupling: Coupling,
    layers: dict[str, Layer],
    exclude: Sequence[str],
    *,
    refitted: bool,
    fixed: Collection[Mode] = (),
) -> tuple[list[Candidates], list[str]]:
    """Group the units of a model.

    Args:
        coupling: the analysis.
        layers: linear layers by key.
        exclude: globs over names of parameters and nodes; a unit that has a part in one of them is left out.
        refitted: True: layers are refitted without the dead inputs, whatever these hold.
        fixed: kinds of units that are left out.

    Returns:
        Families in graph order, and a sentence for every reason for which units were left out and every exclusion that
        matches nothing.
    """
    barred = _excluded(coupling, exclude)
    unsafe = _unsafe(coupling, layers if refitted else {})
    groups: dict[tuple[Mode, frozenset[tuple[str, int]]], list[Unit]] = {}
    reasons: dict[str, int] = {}
    kinds: dict[Mode, int] = {}
    out = 0
    for unit in coupling.units:
        if unit.id in barred:
            out += 1
        elif unit.mode in fixed:
            kinds[unit.mode] = kinds.get(unit.mode, 0) + 1
        elif unit.id in unsafe:
            reasons[unsafe[unit.id]] = reasons.get(unsafe[unit.id], 0) + 1
        else:
            axes = frozenset((m.parameter, m.axis) for m in unit.members)
            groups.setdefault((unit.mode, axes), []).append(unit)
    notes = [f"{out} units excluded by {', '.join(exclude)}"] if out else []
    notes += [f"warning: exclude={glob} matches nothing" for glob in exclude if not _matches(coupling, [glob])]
    notes += [f"{count} units stay, because fixed={kind}" for kind, count in kinds.items()]
    notes += [f"{count} units left out, because removing them is not exact: {why}" for why, count in reasons.items()]
    reads = _readers(coupling, layers)
    families = []
    for units in groups.values():
        ids = tuple(u.id for u in units)
        keys = [k for k in layers if k in {r for i in ids for r in reads.get(i, ((), ()))[0]}]
        others = {s: None for i in ids for s in reads.get(i, ((), ()))[1]}
        families.append(Candidates(_name(units[0]), ids, tuple(keys), tuple(others)))
    return families, notes


def columns_of(coupling: Coupling, layer: Layer, group: int, units: Sequence[int]) -> list[Indices]:
    """For each unit the columns of one group of a layer that go with it."""
    axis = coupling.axis_units(layer.source, _input_axis(layer))
    per_group = layer.linear.inputs // layer.groups
    mine = [f[group * per_group : (group + 1) * per_group] for f in axis]
    offsets = np.arange(layer.kernel)
    found = []
    for unit in units:
        hit = np.logical_or.reduce([f == unit for f in mine]) if mine else np.zeros(0, dtype=bool)
        channels = np.flatnonzero(hit)
        found.append((channels[:, None] * layer.kernel + offsets).ravel().astype(np.intp))
    return found


def rows_of(coupling: Coupling, layer: Layer, group: int, units: Sequence[int]) -> list[Indices]:
    """For each unit the rows (outputs) of one group of a layer that go with it."""
    axis = coupling.axis_units(layer.output, _output_axis(layer))
    per_group = layer.linear.outputs // layer.groups
    mine = [f[group * per_group : (group + 1) * per_group] for f in axis]
    if not mine:
        return [np.zeros(0, dtype=np.intp) for _ in units]
    return [np.flatnonzero(np.logical_or.reduce([f == unit for f in mine])).astype(np.intp) for unit in units]


def alive_channels(coupling: Coupling, layer: Layer, dead: Collection[int], *, outputs: bool) -> npt.NDArray[np.bool_]:
    """Which input or output channels of a layer are left when `dead` is gone."""
    count = layer.linear.outputs if outputs else layer.linear.inputs
    name = layer.output if outputs else layer.source
    axis = _output_axis(layer) if outputs else _input_axis(layer)
    gone = np.fromiter(dead, dtype=np.int64, count=len(dead))
    alive = np.ones(count, dtype=bool)
    for factor in coupling.axis_units(name, axis):
        alive &= ~np.isin(factor, gone)
    return alive


def _input_axis(layer: Layer) -> int:
    return _axis(layer, len(layer.linear.input.shape or ()))


def _output_axis(layer: Layer) -> int:
    return _axis(layer, len(layer.linear.output.shape or ()))


def _axis(layer: Layer, rank: int) -> int:
    return layer.channel_axis(rank) if rank else 1


def _name(unit: Unit) -> str:
    producers = [m for m in unit.members if m.role == "producer"] or list(unit.members)
    return f"{producers[0].parameter}[axis {producers[0].axis}]"


def _readers(coupling: Coupling, layers: dict[str, Layer]) -> dict[int, tuple[list[str], list[Sink]]]:
    """For each unit the layers that read it and the other places where it ends."""
    reads: dict[int, tuple[list[str], list[Sink]]] = {}
    for sink in coupling.sinks:
        for unit in {int(u) for vector in coupling.ending(sink) for u in np.unique(vector)} - {0}:
            keys, others = reads.setdefault(unit, ([], []))
            if _read_by_layer(sink, layers):
                keys.append(sink.node)
            else:
                others.append(sink)
    return reads


def _read_by_layer(sink: Sink, layers: dict[str, Layer]) -> bool:
    layer = layers.get(sink.node)
    return layer is not None and layer.source == sink.value


def _unsafe(coupling: Coupling, layers: dict[str, Layer]) -> dict[int, str]:
    rest = [s for s in coupling.sinks if not _read_by_layer(s, layers)]
    return dataclasses.replace(coupling, sinks=rest).unsafe(coupling.dead_values(hypothetical=True))


def _names_of_nodes(coupling: Coupling) -> dict[str, str]:
    return {v.name or "": node.name or "" for node in coupling.model.graph.all_nodes() for v in node.outputs}


def _matches(coupling: Coupling, globs: Iterable[str]) -> set[str]:
    """Parameters that a glob names, by themselves or through a node that reads them."""
    nodes = _names_of_nodes(coupling)
    patterns = list(globs)
    return {
        use.parameter
        for use in coupling.uses
        if any(fnmatchcase(n, p) for p in patterns for n in (use.parameter, use.node, nodes.get(use.node, "")) if n)
    }


def _excluded(coupling: Coupling, exclude: Sequence[str]) -> set[int]:
    if not exclude:
        return set()
    parameters = _matches(coupling, exclude)
    return {u.id for u in coupling.units if any(m.parameter in parameters for m in u.members)}
