"""Scales of activations: what calibration saw of every tensor, and the integers' range that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.data.feeds import Array
from graphopt.numerics.histogram import Histogram
from graphopt.numerics.ranges import Range, average_range, entropy_range, minmax_range, mse_range, percentile_range
from graphopt.numerics.rounding import Affine, Grid, affine
from graphopt.progress import Progress

RangeRule = Literal["minmax", "average", "percentile", "mse", "entropy"]
"""How a range follows from a histogram; see `graphopt.numerics.ranges`."""

WIDEST = 1e30
"""A tensor that reaches this is a mask (float32 lowest stands for minus infinity), and no scale fits it."""

FEW = 10_000
"""Of a tensor with fewer values than this, others will lie outside the range seen: what a sample has of it is few, all
of them count, and a clipped one shows. With 64 samples behind a global pooling, int8 lost 5 to 13 dB on other samples,
with 512 at most 2."""


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


def doubts(calibration: Calibration, samples: int, seen: Mapping[str, Histogram]) -> list[str]:
    """What the report should warn of: ranges from one sample, from one sample many times, from few values.

    Args:
        calibration: the data; read no further than to the first sample that differs.
        samples: how many of them at most.
        seen: histograms by tensor.
    """
    first: dict[str, Array] = {}
    count = 0
    for feeds, more in calibration.counted(limit=samples):
        rows = all(a.ndim and len(a) == more for a in feeds.values())
        if not first:
            first = {name: a[:1].copy() if rows else a.copy() for name, a in feeds.items()}
        count += more
        if any(first[name].shape[1:] != a.shape[1:] or np.any(first[name] != a) for name, a in feeds.items()):
            return _thin(seen)
    if count == 1:
        return ["warning: ranges come from one sample; give some hundred, or other inputs will be clipped"]
    return [f"warning: all {count} calibration samples are the same; ranges are those of one sample"]


def _thin(seen: Mapping[str, Histogram]) -> list[str]:
    """A warning that names tensors of which few values were seen."""
    few = {name: int(histogram.total) for name, histogram in seen.items() if 0 < histogram.total < FEW}
    if not few:
        return []
    least = min(few, key=lambda name: few[name])
    return [
        f"warning: {len(few)} of {len(seen)} ranges come from few values ({least}: {few[least]}): what other inputs "
        "have beyond them is clipped; give more calibration samples"
    ]


def unfit(histogram: Histogram) -> str | None:
    """Why a tensor cannot be quantised; None where it can."""
    if histogram.nonfinite:
        return f"holds inf or nan on the calibration data ({histogram.nonfinite} values)"
    if histogram.total and histogram.low == histogram.high:
        # in use it will vary, or nobody would have computed it: a dead branch, a state that is still zero
        return f"is {histogram.low:.3g} everywhere on the calibration data, so that no range can be told"
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
