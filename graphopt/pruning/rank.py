"""One name for every way to rank units: which function of which module a `score` is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.units import Coupling
from graphopt.base import Context
from graphopt.pruning.families import Candidates
from graphopt.pruning.importance import Setting, by_reconstruction
from graphopt.pruning.scores import at_random, by_fluctuation, by_value, by_weight
from graphopt.pruning.selection import Family
from graphopt.rewriting.layers import Layer

BY_WEIGHT = ("l2", "l1", "lamp", "fpgm")
NEED_DATA = ("obs", "flap", "taylor")


def rank(
    score: str,
    model: ir.Model,
    coupling: Coupling,
    layers: dict[str, Layer],
    families: Sequence[Candidates],
    ctx: Context,
    *,
    samples: int | None,
    centred: bool,
    strengths: Mapping[str, npt.NDArray[np.float64]],
) -> tuple[list[Family], list[str]]:
    """Rank the units of every family.

    Args:
        score: one of `BY_WEIGHT`, `NEED_DATA` or "random".
        model, coupling, layers, families: what is pruned.
        ctx: calibration data, seed, threads.
        samples: calibration samples to use at most.
        centred: the means of what goes are made up for (a refit follows).
        strengths: see `graphopt.pruning.importance.Setting`.

    Returns:
        The families, and sentences for the report.

    Raises:
        MissingBackendError: score=taylor without torch.
    """
    data = ctx.calibration
    if score == "random":
        return at_random(families, ctx.seed), []
    if data is None or score in BY_WEIGHT:
        return by_weight(coupling, families, score), []
    if score == "flap":
        return by_fluctuation(model, coupling, layers, families, data, samples=samples, threads=ctx.jobs), []
    if score == "taylor":
        return by_value(families, _taylor(model, coupling, ctx, samples, centred)), []
    setting = Setting(model, coupling, layers, data, samples, ctx.jobs, ctx.progress, strengths)
    return by_reconstruction(setting, families)


def _taylor(
    model: ir.Model, coupling: Coupling, ctx: Context, samples: int | None, centred: bool
) -> dict[int, float]:  # fmt: skip
    from graphopt.fx.extra import require_torch

    require_torch("score=taylor")
    from graphopt.fx.taylor import taylor_scores

    assert ctx.calibration is not None, "callers fall back to weights without data"
    scores = taylor_scores(
        model, coupling, ctx.calibration, centred=centred, samples=samples, seed=ctx.seed, threads=ctx.jobs
    )
    return {unit: float(value) for unit, value in enumerate(scores)}
