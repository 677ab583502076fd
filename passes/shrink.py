"""shrink: remove units that are dead already.

A unit's positions hold a constant c at every consumer: c = 0 where the filter and its bias are zero, another value
where only the filter is (c = bias), carried through what follows (ReLU, BatchNorm, pooling, residual sums; see
graphopt/analysis/ops). A consumer y = W x + b does not need a constant input:

    y = W_K x_K + (b + W_C c)        K kept, C constant

so position and weights go, and the bias takes W_C c. With zero padding this holds for c = 0 only: borders would differ.
Removing units can leave others constant, so the pass repeats until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.certificate import spare_axes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse
from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.prepare import prepare


@dataclass(frozen=True)
class Shrink(Pass):
    """Remove channels, features and neurons that are zero or constant for every input.

    Does: finds units whose value at every consumer is a known constant, removes their slices from all parameters and
    folds the constant into the consumers' biases. Needs no data.
    Algebra: y = W x + b = W_K x_K + (b + W_C c) for inputs C that hold constants c.
    Does not fire: where a constant other than zero reaches the padded border of a convolution, or a consumer compares
    positions (softmax, maximum, normalisation over the axis); the last position of an axis stays.
    Preserves: the function (EXACT), all names. Model-local functions are inlined where something is removed.
    Source: zero-invariant groups, Chen et al. 2021 (arXiv:2107.07467), widened to constants.
    """

    name: ClassVar[str] = "shrink"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        prepared = prepare(model)
        removed = 0
        sliced: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        stays: list[Skip] = []
        spared: dict[Skip, None] = {}
        for round_number in range(1, len(model.graph) + 2):
            coupling = analyse(model)
            values = coupling.dead_values(hypothetical=False)
            dead, last, stays = _constant_units(coupling, values)
            spared.update(dict.fromkeys(last))
            ctx.progress.step("shrink", round_number)
            if not dead:
                break
            report = remove_units(model, coupling, dead, values)
            removed += len(dead)
            for name, (before, after) in report.sliced.items():
                sliced[name] = (sliced.get(name, (before, after))[0], after)
        notes = [*prepared, f"removed {removed} of {len(coupling.units) + removed} units"] if removed else []
        rows = [{"parameter": name, "before": str(b), "after": str(a)} for name, (b, a) in sliced.items()]
        return PassResult(bool(removed), [*spared, *stays], notes, {"sliced parameters": rows} if rows else {})


def _constant_units(coupling: Coupling, values: DeadValues) -> tuple[set[int], list[Skip], list[Skip]]:
    """Units that no consumer needs; those of them that are the last of an axis; why other constant ones stay."""
    unsafe = coupling.unsafe(values)
    constant_somewhere: dict[int, str] = {}
    read: set[int] = set()
    for sink in coupling.sinks:
        held = values.values.get((sink.value, sink.axis))
        for vector in coupling.axis_units(sink.value, sink.axis):
            read.update(np.unique(vector[vector != 0]).tolist())
            if held is not None:
                for unit in np.unique(vector[~np.isnan(held) & (vector != 0)]):
                    constant_somewhere.setdefault(int(unit), sink.node)
    free = read - set(unsafe)
    dead = spare_axes(coupling, free)
    stays = [
        Skip(node, f"unit {unit} is constant here but stays: {unsafe[unit]}")
        for unit, node in sorted(constant_somewhere.items())
        if unit in unsafe
    ]
    names = {unit.id: unit.members[0].parameter for unit in coupling.units}
    last = [Skip(names[unit], "constant, but the last position of an axis stays") for unit in sorted(free - dead)]
    return dead, last, stays
