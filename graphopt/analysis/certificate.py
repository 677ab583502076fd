"""Proof by execution that units are what the analysis says.

For units that are EXACT: zero their producers in the dense model, remove the units in a copy, run both on random inputs
with perturbed normalisation statistics (fresh ones, mean 0 and variance 1, hide errors). The outputs must agree; a copy
pruned of *other* units must not, or the test had no power.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.remove import remove_units
from graphopt.analysis.scope import nodes_by_key
from graphopt.analysis.units import Coupling

TOLERANCE = 1e-5
"""Largest relative difference of a certificate (relative L2 norm per output, float32)."""


@dataclass(frozen=True)
class Certificate:
    """Outcome of one certificate.

    Attributes:
        units: how many units were zeroed and removed.
        difference: largest relative difference between the zeroed and the pruned model.
        effect: difference that zeroing makes to the dense model (0: the units did not matter to begin with).
        control: difference when other units are removed; None where there are not enough others.
    """

    units: int
    difference: float
    effect: float
    control: float | None

    @property
    def holds(self) -> bool:
        """The pruned model computes what the zeroed one does."""
        return self.difference <= TOLERANCE


class Distances:
    """Distances between models, relative to the size of the dense model's outputs.

    Zeroing can make an output tiny (a saturated sigmoid); measured against itself, rounding would look like an error.
    """

    def __init__(self, base: ir.Model, feeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
        self._feeds = feeds
        self._base = self._run(base)

    def _run(self, model: ir.Model) -> list[dict[str, npt.NDArray[Any]]]:
        from graphopt.executor import Session

        session = Session(model)
        return [session.run(dict(feed)) for feed in self._feeds]

    def distance(self, first: ir.Model, second: ir.Model) -> float:
        """Largest ||first - second|| / max(||first||, ||base||) over outputs and samples; inf where shapes differ, or
        where one is finite and the other is not."""
        worst = 0.0
        for base, one, two in zip(self._base, self._run(first), self._run(second), strict=True):
            for name, expected in one.items():
                if expected.dtype.kind not in "fc":
                    worst = max(worst, float(not np.array_equal(expected, two[name])))
                    continue
                if expected.shape != two[name].shape:
                    return float("inf")
                left, right = expected.astype(np.float64), two[name].astype(np.float64)
                if not np.array_equal(np.isfinite(left), np.isfinite(right)):
                    return float("inf")
                left, right = np.nan_to_num(left), np.nan_to_num(right)
                scale = max(_norm(left), _norm(np.nan_to_num(base[name].astype(np.float64))))
                gap = _norm(left - right)
                worst = max(worst, gap / scale if scale else float(gap > 0))
        return worst


def _norm(array: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(array.ravel()))


def zero_units(model: ir.Model, coupling: Coupling, dead: set[int]) -> None:
    """Zero the producer slices of units in place; a vector that other units share through another use is copied."""
    chosen = np.zeros(len(coupling.units) + 1, dtype=bool)
    chosen[list(dead)] = True
    nodes = nodes_by_key(model)
    for use in coupling.uses:
        slices = {
            axis: np.logical_or.reduce([chosen[vector] for vector in coupling.solution.units(factors)])
            for axis, factors in use.axes.items()
            if use.roles[axis] == "producer" and coupling.solution.units(factors)
        }
        if not any(mask.any() for mask in slices.values()):
            continue
        value = nodes[use.node].inputs[use.index]
        array = shapes.constant(value)
        assert value is not None
        assert array is not None
        array = array.copy()
        for axis, mask in slices.items():
            np.moveaxis(array, axis, 0)[mask] = 0
        if (len(value.uses()) == 1 and not value.is_graph_output()) or shapes.is_tied(value):
            shapes.set_constant(value, array)
        else:
            name = f"{value.name}_of_{use.node}_{use.index}"
            private = ir.Value(name=name, const_value=ir.Tensor(array, name=name), type=value.type)
            model.graph.register_initializer(private)
            nodes[use.node].replace_input_with(use.index, private)


def _positive(random: np.random.Generator) -> Callable[..., npt.NDArray[np.float64]]:
    return lambda size: np.asarray(random.uniform(0.5, 2.0, size))


def perturb_statistics(model: ir.Model, seed: int) -> None:
    """Give every batch normalisation random statistics and shifts, in place."""
    random = np.random.default_rng(seed)
    for node in model.graph.all_nodes():
        if node.op_type != "BatchNormalization":
            continue
        for index, draw in ((2, random.normal), (3, random.normal), (4, _positive(random))):
            value = node.inputs[index]
            array = shapes.constant(value)
            if value is not None and array is not None:
                shapes.set_constant(value, np.asarray(draw(size=array.shape)).astype(array.dtype))


def choose(coupling: Coupling, share: float, seed: int) -> set[int]:
    """Random EXACT units, about `share` of them, that leave no axis empty."""
    random = np.random.default_rng(seed)
    dead = {u.id for u in coupling.units if u.exact and random.random() < share}
    return spare_axes(coupling, dead)


def spare_axes(coupling: Coupling, dead: set[int]) -> set[int]:
    """Take units out of `dead` until every axis keeps a position."""
    dead = set(dead)
    for _, axes in coupling.labelled():
        for factors in axes.values():
            if not factors:
                continue
            gone = np.zeros(len(coupling.units) + 1, dtype=bool)
            gone[list(dead)] = True
            lost = np.logical_or.reduce([gone[vector] for vector in factors])
            if lost.all():
                dead -= {int(vector[0]) for vector in factors}
    return dead


def certify(
    model: ir.Model,
    coupling: Coupling,
    dead: set[int],
    feeds: Iterable[Mapping[str, npt.NDArray[Any]]] | None = None,
    seed: int = 0,
) -> Certificate:
    """Run the certificate for some EXACT units of a model.

    Args:
        model: the analysed model; not changed.
        coupling: its analysis.
        dead: unit ids, all EXACT.
        feeds: inputs; None: random ones.
        seed: of inputs and statistics.
    """
    from graphopt.verify import random_feeds

    base = model.clone()
    perturb_statistics(base, seed)
    samples = list(feeds) if feeds is not None else random_feeds(base, seed)
    zeroed, pruned = base.clone(), base.clone()
    zero_units(zeroed, coupling, dead)
    remove_units(pruned, coupling, dead)
    results = Distances(base, samples)
    difference = results.distance(zeroed, pruned)
    effect = results.distance(zeroed, base)
    others = [u.id for u in coupling.units if u.exact and u.id not in dead]
    np.random.default_rng(seed).shuffle(others)
    other = spare_axes(coupling, set(others[: len(dead)]))
    control = None
    if other:
        wrong = base.clone()
        remove_units(wrong, coupling, other)
        control = results.distance(zeroed, wrong)
    return Certificate(len(dead), difference, effect, control)
