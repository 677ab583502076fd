"""What it harms to remove the units of each family, one after the other.

The score `obs`: the rise of the squared error of every layer that reads the unit, once its other inputs compensate,
relative to the layer's signal (`graphopt.numerics.obs`), units going one by one with exact downdates. Where a unit ends
in something else than a linear layer, or in one too wide for a covariance matrix, its share of the power that arrives
there stands in. The other scores are in `graphopt.pruning.scores`.

The errors of different layers do not weigh alike: what one layer gets wrong the next may absorb. So each family is
halved once in the dense model, the disturbance of the outputs is measured, and the family's curve is scaled to go
through that point. Data: moments are streamed, families in groups whose matrices fit into `MATRIX_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.rules import Sink
from graphopt.analysis.units import Coupling
from graphopt.calibration import Calibration, activations
from graphopt.numerics.moments import Moments
from graphopt.numerics.obs import Elimination
from graphopt.progress import Progress
from graphopt.pruning.families import Candidates, columns_of, rows_of
from graphopt.pruning.scores import norms_of_units
from graphopt.pruning.selection import Family
from graphopt.rewriting.layers import Layer, layers_of

Floats = npt.NDArray[np.float64]

WIDEST = 4096
"""Columns of a layer up to which its covariance matrix is kept (128 MiB in float64)."""

MATRIX_BYTES = 512 << 20

ROWS = 1 << 16
"""Observations per layer for ranking; more than 100 for each column of most layers."""

STEPS = 128
"""Removals between two rankings of one family: wider families go several units at a time."""

PROBES = 128
"""Samples on which disturbances of the outputs are measured."""


@dataclass(frozen=True)
class Setting:
    """Where and how importance is measured.

    Attributes:
        strengths: for products of two activations whose components were put in order (`graphopt.pruning.turning`),
            by node: the power of each component.
    """

    model: ir.Model
    coupling: Coupling
    layers: dict[str, Layer]
    calibration: Calibration
    samples: int | None
    threads: int
    progress: Progress
    strengths: Mapping[str, Floats] = field(default_factory=dict)


def by_reconstruction(setting: Setting, families: Sequence[Candidates]) -> tuple[list[Family], list[str]]:
    """Rank by the error left after compensation, scaled by what it does to the outputs; and notes for the report."""
    from graphopt.quantization.search.sensitivity import Reference

    reference = Reference(setting.model, setting.calibration, samples=PROBES, threads=setting.threads, optimize=True)
    found: dict[int, Family] = {}
    wide = sorted({k for f in families for k in f.layers if setting.layers[k].width > WIDEST})
    streamed, idle = _streamed(setting.model), list[str]()
    for part in _packs(setting, families):
        layers, powers = _moments(setting, [families[i] for i in part])
        for number in part:
            family = families[number]
            setting.progress.step("ranking units", len(found), len(families))
            order, harm, halved = _curve(setting, family, layers, powers)
            noise = reference.noise(_halved(setting, family, order, halved))
            middle = harm[len(order) // 2]
            factor = noise / middle if middle > 0 and np.isfinite(noise) else 1.0
            if noise == 0 and middle > 0 and any(s.value not in streamed for s in family.others):
                # A branch that the data never takes would be free to go: its weights speak for it instead.
                factor = 1.0
                idle.append(family.name)
            found[number] = Family(family.name, tuple(family.units[i] for i in order), harm * factor)
    notes = []
    if wide:
        names = ", ".join(setting.layers[k].label for k in wide[:3])
        notes.append(f"{len(wide)} layers have more than {WIDEST} inputs ({names}, ...): ranked by power, not by OBS")
    if idle:
        notes.append(
            f"warning: {len(idle)} families stand in bodies that the calibration data never runs "
            f"({', '.join(idle[:3])}{', ...' if len(idle) > 3 else ''}): ranked by weights; give data for every branch"
        )
    return [found[i] for i in range(len(families))], notes


# -- moments -----------------------------------------------------------------------------------------------------------


def _packs(setting: Setting, families: Sequence[Candidates]) -> Iterator[list[int]]:
    """Families whose layers' matrices fit into memory together."""
    part: list[int] = []
    held: set[str] = set()
    for number, family in enumerate(families):
        together = held | set(family.layers)
        if part and sum(_bytes(setting.layers[k]) for k in together) > MATRIX_BYTES:
            yield part
            part, together = [], set(family.layers)
        part.append(number)
        held = together
    if part:
        yield part


def _bytes(layer: Layer) -> int:
    return 8 * layer.groups * layer.width**2 if layer.width <= WIDEST else 0


@dataclass(frozen=True)
class _Seen:
    """Moments of the inputs of a layer, one a group."""

    layer: Layer
    covariance: list[Any]
    mean: list[Any]


def _moments(
    setting: Setting, families: Sequence[Candidates]
) -> tuple[dict[str, _Seen], dict[tuple[str, int], Floats]]:
    """Covariances at the layers that read these families; mean squares by channel at the other sinks."""
    keys = [k for k in setting.layers if any(k in f.layers for f in families)]
    narrow = [setting.layers[k] for k in keys if setting.layers[k].width <= WIDEST]
    points = {(s.value, s.axis) for f in families for s in _with_units(setting, f)}
    points |= {_power_point(setting.layers[k]) for k in keys if setting.layers[k].width > WIDEST}
    inside = {point for point in points if point[0] not in _streamed(setting.model)}
    full = {layer.key: [Moments(full=True) for _ in range(layer.groups)] for layer in narrow}
    power = {point: Moments() for point in sorted(points - inside)}
    names = [(layer.source, layer.output) for layer in narrow] + [(value,) for value, _ in power]
    total = setting.samples or setting.calibration.samples
    for batch in activations(setting.model, names, setting.calibration, limit=setting.samples, threads=setting.threads):
        for layer in narrow:
            x, y = batch.get(layer.source), batch.get(layer.output)
            if x is None or y is None:
                continue
            share = layer.positions(y) * _batches(total, x) / ROWS
            for group, moments in enumerate(full[layer.key]):
                for columns, _ in layer.columns(x, y, group, thin=max(1, int(share))):
                    moments.update(columns, axis=0)
        for (value, axis), moments in power.items():
            if value in batch:
                array = np.moveaxis(batch[value], axis, -1)
                moments.update(array.reshape(-1, array.shape[-1]))
    seen = {
        layer.key: _Seen(layer, [m.covariance for m in full[layer.key]], [m.mean for m in full[layer.key]])
        for layer in narrow
    }
    found = {point: np.asarray(m.second) for point, m in power.items()}
    return seen, found | (_unseen(setting.coupling, inside) if inside else {})


def _streamed(model: ir.Model) -> set[str | None]:
    """Tensors that can be looked at while the model runs: those of the main graph."""
    return {v.name for node in model.graph for v in node.outputs} | {v.name for v in model.graph.inputs}


def _unseen(coupling: Coupling, points: set[tuple[str, int]]) -> dict[tuple[str, int], Floats]:
    """For tensors in bodies of If, Loop and Scan: the weights of a position's units stand for its power."""
    weights = norms_of_units(coupling, absolute=False)
    return {
        (value, axis): np.sum([[weights.get(int(u), 0.0) for u in f] for f in coupling.axis_units(value, axis)], axis=0)
        for value, axis in points
    }


def _batches(total: int | None, x: npt.NDArray[Any]) -> float:
    return max(1.0, total / x.shape[0]) if total is not None and x.ndim and x.shape[0] else 1.0


def _power_point(layer: Layer) -> tuple[str, int]:
    return layer.source, layer.channel_axis(len(layer.linear.input.shape or (0, 0)))


# -- curves ------------------------------------------------------------------------------------------------------------

Halved = dict[str, tuple[Floats, Floats]]


def _curve(
    setting: Setting,
    family: Candidates,
    layers: dict[str, _Seen],
    powers: dict[tuple[str, int], Floats],
) -> tuple[list[int], Floats, Halved]:
    """Order of removal, harm of removing the first k, and the compensated weights when half are gone."""
    units = list(family.units)
    maps: list[tuple[str, int, Elimination]] = []
    for key in family.layers:
        if key in layers:
            seen = layers[key]
            weight = seen.layer.weight()
            for group, covariance in enumerate(seen.covariance):
                columns = columns_of(setting.coupling, seen.layer, group, units)
                own = rows_of(setting.coupling, seen.layer, group, units)
                maps.append((key, group, Elimination(covariance, weight[group], columns, own)))
    signals: dict[str, float] = {}
    for key, _, elimination in maps:
        signals[key] = signals.get(key, 0.0) + elimination.signal
    fixed = _power_shares(setting, family, powers)
    alive, order, steps = list(range(len(units))), list[int](), [0.0]
    stride = -(-len(units) // STEPS)
    halved: Halved = {}
    while alive:
        costs = fixed[alive]
        for key, _, elimination in maps:
            costs = costs + elimination.costs(alive) / (signals[key] or 1.0)
        half = len(units) // 2 - len(order)  # the half is a stop of its own
        chosen = np.argsort(costs, kind="stable")[: min(stride, half) if half > 0 else stride]
        order += [alive[int(p)] for p in chosen]
        steps += [float(c) for c in costs[chosen]]
        for _, _, elimination in maps:
            elimination.remove(*(alive[int(p)] for p in chosen))
        if len(order) == len(units) // 2:
            halved = _snapshot(layers, maps)
        gone = set(order)
        alive = [u for u in alive if u not in gone]
    return order, np.cumsum(steps), halved


def _power_shares(setting: Setting, family: Candidates, powers: dict[tuple[str, int], Floats]) -> Floats:
    """What each unit carries of the power that arrives where no layer reads it, summed over these places."""
    operands: dict[str, list[tuple[str, int]]] = {}
    for sink in _with_units(setting, family):
        operands.setdefault(sink.node, []).append((sink.value, sink.axis))
    carried: dict[tuple[str, int], Floats] = {}
    for node, points in operands.items():
        # of a product of two activations, a unit carries the product of what both of its factors carry
        power = setting.strengths.get(node)
        if power is None:
            power = np.prod([powers[p] for p in points], axis=0) if _alike(points, powers) else None
        carried.update({points[0]: power} if power is not None else {p: powers[p] for p in points})
    for key in family.layers:
        if setting.layers[key].width > WIDEST:
            point = _power_point(setting.layers[key])
            carried[point] = powers[point]
    shares = np.zeros(len(family.units))
    place = {u: i for i, u in enumerate(family.units)}
    for (value, axis), power in sorted(carried.items()):
        total = float(power.sum()) or 1.0
        for factor in setting.coupling.axis_units(value, axis):
            for position, unit in enumerate(factor):
                if int(unit) in place:
                    shares[place[int(unit)]] += float(power[position]) / total
    return shares


def _with_units(setting: Setting, family: Candidates) -> list[Sink]:
    """Sinks along whose axis units lie; those of weights inside fused operators are no activations and carry none."""
    return [sink for sink in family.others if setting.coupling.axis_units(sink.value, sink.axis)]


def _alike(points: Sequence[tuple[str, int]], powers: dict[tuple[str, int], Floats]) -> bool:
    return len({p for p, _ in points}) > 1 and len({len(powers[p]) for p in points}) == 1


def _snapshot(layers: dict[str, _Seen], maps: Sequence[tuple[str, int, Elimination]]) -> Halved:
    weights: dict[str, Floats] = {}
    shifts: dict[str, list[Floats]] = {}
    for key, group, elimination in maps:
        seen = layers[key]
        weights.setdefault(key, seen.layer.weight())
        before = weights[key][group].copy()
        weights[key][group] = elimination.weight
        shifts.setdefault(key, []).append((before - elimination.weight) @ seen.mean[group])
    return {
        key: (weight, layers[key].layer.bias() + np.concatenate(shifts[key]) * layers[key].layer.has_bias)
        for key, weight in weights.items()
    }


def _halved(setting: Setting, family: Candidates, order: Sequence[int], halved: Halved) -> ir.Model:
    """The dense model without the first half of a family: compensated layers, zeroed producers for other readers."""
    copy = setting.model.clone()
    layers, _ = layers_of(copy)
    for key, (weight, bias) in halved.items():
        layers[key].store(weight, bias)
    compensated = set(halved) >= set(family.layers) and not family.others
    if not compensated:
        silence(copy, setting.coupling, {family.units[i] for i in order[: len(order) // 2]})
    return copy


def silence(model: ir.Model, coupling: Coupling, units: set[int]) -> None:
    """Zero what produces units (filters, biases, scales), in place; shapes stay."""
    from graphopt.analysis.scope import initializers
    from graphopt.rewriting.constants import constant

    values = initializers(model)
    slices: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for unit in coupling.units:
        if unit.id in units:
            for member in unit.members:
                if member.role == "producer":
                    slices.setdefault(member.parameter, []).append((member.axis, member.indices))
    for name, cuts in slices.items():
        value = values.get(name)
        tensor = constant(value)
        if value is None or tensor is None:
            continue
        array = np.array(tensor.numpy())
        for axis, indices in cuts:
            np.moveaxis(array, axis, 0)[list(indices)] = 0
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=name)
