"""Scales of activations: what calibration saw of every tensor, and the integers' range that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.numerics.histogram import Histogram
from graphopt.numerics.ranges import Range, average_range, entropy_range, minmax_range, mse_range, percentile_range
from graphopt.numerics.rounding import Affine, Grid, affine
from graphopt.progress import Progress

RangeRule = Literal["minmax", "average", "percentile", "mse", "entropy"]
"""How a range follows from a histogram; see `graphopt.numerics.ranges`."""

WIDEST = 1e30
"""A tensor that reaches this is a mask (float32 lowest stands for minus infinity), and no scale fits it."""


def histograms(
    model: ir.Model, tensors: Iterable[str], calibration: Calibration, *,
    samples: int, threads: int, progress: Progress,
) -> dict[str, Histogram]:  # fmt: skip
    """Histograms of tensors of the main graph on calibration data, in memory that does not grow with the samples.

    Args:
        model: the float model.
        tensors: their names.
        calibration: the data.
        samples: how many of them at most.
        threads: of the runtime.
        progress: told of every batch.
    """
    from graphopt.data.activations import activations

    found = {name: Histogram() for name in tensors}
    for count, batch in enumerate(activations(model, list(found), calibration, limit=samples, threads=threads)):
        progress.step("ranges", count)
        for name, values in batch.items():
            found[name].update(values)
    return found


def unfit(histogram: Histogram) -> str | None:
    """Why a tensor cannot be quantised; None where it can."""
    if histogram.nonfinite:
        return f"holds inf or nan on the calibration data ({histogram.nonfinite} values)"
    if max(-histogram.low, histogram.high) > WIDEST:
        return f"spans [{histogram.low:.3g}, {histogram.high:.3g}] on the calibration data"
    return None if histogram.total else "is empty on the calibration data"


def affines(
    seen: Mapping[str, Histogram], rule: RangeRule, grid: Grid, *, percentile: float = 99.99
) -> dict[str, Affine]:
    """Scale and zero point of every tensor that can be quantised.

    Args:
        seen: histograms by tensor.
        rule: how a range follows from a histogram.
        grid: integers of activations.
        percentile: for that rule, the share of values inside the range, in per cent.
    """
    return {
        name: affine(*_range(histogram, rule, grid, percentile), grid)
        for name, histogram in seen.items()
        if not unfit(histogram)
    }


def _range(histogram: Histogram, rule: RangeRule, grid: Grid, percentile: float) -> Range:
    match rule:
        case "minmax":
            return minmax_range(histogram)
        case "average":
            return average_range(histogram)
        case "percentile":
            return percentile_range(histogram, percentile)
        case "mse":
            return mse_range(histogram, grid)
        case "entropy":
            return entropy_range(histogram, grid)
