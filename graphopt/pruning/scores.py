"""Scores that look at weights or activations alone, without asking what a refit could repair.

l2      sum of the squares of a unit's slices
l1      sum of their absolute values
lamp    its squares over those of all units of the family that are no smaller (Lee et al., arXiv:2010.07611): what is
        small among small ones counts, so families compare without tuning
fpgm    sum of the distances of its filter to the others of the family: the filters near the geometric median are the
        ones that the others can replace (He et al., arXiv:1811.00250)
flap    how much its readers' outputs fluctuate with it: sum over readers of |W_:c|^2 Var x_c, relative to the sum over
        all channels (An et al., FLAP, arXiv:2312.11983); the mean goes into the bias
random  any order

All but lamp are relative to the family's total, so that harm runs from 0 to 1 in every family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.scope import values_by_name
from graphopt.analysis.survivors import Survivors
from graphopt.analysis.units import Coupling
from graphopt.calibration import Calibration, activations
from graphopt.numerics.moments import Moments
from graphopt.pruning.families import Candidates, columns_of
from graphopt.pruning.selection import Family
from graphopt.rewriting.layers import Layer

Floats = npt.NDArray[np.float64]

ONE_SCALE = ("obs", "taylor")
"""Scores whose harms add up in one scale, however units are grouped into families."""

CHUNK = 256
"""Filters whose distances to all others are held at once."""


def by_weight(coupling: Coupling, families: Sequence[Candidates], score: str = "l2") -> list[Family]:
    """Rank by weights; harm is the share of the family's total that goes, or with lamp the sum of the scores.

    Args:
        coupling: of the model.
        families: candidates.
        score: "l2", "l1", "lamp" or "fpgm".
    """
    if score == "fpgm":
        return [ranked(f, _distances(coupling, f)) for f in families]
    power = norms_of_units(coupling, absolute=score == "l1")
    found = []
    for family in families:
        values = np.array([power[u] for u in family.units])
        found.append(ranked(family, _lamp(values), total=1.0) if score == "lamp" else ranked(family, values))
    return found


def by_fluctuation(
    model: ir.Model,
    coupling: Coupling,
    layers: Mapping[str, Layer],
    families: Sequence[Candidates],
    calibration: Calibration,
    *,
    samples: int | None,
    threads: int,
) -> list[Family]:
    """Rank by flap; a place that is no linear layer counts by the variance that arrives there."""
    readers = [layers[k] for k in dict.fromkeys(k for f in families for k in f.layers)]
    points = dict.fromkeys((s.value, s.axis) for f in families for s in f.others)
    inputs = {(r.source, r.channel_axis(len(r.linear.input.shape or (0, 0)))): Moments() for r in readers}
    moments = {**inputs, **{p: Moments() for p in points if p not in inputs}}
    for batch in activations(model, [v for v, _ in moments], calibration, limit=samples, threads=threads):
        for (value, axis), each in moments.items():
            if value in batch:
                rows = np.moveaxis(batch[value], axis, -1)
                each.update(rows.reshape(-1, rows.shape[-1]))
    variance = {point: np.asarray(each.variance, dtype=np.float64) for point, each in moments.items()}
    found = []
    for family in families:
        shares = np.zeros(len(family.units))
        for layer in (layers[k] for k in family.layers):
            point = (layer.source, layer.channel_axis(len(layer.linear.input.shape or (0, 0))))
            shares += _fluctuation(coupling, layer, family, variance[point])
        for sink in family.others:
            spread = variance[sink.value, sink.axis]
            for factor in coupling.axis_units(sink.value, sink.axis):
                each_unit = np.array([spread[factor == unit].sum() for unit in family.units])
                shares += each_unit / (float(spread.sum()) or 1.0)
        found.append(ranked(family, shares))
    return found


def by_value(families: Sequence[Candidates], values: Mapping[int, float]) -> list[Family]:
    """Rank by scores made elsewhere, of one scale for all families: harm is their sum.

    Args:
        families: candidates.
        values: by unit; not negative.
    """
    return [ranked(f, np.array([values[u] for u in f.units]), total=1.0) for f in families]


def at_random(families: Sequence[Candidates], seed: int) -> list[Family]:
    """Any order; every unit of a family harms alike."""
    rng = np.random.default_rng(seed)
    found = []
    for family in families:
        order = rng.permutation(len(family.units))
        harm = np.arange(len(order) + 1) / max(1, len(order))
        found.append(Family(family.name, tuple(family.units[i] for i in order), harm))
    return found


def ranked(family: Candidates, values: Floats, total: float | None = None) -> Family:
    """A family in ascending order of these values.

    Args:
        family: candidates.
        values: one a unit, not negative.
        total: what the harm is divided by; None: the sum of the values.
    """
    order = np.argsort(values, kind="stable")
    harm = np.concatenate([[0.0], np.cumsum(values[order])])
    whole = total if total is not None else float(harm[-1]) or 1.0
    return Family(family.name, tuple(family.units[i] for i in order), harm / whole)


def norms_of_units(coupling: Coupling, *, absolute: bool) -> dict[int, float]:
    """Sum of squares, or of absolute values, of all slices of each unit."""
    values = values_by_name(coupling.model)
    sums: dict[tuple[str, int], Floats] = {}
    found: dict[int, float] = {}
    for unit in coupling.units:
        total = 0.0
        for member in unit.members:
            key = (member.parameter, member.axis)
            if key not in sums:
                array = shapes.constant(values.get(member.parameter))
                flat = np.zeros((1, 0)) if array is None else np.moveaxis(array, member.axis, 0)
                flat = flat.reshape(len(flat), -1).astype(np.float64)
                sums[key] = (np.abs(flat) if absolute else np.square(flat)).sum(axis=1)
            total += float(sums[key][list(member.indices)].sum()) if sums[key].size else 0.0
        found[unit.id] = total
    return found


def weight_share(coupling: Coupling, dead: Iterable[int]) -> float:
    """Sum over the parameters of the share of their squares that goes: a harm whatever the families are."""
    gone = Survivors(coupling, set(dead))
    values, total = values_by_name(coupling.model), 0.0
    for name in dict.fromkeys(use.parameter for use in coupling.uses):
        array = shapes.constant(values.get(name))
        if array is None or array.dtype.kind != "f":
            continue
        power = np.square(array.astype(np.float64))
        left = power
        for axis, factors in coupling.parameter_axes(name).items():
            alive = gone.staying(factors)
            left = left if alive is None else np.compress(alive, left, axis)
        whole = float(power.sum())
        total += 1.0 - float(left.sum()) / whole if whole else 0.0
    return total


def _lamp(power: Floats) -> Floats:
    order = np.argsort(power, kind="stable")
    above = np.cumsum(power[order][::-1])[::-1]
    found = np.empty_like(power)
    found[order] = power[order] / np.where(above > 0, above, 1.0)
    return found


def _distances(coupling: Coupling, family: Candidates) -> Floats:
    """Sum of the distances of each unit's filter to those of the others; filters are what produces a unit."""
    values = values_by_name(coupling.model)
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    rows: list[Floats] = []
    for number in family.units:
        parts = [np.zeros(0)]
        for member in coupling.units[number - 1].members:
            if member.role != "producer":
                continue
            if member.parameter not in arrays:
                array = shapes.constant(values.get(member.parameter))
                arrays[member.parameter] = np.zeros(0) if array is None else array
            if arrays[member.parameter].size:
                part = np.take(arrays[member.parameter], member.indices, axis=member.axis)
                parts.append(np.moveaxis(part, member.axis, 0).astype(np.float64).ravel())
        rows.append(np.concatenate(parts))
    filters = np.zeros((len(rows), max(map(len, rows), default=0)))
    for place, row in enumerate(rows):
        filters[place, : len(row)] = row
    squares = np.square(filters).sum(axis=1)
    found = []
    for start in range(0, len(filters), CHUNK):
        chunk = slice(start, start + CHUNK)
        apart = squares[chunk, None] + squares[None, :] - 2 * filters[chunk] @ filters.T
        found.append(np.sqrt(np.maximum(apart, 0.0)).sum(axis=1))
    return np.concatenate(found) if found else np.zeros(0)


def _fluctuation(coupling: Coupling, layer: Layer, family: Candidates, variance: Floats) -> Floats:
    """Share of each unit in sum_c |W_:c|^2 Var x_c of one layer."""
    weight = layer.weight()
    per_group = layer.linear.inputs // layer.groups
    units = np.zeros(len(family.units))
    whole = 0.0
    for group in range(layer.groups):
        spread = np.repeat(variance[group * per_group : (group + 1) * per_group], layer.kernel)
        power = np.square(weight[group]).sum(axis=0) * spread
        whole += float(power.sum())
        units += [float(power[c].sum()) for c in columns_of(coupling, layer, group, family.units)]
    return units / (whole or 1.0)
