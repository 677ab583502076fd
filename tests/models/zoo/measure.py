"""What the analysis reaches of a network of the zoo, and its proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt.analysis import savings, shapes
from graphopt.analysis.certificate import Certificate, certify, spare_axes
from graphopt.analysis.cost import model_stats
from graphopt.analysis.units import Coupling, Unit, analyse
from zoo.architecture import Architecture
from zoo.export import exported


@cache
def analysed(architecture: Architecture, exporter: str, folder: Path) -> Coupling:
    """Export (or take from the cache in `folder`), load and analyse."""
    return analyse(graphopt.load(exported(architecture, exporter, folder)))


def families(coupling: Coupling) -> list[list[Unit]]:
    """Units whose members are slices of the same parameters along the same axes: the channels of one layer, say."""
    found: dict[frozenset[tuple[str, int]], list[Unit]] = defaultdict(list)
    for unit in coupling.units:
        found[frozenset((member.parameter, member.axis) for member in unit.members)].append(unit)
    return list(found.values())


def half(coupling: Coupling, seed: int) -> set[int]:
    """Half of the EXACT units of every family, at random; no axis is left empty."""
    random = np.random.default_rng(seed)
    dead: set[int] = set()
    for family in families(coupling):
        exact = [unit.id for unit in family if unit.exact]
        # A family of one unit is taken every other time.
        dead.update(random.permutation(exact)[: (len(exact) + int(random.integers(2))) // 2].tolist())
    return spare_axes(coupling, dead)


def proof(architecture: Architecture, coupling: Coupling, seed: int = 1) -> Certificate:
    """The certificate at half of all units, on inputs of the exported sizes and of others where these are dynamic."""
    feeds = [architecture.feeds(seed), architecture.feeds(seed + 1, other_sizes=True)]
    return certify(coupling.model, coupling, half(coupling, seed), feeds, seed)


def reach(coupling: Coupling, *, exact: bool = True) -> float:
    """Share of the parameters that belong to a unit."""
    return savings.parameters(coupling, exact=exact).reachable / max(1, model_stats(coupling.model).parameters)


def frozen_axes(coupling: Coupling, length: int) -> list[str]:
    """Parameter axes of some length with positions that no unit takes, and why; a line where there is no such axis."""
    free = {(use.parameter, axis) for use in coupling.uses for axis, f in use.axes.items() if _wholly(coupling, f)}
    axes = [(name, axis) for name, sizes in _parameters(coupling.model) for axis, n in enumerate(sizes) if n == length]
    if not axes:
        return [f"no parameter has an axis of length {length}"]
    reasons = {(frozen.tensor, frozen.axis): frozen.reason for frozen in coupling.frozen}
    return [
        f"{name} axis {axis}: {reasons.get((name, axis), 'no operator labels it')}"
        for name, axis in axes
        if (name, axis) not in free
    ]


def _wholly(coupling: Coupling, factors: tuple[np.ndarray, ...]) -> bool:
    vectors = coupling.solution.units(factors)
    return bool(vectors) and bool(np.logical_or.reduce([vector != 0 for vector in vectors]).all())


def _parameters(model: ir.Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Floating-point constants with at least one axis."""
    for value in model.graph.initializers.values():
        tensor = shapes.constant_tensor(value)
        if tensor is not None and tensor.dtype.is_floating_point() and value.uses():
            yield value.name or "", tuple(tensor.shape.numpy())
