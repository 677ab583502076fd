"""Scales that move outliers of activations into weights, and what integers lose with them.

    x W = (x / s) (s W),    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)    (Xiao et al., arXiv:2211.10438, equation 4)

An activation has one step for all channels, so a channel much larger than the others takes theirs; alpha says how much
of the difference the weight bears. The error of a layer's output, per element of x, is estimated from three numbers a
channel, kept in O(d) memory. Roundings of different channels are as good as independent, so their squares add up:

    activation: step^2 / 12 for each element, through the weight          step^2 / 12 * sum_jo (s_j W_jo)^2
    weight:     its rounding E, measured, through the activation          sum_j E[x_j^2] / s_j^2 sum_o E_jo^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.rounding import Grid, affine, dequantise, quantise, symmetric_weight

Float64 = NDArray[np.float64]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the difference that are tried."""

LEAST_GAIN = 0.8
"""Scales must lessen the estimated squared error to this fraction: the estimate, from some samples, is no better."""


class ChannelRange:
    """Extremes and mean square of each channel of a stream.

    Attributes:
        low, high: (channels,), 0 included.
        nonfinite: values that were inf or nan; they are counted and otherwise ignored.
    """

    def __init__(self, channels: int) -> None:
        self.low, self.high = np.zeros(channels), np.zeros(channels)
        self.nonfinite = 0
        self._squares = np.zeros(channels)
        self._count = 0

    def update(self, x: NDArray[Any], axis: int) -> None:
        """Add observations; `axis`: that of the channels."""
        rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        finite = np.isfinite(rows)
        if not finite.all():
            self.nonfinite += int(finite.size - np.count_nonzero(finite))
            rows = np.where(finite, rows, 0)
        self.low = np.minimum(self.low, rows.min(axis=0, initial=0.0))
        self.high = np.maximum(self.high, rows.max(axis=0, initial=0.0))
        self._squares += np.square(rows.astype(np.float64)).sum(axis=0)
        self._count += len(rows)

    @property
    def magnitude(self) -> Float64:
        """(channels,) largest magnitudes."""
        return np.maximum(-self.low, self.high)

    @property
    def square(self) -> Float64:
        """(channels,) mean squares."""
        return self._squares / max(self._count, 1)


@dataclass(frozen=True)
class SmoothedLayer:
    """A layer that reads scaled channels.

    Attributes:
        weight: (channels, outputs).
        read: ranges of its input.
        scale: (channels,) number of each channel's scale.
    """

    weight: Float64
    read: ChannelRange
    scale: NDArray[np.int64]


@dataclass(frozen=True)
class Smoothing:
    """The best scales that were found.

    Attributes:
        alpha: None where no scales are best.
        logs: base-2 logarithms, by number; 0 for scales that no layer reads.
        before, after: estimated squared errors relative to the outputs, summed over layers.
    """

    alpha: float | None
    logs: Float64
    before: float
    after: float


def smoothed(
    layers: Sequence[SmoothedLayer],
    count: int,
    activation: Grid,
    weight: Grid,
    *,
    per_channel: bool,
    limit: float,
    whole: bool,
) -> Smoothing:
    """Search alpha for the layers that read one group of channels.

    Args:
        layers: all that reads the channels.
        count: scales there are, number 0 included.
        activation: grid of the inputs.
        weight: symmetric grid of the weights.
        per_channel: whether each output has a weight scale of its own.
        limit: bound of the magnitude of a logarithm.
        whole: round to whole logarithms.
    """
    read, held = np.zeros(count), np.zeros(count)
    for layer in layers:
        np.maximum.at(read, layer.scale, layer.read.magnitude)
        np.maximum.at(held, layer.scale, np.abs(layer.weight).max(axis=1, initial=0.0))
    live = (read > 0) & (held > 0)
    live[0] = False

    def error(logs: Float64) -> float:
        return sum(_error(x, np.exp2(logs[x.scale]), activation, weight, per_channel) for x in layers)

    nothing = np.zeros(count)
    before = error(nothing)
    best, bound = Smoothing(None, nothing, before, before), before * LEAST_GAIN
    for alpha in ALPHAS if live.any() else ():
        logs = np.zeros(count)
        logs[live] = alpha * np.log2(read[live]) - (1 - alpha) * np.log2(held[live])
        # What all channels have in common moves no range against another.
        logs[live] = np.clip(logs[live] - logs[live].mean(), -limit, limit)
        logs = np.rint(logs) if whole else logs
        found = error(logs)
        if found < min(bound, best.after):
            best = Smoothing(alpha, logs, before, found)
    return best


def _error(layer: SmoothedLayer, s: Float64, activation: Grid, grid: Grid, per_channel: bool) -> float:
    """Squared error of a layer's outputs relative to their squares, as the head of this file says."""
    scaled = (layer.weight * s[:, None]).astype(np.float32)
    step = float(affine(float((layer.read.low / s).min()), float((layer.read.high / s).max()), activation).scale)
    params = symmetric_weight(scaled, grid, axis=1 if per_channel else None)
    rounding = dequantise(quantise(scaled, params), params).astype(np.float64) - scaled
    square = layer.read.square / s**2
    noise = step**2 / 12 * float(np.square(scaled, dtype=np.float64).sum()) + float(square @ np.square(rounding).sum(1))
    signal = float(layer.read.square @ np.square(layer.weight).sum(axis=1))
    return noise / signal if signal > 0 else 0.0
