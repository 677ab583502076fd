"""`prune{distil=N}`: the pruned model is trained to answer as the dense one does, without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.units import Coupling
from graphopt.base import Context
from graphopt.errors import ModelError, UsageError
from graphopt.fx.extra import require_torch

if TYPE_CHECKING:
    from graphopt.fx.distil import Hidden

RATE = 3e-4
"""Learning rate: weights that were refitted by least squares are near a good place already."""


def check_distillable(model: ir.Model, ctx: Context) -> None:
    """Refuse before the work what would fail after it.

    Raises:
        MissingBackendError: torch is not installed.
        UsageError: there is no calibration data.
        ModelError: operators that `to_torch` does not cover.
    """
    require_torch("prune{distil=}")
    from graphopt.fx.to_torch import uncovered

    if ctx.calibration is None:
        raise UsageError("distil= needs calibration data", where="prune", hint="give data with --calib")
    missing = uncovered(model)
    if missing:
        raise ModelError(
            f"{len(missing)} nodes cannot be trained: {', '.join(missing[:5])}",
            where="prune{distil=}",
            hint="leave out distil=, or fold the model first",
        )


def match_dense(
    dense: ir.Model,
    pruned: ir.Model,
    coupling: Coupling,
    dead: set[int],
    ctx: Context,
    *,
    steps: int,
    samples: int | None,
) -> str:
    """Distil, in place; outputs and residual sums are matched (`graphopt.fx.distil`).

    Args:
        dense: the model before units went, with the names that `coupling` knows.
        pruned: the model without them.
        coupling: the analysis in which `dead` counts.
        dead: the units that went.
        ctx: calibration data, seed, threads.
        steps: steps of Adam.
        samples: calibration samples to use at most.

    Returns:
        A sentence for the report.
    """
    from graphopt.fx.distil import distil

    assert ctx.calibration is not None  # check_distillable has seen to it
    hidden = _sums(dense, pruned, coupling, dead)
    found = distil(
        dense, pruned, ctx.calibration, steps=steps, samples=samples, hidden=hidden, rate=RATE, seed=ctx.seed,
        threads=ctx.jobs, progress=ctx.progress,
    )  # fmt: skip
    if not found.best:
        return f"distillation brought nothing in {found.steps} steps: the refitted weights stay"
    return (
        f"distilled in {found.best} steps: missed variance of outputs and {len(hidden)} residual sums on held-out "
        f"data {found.before:.4f} -> {found.after:.4f}"
    )


def _sums(dense: ir.Model, pruned: ir.Model, coupling: Coupling, dead: set[int]) -> list[Hidden]:
    """Residual sums that both models have, with the positions that are left."""
    from graphopt.fx.distil import Hidden

    gone = np.fromiter(dead, dtype=np.int64, count=len(dead))
    there = {v.name for node in pruned.graph for v in node.outputs if v.name} - {v.name for v in pruned.graph.outputs}
    found = []
    for node in dense.graph:
        value = node.outputs[0]
        if node.op_type != "Add" or value.name not in there or any(shapes.constant_tensor(v) for v in node.inputs):
            continue
        if value.dtype is None or not value.dtype.is_floating_point() or value.shape is None or value.shape.rank() < 2:
            continue
        kept = {}
        for axis in range(value.shape.rank()):
            factors = coupling.axis_units(value.name, axis)
            if factors:
                kept[axis] = np.flatnonzero(np.logical_and.reduce([~np.isin(f, gone) for f in factors]))
        found.append(Hidden(value.name, kept))
    return found
