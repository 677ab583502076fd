"""Ranges chosen by the error of what reads the tensor, not by the tensor's own.

A clipped value hurts as much as the weights that read it say, and errors of neighbouring values may cancel under a
kernel. So every candidate range of a tensor x is judged by the error it makes at the outputs of its readers, on thinned
calibration data, everything else in float:

    cost(range) = sum over readers of  sum (f(x^) - f(x))^2 / sum f(x)^2
        layer:   f(x^) - f(x) = W (columns of x^ - x)
        product: (A^ - A) B, B as calibration has it, and likewise for B
        sum:     x^ - x, beside the power of the sum
        others, and outputs of the integer part: x^ - x, beside the power of x

Candidates are the ranges of all rules and steps around that of least squared error. Tensors are judged one by one, so
that the number of candidates adds up instead of multiplying; whether the choices together are good, the caller measures
on the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.calibration import Calibration
from graphopt.data.activations import activations
from graphopt.numerics.histogram import Histogram
from graphopt.numerics.ranges import minmax_range, mse_range
from graphopt.numerics.rounding import Affine, Grid, affine
from graphopt.progress import Progress
from graphopt.quantization.static.plan import Plan, Unit, name_of
from graphopt.quantization.static.rules import Kind
from graphopt.rewriting.layers import Layer, layers_of

Array = NDArray[Any]

STEPS = (0.5, 0.6, 0.7, 0.84, 1.19, 1.41)
"""Multiples of the range of least squared error that are candidates too, as far as the data reaches."""

SAMPLES = 32
POSITIONS = 2048
"""Positions of each layer on which candidates are compared; taken from all SAMPLES."""


def candidates(histogram: Histogram, rules: Sequence[Affine], grid: Grid) -> list[Affine]:
    """The distinct ranges worth comparing for one tensor: those of the rules first, then steps around the mse range."""
    low, high = minmax_range(histogram)
    a, b = mse_range(histogram, grid)
    stepped = [affine(max(low, a * step), min(high, b * step), grid) for step in STEPS]
    return list({(float(p.scale), int(p.zero_point)): p for p in (*rules, *stepped)}.values())


@dataclass(frozen=True)
class Reader:
    """One node that reads a tensor as integers.

    Attributes:
        tensor: what it reads.
        root: the tensor whose range that has.
        output: the node's first output in the float model.
        layer: the node as a product with constant weights.
        other: the second operand of a product of two activations.
        left: whether `tensor` is the first operand of that.
        adds: whether it is one of several summands.
    """

    tensor: str
    root: str
    output: str
    layer: Layer | None = None
    other: str | None = None
    left: bool = True
    adds: bool = False


def searched(
    model: ir.Model, chosen: Plan, trials: Mapping[str, Sequence[Affine]], calibration: Calibration, *,
    threads: int, progress: Progress,
) -> dict[str, Affine]:  # fmt: skip
    """The candidate of least cost for every tensor (see the module's head).

    Args:
        model: in float.
        chosen: what is to work on integers.
        trials: candidates by tensor.
        calibration: the data.
        threads: of the runtime.
        progress: told of every batch.
    """
    readers = [r for r in _readers(model, chosen) if r.root in trials]
    errors = [np.zeros(len(trials[reader.root])) for reader in readers]
    powers = [0.0] * len(readers)
    samples = min(SAMPLES, calibration.samples or SAMPLES)
    names = [tuple(dict.fromkeys(n for n in (r.tensor, r.output, r.other) if n)) for r in readers]
    for count, batch in enumerate(activations(model, names, calibration, limit=samples, threads=threads)):
        progress.step("range search", count)
        for index, (reader, wanted) in enumerate(zip(readers, names, strict=True)):
            if all(name in batch for name in wanted):
                found, power = _costs(reader, batch, trials[reader.root], samples)
                errors[index] += found
                powers[index] += power
    total = {root: np.zeros(len(of_root)) for root, of_root in trials.items()}
    for reader, error, power in zip(readers, errors, powers, strict=True):
        if power > 0:
            total[reader.root] += error / power
    return {root: trials[root][int(np.argmin(cost))] for root, cost in total.items()}


def _readers(model: ir.Model, chosen: Plan) -> list[Reader]:
    layers, _ = layers_of(model)
    nodes = {name_of(n.outputs[0]): n for n in model.graph if n.outputs and n.outputs[0].name}
    found: list[Reader] = []
    for key, unit in chosen.units.items():
        found += _reads(key, unit, nodes[key], layers.get(key), chosen)
        if unit.quantise_output and unit.rule.kind is not Kind.MOVE:
            found += [Reader(name, chosen.roots[name], name) for name in unit.carriers]
    return found


def _reads(key: str, unit: Unit, node: ir.Node, layer: Layer | None, chosen: Plan) -> list[Reader]:
    names = {index: name_of(node.inputs[index]) for index in unit.data}
    if unit.rule.kind is Kind.MOVE:
        return []
    if layer is not None:
        return [Reader(name, chosen.roots[name], key, layer) for name in names.values()]
    if unit.op_type == "MatMul" and len(names) == 2:
        return [
            Reader(names[i], chosen.roots[names[i]], key, other=names[1 - i], left=i == 0) for i in (0, 1)
        ]  # fmt: skip
    if unit.op_type == "Add":
        return [Reader(name, chosen.roots[name], key, adds=True) for name in names.values()]
    return []


def _costs(
    reader: Reader, batch: Mapping[str, Array], trials: Sequence[Affine], samples: int
) -> tuple[NDArray[np.float64], float]:
    """Squared errors of all candidates at one reader on one batch, and the power of its output."""
    x, y = np.asarray(batch[reader.tensor]), np.asarray(batch[reader.output])
    if x.size == 0:
        return np.zeros(len(trials)), 0.0
    errors, power = np.zeros(len(trials)), 0.0
    if reader.layer is not None:
        share = len(x) / samples if x.ndim else 1.0
        thin = max(1, int(reader.layer.positions(y) / (POSITIONS * share)))
        for group in range(reader.layer.groups):
            weight = reader.layer.weight()[group].astype(np.float32)
            for columns, rows in reader.layer.columns(x, y, group, thin):
                errors += [_power(weight @ _error(columns, params)) for params in trials]
                power += _power(rows)
    elif reader.other is not None:
        other = np.asarray(batch[reader.other])
        made = (_error(x, params) for params in trials)
        errors += [_power(error @ other if reader.left else other @ error) for error in made]
        power = _power(y)
    else:
        flat = x.reshape(-1)
        step = max(1, flat.size // (1 << 18))
        errors += [_power(_error(flat[::step], params)) for params in trials]
        power = _power(y.reshape(-1)[::step] if reader.adds else flat[::step])
    return errors, power


def _error(x: Array, params: Affine) -> NDArray[np.float32]:
    """Rounding and clipping error of each value."""
    info, scale, zero = np.iinfo(params.zero_point.dtype), params.scale, float(params.zero_point)
    steps = np.clip(np.rint(x / scale), np.float32(info.min - zero), np.float32(info.max - zero))
    return np.asarray(steps * scale - x, np.float32)


def _power(x: Array) -> float:
    return float(np.vdot(x, x)) if x.dtype == np.float64 else float(np.sum(np.square(x), dtype=np.float64))
