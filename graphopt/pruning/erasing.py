"""In which order branches would be erased, and what it harms: measured at the outputs, one after the other.

A candidate is judged as it would be used: its mean takes its place, and the layer that writes the stream before it (see
`graphopt.pruning.branches`) is refitted by least squares to what the sum was, on moments of the dense model,

    W' = (C_tx + lam W)(S + lam I)^-1,    t = sum_dense - (stream_dense - y_dense),

where the result only enters a Relu, with the freedom below zero that `graphopt.pruning.reconstruct` explains. Then the
disturbance of the outputs is measured. The order is greedy: what does least harm per work saved goes first, and the
next is judged with the first gone, because harms of neighbours do not add up. Measurements are lazy: harm grows with
what is gone, so a candidate whose old measurement is no longer the best needs no new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.rules import node_key
from graphopt.analysis.units import Coupling
from graphopt.calibration import Calibration
from graphopt.data.activations import activations
from graphopt.numerics.least_squares import solve
from graphopt.numerics.moments import Moments
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Progress
from graphopt.pruning.branches import Branch, Erased, erase, find_branches, in_graph_order
from graphopt.pruning.families import Candidates
from graphopt.pruning.selection import Erasures, Term
from graphopt.pruning.work import full_counts, readers_of
from graphopt.quantization.search.sensitivity import Reference
from graphopt.rewriting.layers import layers_of

Floats = npt.NDArray[np.float64]

PROBES = 128
"""Samples on which the disturbance of the outputs is measured."""

FITTED = 256
"""Samples for means and for the refits of writers."""

ROWS = 1 << 17
"""Observations of a refit at most."""

RIDGE = 1e-3

WORST = 0.5
"""Noise-to-signal power of the outputs at which no further branch is tried."""


@dataclass
class Eraser:
    """Erases branches of a model and measures what that does.

    Args:
        model: dense; not changed.
        calibration: the data.
        threads: of the runtime.
        progress: told of every measurement.
        exclude: globs over names of nodes and parameters; a branch that has one of them stays.

    Attributes:
        branches: all that can go.
    """

    model: ir.Model
    calibration: Calibration
    threads: int
    progress: Progress
    exclude: tuple[str, ...] = ()
    branches: list[Branch] = field(init=False)
    _means: dict[str, Floats] = field(default_factory=dict)
    _fits: dict[Writer, tuple[Floats, Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the branches and measure what they are on average."""
        barred = _matching(self.model, self.exclude)
        self.branches = [b for b in find_branches(self.model) if not b.nodes & barred]
        self._reference = Reference(
            self.model, self.calibration, samples=PROBES, threads=self.threads, optimize=True
        ) if self.branches else None  # fmt: skip
        axes = {b.output: b.axis for b in self.branches}
        found = {name: Moments() for name in axes}
        for batch in activations(self.model, list(axes), self.calibration, limit=FITTED, threads=self.threads):
            for name, values in batch.items():
                rows = np.moveaxis(values, axes[name], -1)
                found[name].update(rows.reshape(-1, rows.shape[-1]))
        self._means = {name: np.asarray(m.mean, dtype=np.float64) for name, m in found.items()}

    def apply(self, model: ir.Model, chosen: Sequence[Branch]) -> list[Erased]:
        """Erase branches in a model of the same names, in place; writers are shifted, not refitted."""
        return [erase(model, branch, self._means[branch.output]) for branch in in_graph_order(chosen, model)]

    def noise(self, chosen: Sequence[Branch]) -> float:
        """Noise-to-signal power at the outputs without these branches, their writers refitted."""
        assert self._reference is not None, "there are no branches"
        copy = private_clone(self.model)
        done = self.apply(copy, chosen)
        layers, _ = layers_of(copy)
        for key, writer in writers(done).items():
            if key in layers:  # else it is in a branch erased later
                layers[key].store(*self._fit(writer))
        return self._reference.noise(copy)

    def _fit(self, writer: Writer) -> tuple[Floats, Floats]:
        if writer not in self._fits:
            self._fits[writer] = self._fitted(writer)
        return self._fits[writer]

    def _fitted(self, writer: Writer) -> tuple[Floats, Floats]:
        layer = layers_of(self.model)[0][writer.key]
        moments = [Moments(full=True) for _ in range(layer.groups)]
        names = tuple(dict.fromkeys((layer.source, layer.output, writer.stream, writer.total)))
        for batch in activations(self.model, [names], self.calibration, limit=FITTED, threads=self.threads):
            y, now, goal = batch[layer.output], batch[writer.stream], batch[writer.total]
            if writer.relu:
                goal = np.where(goal > 0, goal, np.minimum(now, 0))
            wanted = goal - (now - y)
            thin = max(1, layer.positions(y) * FITTED // max(1, y.shape[0]) // ROWS)
            for group, each in enumerate(moments):
                for columns, rows in layer.columns(batch[layer.source], wanted, group, thin):
                    each.update(columns, rows, axis=0)
        weight, bias = layer.weight(), np.array(layer.bias())
        per_out = layer.linear.outputs // layer.groups
        for group, each in enumerate(moments):
            new = solve(np.asarray(each.covariance), np.asarray(each.cross), weight[group], RIDGE)
            shift = np.asarray(each.mean_y) - new @ np.asarray(each.mean)
            weight[group], bias[group * per_out : (group + 1) * per_out] = new, shift
        return weight, bias

    def order(self, saved: Mapping[str, float], enough: float) -> tuple[list[Branch], list[float]]:
        """The branches in the order in which they would go.

        Args:
            saved: work that each saves, by `Branch.output`; those that save nothing are not considered.
            enough: work saved at which the order may end.

        Returns:
            Branches, and the noise with the first k of them gone; [0] is 0.
        """
        left = {b.output: b for b in self.branches if saved.get(b.output, 0.0) > 0}
        chosen: list[Branch] = []
        harm = [0.0]
        known: dict[str, tuple[int, float]] = {}  # noise with this one gone as well, and how many had gone before
        gone = 0.0
        steps = 0
        while left and gone < enough and harm[-1] < WORST:
            if chosen:
                copy = private_clone(self.model)
                self.apply(copy, chosen)
                there = {b.output for b in find_branches(copy)}  # sums have other names now
                left = {k: b for k, b in left.items() if k in there}
            best = None
            while left and best is None:
                name = min(left, key=lambda k: self._price(k, known, harm, saved))
                if name in known and known[name][0] == len(chosen):
                    best = name
                    continue
                self.progress.step("trying branches", steps)
                steps += 1
                known[name] = (len(chosen), self.noise([*chosen, left[name]]))
            if best is None:
                break
            chosen.append(left.pop(best))
            harm.append(max(known[best][1], harm[-1]))
            gone += saved[best]
        return chosen, harm

    @staticmethod
    def _price(
        name: str, known: Mapping[str, tuple[int, float]], harm: Sequence[float], saved: Mapping[str, float]
    ) -> float:
        """Noise added per work saved, as last measured; unknown ones first."""
        if name not in known:
            return -np.inf
        before, noise = known[name]
        return max(0.0, noise - harm[before]) / saved[name]


def _matching(model: ir.Model, globs: Sequence[str]) -> set[str]:
    """Keys of the nodes that a glob names, themselves or by a parameter."""
    found = set()
    for node in model.graph:
        names = [node.name or "", *(v.name or "" for v in node.inputs if v is not None and v.is_initializer())]
        if any(fnmatchcase(name, glob) for glob in globs for name in names if name):
            found.add(node_key(node))
    return found


@dataclass(frozen=True)
class Writer:
    """A layer that stands before erased branches, and what it should be refitted to.

    Attributes:
        key: of the layer in the dense model.
        stream: the tensor it ended in there.
        total: the sum it stands for in the end.
        relu: only what is above zero counts there.
    """

    key: str
    stream: str
    total: str
    relu: bool


def writers(erased: Sequence[Erased]) -> dict[str, Writer]:
    """The writers by their keys after the erasures; before several branches in a row one stands for the last sum."""
    found: dict[str, Writer] = {}
    for each in erased:
        if each.writer:
            first = found.pop(each.writer, Writer(each.writer, each.stream, "", False))
            found[each.key] = Writer(first.key, first.stream, each.total, each.relu)
    return found


def erasures_for(
    eraser: Eraser, terms: Sequence[Term], keep: float, families: Sequence[Candidates], coupling: Coupling
) -> tuple[list[Branch], Erasures]:
    """The branches in the order in which they would go for a budget, and the same for the solver.

    Args:
        eraser: of the model.
        terms: the work.
        keep: fraction of it that may stay; a tenth of that more is provided for, because a budget of latency may be
            corrected by what was measured.
        families, coupling: of the model.
    """
    full = sum(t.work(full_counts(t)) for t in terms)
    branches, harm = eraser.order(savings(eraser.branches, terms), (1 - 0.9 * keep) * full)
    return branches, as_erasures(branches, harm, families, coupling)


def as_erasures(
    chosen: Sequence[Branch], harm: Sequence[float], families: Sequence[Candidates], coupling: Coupling
) -> Erasures:
    """The order of branches as the solver takes it."""
    readers = readers_of(coupling.model)
    units = {u.id: u for u in coupling.units}
    homes = [
        frozenset().union(*(readers.get(m.parameter, frozenset({""})) for u in f.units for m in units[u].members))
        for f in families
    ]
    inside = tuple(tuple(i for i, home in enumerate(homes) if home <= b.nodes) for b in chosen)
    return Erasures(tuple(b.nodes for b in chosen), inside, np.array(harm))


def savings(branches: Sequence[Branch], terms: Sequence[Term]) -> dict[str, float]:
    """Work that each branch takes while nothing in it is pruned, by `Branch.output`."""
    full = [(t.nodes, t.work(full_counts(t))) for t in terms]
    return {b.output: sum(work for nodes, work in full if nodes and nodes <= b.nodes) for b in branches}
