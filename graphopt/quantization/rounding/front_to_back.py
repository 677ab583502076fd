"""Rounding front to back: layers read what the rounded layers before them produce, and are fitted to the float model.

With x what a layer reads now and t what it should put out (`graphopt.pruning.beside`), first its weight becomes the
least squares fit W = (C_tx + lam W_0)(S + lam I)^-1, then that is rounded in the moments of x: errors of earlier layers
are made up for as far as they show in x. Weights with zeros (sparse layers) are not fitted, since a fit would fill
them; they are rounded in the moments of x all the same.

All layers are rounded before the first answer, so what will be asked has to be known: `Requests` is a `Rounding` that
writes it down while a copy of the model is quantised for trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphopt.numerics import least_squares
from graphopt.numerics.moments import Moments
from graphopt.parallel import Workers
from graphopt.pruning.beside import Beside
from graphopt.quantization.rounding.interface import Floats, Rounded, WeightGrid, nearest
from graphopt.quantization.rounding.second_order import NO_LAYER, Answers, Question, damping_of, metric_of, notes
from graphopt.quantization.rounding.solved import Method, Metric, solved, unmeasured

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Request:
    """What a writer asked, without the weight, which the model holds already."""

    question: Question
    least_scale: Floats | float


class Requests:
    """A `Rounding` to the nearest that writes down what it is asked.

    Attributes:
        found: by key; the last one of each.
    """

    def __init__(self) -> None:
        self.found: dict[str, Request] = {}

    def __call__(self, key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
        """See `graphopt.quantization.rounding.interface.Rounding`."""
        self.found[key] = Request(Question.of(key, weight, grid, least_scale), least_scale)
        return nearest(key, weight, grid, least_scale)


class FrontToBack:
    """A `Rounding` that gives the answers found by going through the model once.

    Args:
        model: the float model; clones are kept.
        calibration: the data.
        requests: what will be asked.
        method: how far to go.
        centred: biases will take up what rounding does to means.
        samples: at most; None: all.
        jobs: threads.

    Raises:
        ModelError: as `graphopt.pruning.walk.Walk`.
    """

    def __init__(
        self,
        model: ir.Model,
        calibration: Calibration,
        requests: Requests,
        method: Method = "descent",
        *,
        centred: bool = False,
        samples: int | None = None,
        jobs: int = 1,
    ) -> None:
        self._requests, self._method, self._centred = requests.found, method, centred
        self._answers = Answers()
        self._without: dict[str, str] = {}
        with Workers(jobs) as workers:
            self._go(Beside(model, calibration, samples, workers))

    @property
    def notes(self) -> list[str]:
        """For the report."""
        return notes(self._without)

    def __call__(self, key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
        """See `graphopt.quantization.rounding.interface.Rounding`."""
        question = Question.of(key, weight, grid, least_scale)
        if question not in self._answers:
            self._without.setdefault(key, NO_LAYER)
            self._answers[question] = unmeasured(key, weight, grid, least_scale)
        return self._answers[question]

    def _go(self, beside: Beside) -> None:
        stages = self._stages(beside)
        for number, keys in enumerate(stages):
            ahead = [key for later in stages[number + 1 :] for key in later]
            inputs, goals = beside.measured(keys, ahead)
            for key in keys:
                self._solve(beside, key, inputs, goals[key])
            if ahead:
                beside.advance(ahead)

    def _stages(self, beside: Beside) -> list[list[str]]:
        """Layers that read the same columns, in order of execution."""
        found: dict[object, list[str]] = {}
        for key, request in self._requests.items():
            layer = beside.layers.get(key)
            if layer is not None and request.question.shape[::2] == (layer.groups, layer.width):
                found.setdefault((layer.source, layer.window, layer.stuffing), []).append(key)
        return sorted(found.values(), key=lambda keys: min(map(beside.place, keys)))

    def _solve(self, beside: Beside, key: str, inputs: Sequence[Moments], goals: Sequence[Moments]) -> None:
        request, layer = self._requests[key], beside.layers[key]
        centred = self._centred and layer.has_bias
        bias = np.array(layer.bias()).reshape(layer.groups, -1)
        metrics: list[Metric | None] = []
        reason = ""
        weight, grid = layer.weight(), request.question.grid
        wanted = np.array(weight)
        for g, (moments, goal) in enumerate(zip(inputs, goals, strict=True)):
            metric = metric_of(moments, centred=centred)
            if isinstance(metric, str):
                reason = metric
                metrics.append(None)
                continue
            metrics.append(metric)
            if wanted[g].all():
                wanted[g] = _fitted(moments, goal, wanted[g], bias[g], centred=centred)
        if not np.isfinite(wanted).all():
            wanted = weight
        if all(metric is None for metric in metrics):
            self._without[key] = reason
            rounded = unmeasured(key, wanted, grid, request.least_scale)
        else:
            rounded = solved(wanted, grid, metrics, self._method, request.least_scale)
        self._answers[request.question] = rounded
        values = rounded.dequantised().astype(np.float64)
        if centred:
            for g, (moments, goal) in enumerate(zip(inputs, goals, strict=True)):
                bias[g] = goal.mean_y - values[g] @ moments.mean if moments.n else bias[g]
        beside.store(key, values, bias.reshape(-1))


def _fitted(moments: Moments, goal: Moments, weight: Floats, bias: Floats, *, centred: bool) -> Floats:
    """The weight whose outputs come closest to the goal, its bias free (`centred`) or as it is."""
    if centred:
        return np.asarray(least_squares.solve(moments.covariance, goal.cross, weight, damping_of(moments)))
    # E[(t - b) x^T] from the centred moments
    cross = goal.cross + np.outer(goal.mean_y - bias, goal.mean)
    return np.asarray(least_squares.solve(moments.second, cross, weight, damping_of(moments)))
