"""One weight onto its grid with what is known of its inputs: scales of least error, then GPTQ, then descent.

The steps build on each other, and each lowers the error tr((W - V) H (W - V)^T) of what it was given, or keeps it:

    search    scales, the error weighed by diag(H)             graphopt.numerics.scale_search
    gptq      integers, column by column                        graphopt.numerics.gptq
    descent   integers one by one and scales, from GPTQ's       graphopt.numerics.rounding_descent

Neither search (which knows nothing of how inputs go together) nor GPTQ is a descent in that error: rows that end above
the nearest integers of the extremes' scales get those instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.gptq import gptq
from graphopt.numerics.levels import Levels
from graphopt.numerics.rounding_descent import descend
from graphopt.numerics.scale_search import searched
from graphopt.quantization.rounding.interface import Floats, Integers, Rounded, WeightGrid, extremes, nearest

Method = Literal["search", "gptq", "descent"]

Metric = NDArray[np.float64]


def solved(
    weight: Floats,
    grid: WeightGrid,
    metrics: Sequence[Metric | None],
    method: Method,
    least_scale: Floats | float = 0.0,
) -> Rounded:
    """Round a weight.

    Args:
        weight: (groups, rows, columns), finite.
        grid: where to.
        metrics: H of each group, (columns, columns), damped; None where nothing is known: all columns count alike and
            numbers go to the nearest integer.
        method: how far to go.
        least_scale: lower bound of the magnitude of scales, scalar or (groups, rows, 1).
    """
    weight = np.asarray(weight, np.float32)
    columns = weight.shape[2]
    block = grid.width(columns)
    importance = np.stack([np.ones(columns) if h is None else np.diagonal(h) for h in metrics]).astype(np.float32)
    scale, zero = _scales(weight, grid, block, importance, least_scale)
    integers = np.empty(weight.shape, np.int32)
    for g, metric in enumerate(metrics):
        of = g if grid.per_channel else 0
        levels = Levels(scale[of], zero[of].astype(np.float32), grid.low, grid.high, block)
        steps = levels.steps(weight[g])
        if metric is not None and method != "search":
            steps = gptq(weight[g], metric, levels)
        if metric is not None and method == "descent":
            # one scale for several groups cannot follow one of them
            alone = grid.per_channel or len(metrics) == 1
            least = _least(least_scale, grid, g)
            steps, levels = descend(weight[g], metric, levels, steps, rescale=alone, least_scale=least)
            scale[of] = levels.scale
        integers[g] = steps.astype(np.int32)
    return _guarded(weight, metrics, Rounded(integers, scale, zero, block), nearest("", weight, grid, least_scale))


def unmeasured(key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
    """A `Rounding` without any data: to the nearest, the scales of blocks those of least squared error.

    Clipping the largest weights of a block costs little and makes all others finer. Of a whole row it does not pay:
    what is clipped shifts the mean of the output, since inputs mostly go together (activations behind a Relu).
    """
    if not grid.block:
        return nearest(key, weight, grid, least_scale)
    return solved(weight, grid, [None] * len(weight), "search", least_scale)


def _scales(
    weight: NDArray[np.float32], grid: WeightGrid, block: int, importance: Any, least: Floats | float
) -> tuple[NDArray[np.float32], Integers]:
    """Those of the extremes, clipped where that lowers the weighted error."""
    scale, zero = extremes(weight, grid, block, least)
    groups, rows, columns = weight.shape
    shape = scale.shape
    parts: Any
    weighed: Any
    if grid.per_channel:
        pad = -columns % block
        parts = np.pad(weight, ((0, 0), (0, 0), (0, pad))).reshape(-1, block)
        weighed = np.pad(importance, ((0, 0), (0, pad))).reshape(groups, 1, -1, block)
        weighed = np.broadcast_to(weighed, (groups, rows, *weighed.shape[2:])).reshape(-1, block)
    else:
        parts = weight.reshape(1, -1)
        weighed = np.broadcast_to(importance[:, None, :], weight.shape).reshape(1, -1)
    found, zeros = searched(
        parts, weighed, scale.reshape(-1), zero.reshape(-1), grid.low, grid.high, shifts=not grid.symmetric
    )
    found, zero = found.reshape(shape), zeros.reshape(shape)
    floor = np.asarray(least if grid.per_channel else np.max(least), np.float32)
    return np.copysign(np.maximum(np.abs(found), floor), found), zero


def _guarded(weight: Any, metrics: Sequence[Metric | None], found: Rounded, plain: Rounded) -> Rounded:
    """`found`, but for rows of which `plain` has the smaller error; all or none where rows share a scale."""
    errors = [_errors(weight, metrics, each) for each in (found, plain)]
    worse = errors[0] > errors[1]
    if found.scale.shape[:2] != weight.shape[:2]:
        return plain if errors[0].sum() > errors[1].sum() else found
    pick = worse[:, :, None]
    return Rounded(
        np.where(pick, plain.integers, found.integers),
        np.where(pick, plain.scale, found.scale),
        np.where(pick, plain.zero, found.zero),
        found.block,
    )


def _errors(weight: Any, metrics: Sequence[Metric | None], rounded: Rounded) -> NDArray[np.float64]:
    """tr of each row, (groups, rows)."""
    gaps = weight - rounded.dequantised()
    found = [
        gap * gap if h is None else gap * (gap @ h.astype(np.float32)) for gap, h in zip(gaps, metrics, strict=True)
    ]
    return np.stack([part.sum(axis=1, dtype=np.float64) for part in found])


def _least(least: Floats | float, grid: WeightGrid, group: int) -> Any:
    """Lower bound of the scales of one group."""
    bound = np.asarray(least, np.float32)
    if not grid.per_channel or bound.ndim == 0:
        return np.max(bound)
    return bound[min(group, len(bound) - 1)]
