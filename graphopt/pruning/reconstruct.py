"""Refit the linear layers of a network without its dead units, front to back, to what the dense network computes.

For a layer with input x in the pruned network (errors of earlier layers included) and K the inputs that stay,

    W' = (C_tx,K + lam W_K)(S_KK + lam I)^-1,    b' = mean_t - W' mean_x,K        (`graphopt.numerics.least_squares`)

with the moments streamed over the calibration data; x and t are never kept. What the target t is:

- the layer's output y in the dense network, where that is read as it is;
- where y only enters a sum, the sum: t = sum_dense - (sum_pruned - y_pruned), so a layer also repairs what arrives on
  the other branch of a residual connection, if that branch is final by then;
- where the result only enters a Relu, what lies below zero is free: t stays where t_dense > 0, elsewhere it is the
  smaller of 0 and the present output. With p the present output this majorises |relu(p) - relu(t)|^2, so each such
  refit lowers it (Zhang et al., "Accelerating Very Deep Convolutional Networks", arXiv:1505.06798, section 3.2, use
  the same idea). Used where the layer keeps all inputs, so that the present output means something.

The network keeps its shapes meanwhile: dead inputs have zero columns. Where one layer alone reads a family, its dead
units are chosen anew when that layer is reached, on what really arrives there; their number stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.units import Coupling
from graphopt.calibration import Calibration
from graphopt.numerics.least_squares import Sample, fit, solve
from graphopt.numerics.moments import Moments
from graphopt.numerics.obs import Elimination
from graphopt.progress import Progress
from graphopt.pruning.blockwise import Block, Descent, block_before
from graphopt.pruning.families import Candidates, alive_channels, columns_of, rows_of
from graphopt.pruning.targets import Target, target_of
from graphopt.pruning.walk import Walk
from graphopt.rewriting.layers import Layer, layers_of

ROWS = 1 << 18
"""Observations per layer; regularly thinned where there are more."""

DESCENT_STEPS = 4
"""Steps of the first layer of a block; the second one is refitted after each."""

DESCENT_SAMPLES = 512
"""Samples on which these steps are computed."""

PARTS = 8
"""Batches at least, where there are as many samples: alternate ones are the halves of the validation."""


@dataclass
class Outcome:
    """What a reconstruction did.

    Attributes:
        dead: the units that are gone in the end.
        refitted: number of layers with new weights.
        rows: one line a layer for the report: error of the fit relative to the variance of its target. Layers that are
            fitted below a Relu have no line: what they miss there is no error.
        notes: sentences for the report.
    """

    dead: set[int]
    refitted: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to reconstruct and with what.

    Attributes:
        dense: the model as it was.
        model: the model to refit, in place: of the same nodes and shapes.
        coupling: analysis of the dense model.
        families: candidates.
        removed: ids of the units that go, by family.
        calibration: the data.
        mode: "ls": weights and biases; "mean": only biases, by the means of what goes.
        samples: how many at most; None: all.
        threads: of the runtime.
        progress: told of every layer.
        reselect: choose dead units anew where one layer alone reads their family.
        sweeps: how often; from the second on, all refits know where a Relu forgives.
        blockwise: move layers before a cut as well (`graphopt.pruning.blockwise`).
        touched: keys of layers to refit although nothing that they read has changed (`graphopt.pruning.branches`).
    """

    dense: ir.Model
    model: ir.Model
    coupling: Coupling
    families: Sequence[Candidates]
    removed: Sequence[Sequence[int]]
    calibration: Calibration
    mode: Literal["ls", "mean"]
    samples: int | None
    threads: int
    progress: Progress
    reselect: bool = True
    touched: frozenset[str] = frozenset()
    sweeps: int = 1
    blockwise: bool = False


def reconstruct(plan: Plan) -> Outcome:
    """Refit every layer that what was removed can have disturbed.

    Returns:
        The dead units and what happened. `plan.model` then has zero columns where they are read and is ready for
        `graphopt.analysis.remove.remove_units`.
    """
    outcome = Outcome({u for units in plan.removed for u in units})
    layers, refused = layers_of(plan.model)
    reached = _disturbed(plan.model, plan.coupling, outcome.dead, plan.touched)
    work = [layer for layer in layers.values() if layer.linear.node in reached]
    nodes = {node.outputs[0].name: node for node in plan.dense.graph if node.outputs}
    for sweep in range(plan.sweeps):
        outcome.refitted, outcome.rows = 0, []
        before, after = (
            Walk(m, plan.calibration, limit=plan.samples, batch_size=_batch_size(plan), threads=plan.threads)
            for m in (plan.dense, plan.model)
        )
        for number, layer in enumerate(work):
            plan.progress.step("reconstructing layers", sweep * len(work) + number, plan.sweeps * len(work))
            target = target_of(layer, {k.linear.node for k in work[number + 1 :]})
            _refit(plan, layer, target, before, after, outcome, again=sweep > 0)
            _pass_by(layer, nodes, before, after)
    if plan.blockwise and plan.mode == "ls":
        _refine(plan, layers, work, nodes, outcome)
    missed = [(k, why) for k, why in refused.items() if nodes.get(k) is not None and _reads_dead(plan, k, outcome.dead)]
    outcome.notes += [f"{k} was only cut, not refitted: {why}" for k, why in missed]
    return outcome


def _pass_by(layer: Layer, nodes: Mapping[str | None, ir.Node], before: Walk, after: Walk) -> None:
    """Move both walks behind a layer."""
    last = layer.linear.add or layer.linear.node
    after.advance(last)
    before.advance(nodes[last.outputs[0].name])


def _refine(
    plan: Plan,
    layers: Mapping[str, Layer],
    work: Sequence[Layer],
    nodes: Mapping[str | None, ir.Node],
    outcome: Outcome,
) -> None:
    """One more sweep, in which layers before a cut move towards what the layer behind it wants."""
    size = _batch_size(plan)
    few = min(DESCENT_SAMPLES, plan.samples or DESCENT_SAMPLES)
    before, after = (Walk(m, plan.calibration, limit=plan.samples, batch_size=size) for m in (plan.dense, plan.model))
    goals, part = (Walk(m, plan.calibration, limit=few, batch_size=size) for m in (plan.dense, plan.model))
    blocks: dict[str, Block] = {}
    for layer in work:
        cut = not alive_channels(plan.coupling, layer, outcome.dead, outputs=False).all()
        block = block_before(layer, layers) if cut else None
        if block is not None:
            blocks[block.first.key] = block
    seconds = {block.second.key for block in blocks.values()}
    reached = [layer for layer in layers.values() if layer in work or layer.key in blocks]
    for number, layer in enumerate(reached):
        plan.progress.step("refining blocks", number, len(reached))
        block = blocks.get(layer.key)
        last = layer if block is None else block.second
        later = {k.linear.node for k in work[1 + work.index(last) :]} if last in work else set()
        target = target_of(last, later)
        if block is not None:
            outputs, inputs = (alive_channels(plan.coupling, layer, outcome.dead, outputs=o) for o in (True, False))
            descent = Descent(block, outputs, inputs, min(few, plan.calibration.samples or few))
            for _ in range(DESCENT_STEPS):
                descent.step(target.total, goals, part, target.relu)
                _refit(plan, last, target, before, after, outcome, again=True)
        elif layer.key not in seconds:
            _refit(plan, layer, target, before, after, outcome, again=True)
        _pass_by(layer, nodes, before, after)
        _pass_by(layer, nodes, goals, part)
    outcome.notes.append(f"{len(blocks)} blocks of two layers refined towards what they put out together")


def _batch_size(plan: Plan) -> int:
    """Few samples come in small batches, so that there are two halves to validate with."""
    samples = min(plan.samples or PARTS * plan.calibration.batch_size, plan.calibration.samples or 1 << 62)
    return max(1, min(plan.calibration.batch_size, samples // PARTS))


def _reads_dead(plan: Plan, key: str, dead: set[int]) -> bool:
    gone = np.fromiter(dead, dtype=np.int64, count=len(dead))
    return any(
        np.isin(vector, gone).any() for s in plan.coupling.sinks if s.node == key
        for vector in plan.coupling.axis_units(s.value, s.axis)
    )  # fmt: skip


def _disturbed(model: ir.Model, coupling: Coupling, dead: set[int], touched: frozenset[str]) -> set[ir.Node]:
    """Nodes that read a dead unit or the result of one that does; likewise those touched."""
    from graphopt.slicing import reads_of

    gone = np.fromiter(dead, dtype=np.int64, count=len(dead))
    changed: set[str] = set()
    for sink in coupling.sinks:
        if any(np.isin(vector, gone).any() for vector in coupling.axis_units(sink.value, sink.axis)):
            changed.add(sink.node)
    found: set[ir.Node] = set()
    for node in model.graph:
        own = any(v.name in changed or v.name in touched for v in node.outputs)
        fed = any(p in found for v in reads_of(node) if (p := v.producer()) is not None)
        if own or fed:
            found.add(node)
    return found


def _refit(
    plan: Plan, layer: Layer, target: Target, before: Walk, after: Walk, outcome: Outcome, *, again: bool
) -> None:
    alive = alive_channels(plan.coupling, layer, outcome.dead, outputs=False)
    rows = alive_channels(plan.coupling, layer, outcome.dead, outputs=True)
    own = _own_families(plan, layer) if plan.reselect and plan.mode == "ls" and not again else []
    fitted_before = again or bool(alive.all())
    halves = [[Moments(full=plan.mode == "ls") for _ in range(2)] for _ in range(layer.groups)]
    wanted = list(dict.fromkeys((layer.source, layer.output, target.total)))
    clamp = target.relu and fitted_before and plan.mode == "ls"
    total = plan.samples or plan.calibration.samples
    for number, (dense, now) in enumerate(zip(before.stream([target.total]), after.stream(wanted), strict=True)):
        x, y, goal = now[layer.source], now[layer.output], dense[target.total]
        present = now[target.total]
        if goal.shape != present.shape or present.shape != y.shape:
            outcome.notes.append(f"{layer.label} was only cut, not refitted: it feeds a sum that broadcasts")
            return
        if clamp:
            goal = np.where(goal > 0, goal, np.minimum(present, 0))
        t = goal if target.total == layer.output else goal - (present - y)
        batches = total / x.shape[0] if total and x.ndim and x.shape[0] else 1.0
        thin = max(1, int(layer.positions(y) * max(1.0, batches) / ROWS))
        for group in range(layer.groups):
            for columns, wants in layer.columns(x, t, group, thin):
                halves[group][number % 2].update(columns, wants, axis=0)
    samples = [_samples(pair, layer, full=plan.mode == "ls") for pair in halves]
    weight, bias = layer.weight(), layer.bias()
    if own:
        _choose_again(plan, layer, own, samples, weight, outcome)
        alive = alive_channels(plan.coupling, layer, outcome.dead, outputs=False)
    errors: list[float] = []
    ridges: list[float] = []
    for group, (everything, split) in enumerate(samples):
        per_in, per_out = layer.linear.inputs // layer.groups, layer.linear.outputs // layer.groups
        keep = np.flatnonzero(np.repeat(alive[group * per_in : (group + 1) * per_in], layer.kernel))
        live = np.flatnonzero(rows[group * per_out : (group + 1) * per_out])
        if not len(keep) or not len(live):
            continue
        old = weight[group]
        if plan.mode == "mean":
            new = old[:, keep]
            b = everything.mean_y - new @ everything.mean_x[keep]
        else:
            halved = None if split is None else (split[0].keep(keep), split[1].keep(keep))
            fitted = fit(everything.keep(keep), old[:, keep], halved)
            new, b = fitted.weight, fitted.bias
            ridges.append(fitted.ridge)
            errors.append(float(fitted.error[live].sum()) / max(float(everything.variance_y[live].sum()), 1e-30))
        fresh = np.zeros_like(old)
        fresh[:, keep] = new
        weight[group] = fresh
        if layer.has_bias:
            bias[group * per_out : (group + 1) * per_out] = b
    # what other operators than layers read must stay zero, as it will be missing
    silent = ~alive_channels(plan.coupling, layer, _read_elsewhere(plan), outputs=True)
    weight[silent.reshape(layer.groups, -1)] = 0
    bias[silent] = 0
    layer.store(weight, bias if layer.has_bias else np.zeros_like(bias))
    if errors and not clamp:
        row = {"layer": layer.label, "inputs kept": int(alive.sum()), "inputs": len(alive)}
        outcome.rows.append({**row, "relative error": float(np.mean(errors)), "ridge": float(np.max(ridges))})
    outcome.refitted += 1


def _read_elsewhere(plan: Plan) -> set[int]:
    """Dead units that something else than a layer reads as well."""
    return {u for f, units in zip(plan.families, plan.removed, strict=True) if f.others for u in units}


def _samples(pair: list[Moments], layer: Layer, *, full: bool) -> tuple[Sample, tuple[Sample, Sample] | None]:
    """Moments of the stream, whole and in halves; uncentred for a layer that cannot have a bias."""
    whole = Moments(full=full)
    for half in pair:
        whole.merge(half)
    split = (_sample(pair[0], layer, full), _sample(pair[1], layer, full)) if min(m.n for m in pair) > 0 else None
    return _sample(whole, layer, full), split


def _sample(m: Moments, layer: Layer, full: bool) -> Sample:
    mean_x, mean_y = np.asarray(m.mean), np.asarray(m.mean_y)
    covariance, cross = np.asarray(m.covariance) if full else np.zeros((0, 0)), np.asarray(m.cross)
    variance = np.asarray(m.variance_y)
    if layer.has_bias:
        return Sample(m.n, mean_x, mean_y, covariance, cross, variance)
    # y ~ W x without a bias: the raw second moments take the place of the centred ones
    if full:
        covariance = covariance + np.outer(mean_x, mean_x)
    cross = cross + np.outer(mean_y, mean_x)
    return Sample(m.n, np.zeros_like(mean_x), np.zeros_like(mean_y), covariance, cross, variance + mean_y**2)


def _own_families(plan: Plan, layer: Layer) -> list[int]:
    """Families with dead units that this layer alone reads."""
    return [
        i
        for i, f in enumerate(plan.families)
        if plan.removed[i] and f.layers == (layer.key,) and not f.others and layer.width <= len(f.units) * 4096
    ]


def _choose_again(
    plan: Plan,
    layer: Layer,
    own: Sequence[int],
    samples: Sequence[tuple[Sample, Any]],
    weight: npt.NDArray[np.float64],
    outcome: Outcome,
) -> None:
    """Choose which units of the layer's own families go, as many as before, by what arrives in the pruned network."""
    units = [u for i in own for u in plan.families[i].units]
    foreign = outcome.dead - set(units)
    maps = []
    for group, (sample, _) in enumerate(samples):
        best = solve(sample.covariance, sample.cross, weight[group], 1e-3)
        columns = columns_of(plan.coupling, layer, group, units)
        elimination = Elimination(
            sample.covariance, best, [*columns, _foreign(plan, layer, group, foreign)],
            [*rows_of(plan.coupling, layer, group, units), np.zeros(0, dtype=np.intp)],
        )  # fmt: skip
        elimination.remove(len(units))
        maps.append(elimination)
    outcome.dead.difference_update(units)
    offset = 0
    for i in own:
        count = len(plan.families[i].units)
        alive = list(range(offset, offset + count))
        for _ in range(len(plan.removed[i])):
            costs = sum((m.costs(alive) for m in maps), np.zeros(len(alive)))
            place = int(np.argmin(costs))
            unit = alive.pop(place)
            outcome.dead.add(units[unit])
            for m in maps:
                m.remove(unit)
        offset += count


def _foreign(plan: Plan, layer: Layer, group: int, dead: set[int]) -> npt.NDArray[np.intp]:
    """Columns of a group that other dead units take along."""
    per_group = layer.linear.inputs // layer.groups
    alive = alive_channels(plan.coupling, layer, dead, outputs=False)[group * per_group : (group + 1) * per_group]
    return np.flatnonzero(np.repeat(~alive, layer.kernel)).astype(np.intp)
