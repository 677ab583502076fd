"""Rounding with the second moments of what layers read, from calibration data.

Moments are those of the float model (layers do not wait for each other), taken when a layer is first asked for:
together with those that follow it, as many as fit into the memory allowed, in one pass over the data. Layers that read
the same columns share theirs. What a layer was given is remembered, so writing a model several times solves once.

The moments are damped: H + a mean(diag H) I with a = `DAMPING` where there are `ENOUGH` observations per column, and
the more the fewer there are, since what few observations say of the products of columns is chance.

What is rounded without moments (embeddings, recurrent weights, weights in bodies of If and Loop, layers that the data
does not reach) gets the nearest integers, and in short blocks the scales of least squared error (`unmeasured`); `notes`
says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphopt.numerics.least_squares import ENOUGH
from graphopt.numerics.metric import DAMPING, damped
from graphopt.numerics.moments import Moments
from graphopt.parallel import Workers
from graphopt.quantization.rounding.interface import Floats, Rounded, WeightGrid
from graphopt.quantization.rounding.solved import Method, Metric, solved, unmeasured
from graphopt.rewriting.layer_moments import MEMORY, input_moments, portions
from graphopt.rewriting.layers import Layer, layers_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.calibration import Calibration

MOST_DAMPING = 1.0

NO_LAYER = "no layer with inputs that can be streamed"
"""Why a weight is rounded without moments."""


class SecondOrder:
    """A `graphopt.quantization.rounding.interface.Rounding` with moments.

    Args:
        model: the float model; a clone is kept, so it may change meanwhile.
        calibration: the data.
        method: how far to go.
        keys: layers that will be asked for; None: all.
        centred: biases will take up what rounding does to means, so only deviations from the mean input count.
        samples: at most; None: all.
        jobs: threads.
        memory: see `graphopt.rewriting.layer_moments.MEMORY`.
    """

    def __init__(
        self,
        model: ir.Model,
        calibration: Calibration,
        method: Method = "descent",
        *,
        keys: Collection[str] | None = None,
        centred: bool = False,
        samples: int | None = None,
        jobs: int = 1,
        memory: int = MEMORY,
    ) -> None:
        self._model, self._calibration, self._method = model.clone(), calibration, method
        self._centred, self._samples, self._jobs = centred, samples, jobs
        self._layers = {k: v for k, v in layers_of(self._model)[0].items() if keys is None or k in keys}
        self._portions = _by_portion(list(self._layers.values()), memory)
        self._held: dict[object, list[Moments]] = {}
        self._answers = Answers()
        self._without: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        """For the report."""
        return notes(self._without)

    def __call__(self, key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
        """See `graphopt.quantization.rounding.interface.Rounding`."""
        question = Question.of(key, weight, grid, least_scale)
        if question not in self._answers:
            metrics = self._metrics(key, weight)
            known = any(metric is not None for metric in metrics)
            self._answers[question] = (
                solved(weight, grid, metrics, self._method, least_scale)
                if known
                else unmeasured(key, weight, grid, least_scale)
            )
        return self._answers[question]

    def _metrics(self, key: str, weight: Floats) -> list[Metric | None]:
        groups, _, columns = weight.shape
        layer = self._layers.get(key)
        if layer is None or (layer.groups, layer.width) != (groups, columns):
            self._without[key] = NO_LAYER
            return [None] * groups
        factors = column_factors(layer.weight(), weight)
        if factors is None:
            self._without[key] = "its weight is not the one it had when the data was streamed"
            return [None] * groups
        if _reads(layer) not in self._held:
            self._measure(_reads(layer))
        found: list[Metric | None] = []
        reason = ""
        for moments, factor in zip(self._held[_reads(layer)], factors, strict=True):
            metric = metric_of(moments, centred=self._centred and layer.has_bias)
            if isinstance(metric, str):
                reason = metric
            # (W S)(S^-1 x): where columns were multiplied, what they meet was divided (`scales.inserted`).
            found.append(None if isinstance(metric, str) else metric / np.outer(factor, factor))
        if all(metric is None for metric in found):
            self._without[key] = reason
        return found

    def _measure(self, reads: object) -> None:
        portion = next(p for p in self._portions if any(_reads(layer) == reads for layer in p))
        self._held.clear()
        with Workers(self._jobs) as workers:
            found = input_moments(self._model, portion, self._calibration, self._samples, workers)
        self._held = {_reads(layer): moments for layer, moments in zip(portion, found, strict=True)}


def column_factors(own: Floats, weight: Floats) -> NDArray[np.float64] | None:
    """What the columns of a weight were multiplied by, (groups, columns); None where it changed otherwise."""
    largest = np.abs(own).argmax(axis=1)[:, None]
    before, after = (np.take_along_axis(np.asarray(w, np.float64), largest, axis=1)[:, 0] for w in (own, weight))
    factors = np.divide(after, before, out=np.ones_like(before), where=before != 0)
    slack = 1e-6 * float(np.max(np.abs(weight), initial=0.0))
    same = np.allclose(weight, own * factors[:, None], rtol=1e-3, atol=slack)
    return factors if same and bool((factors > 0).all()) else None


class Answers:
    """What was found already, by key, grid and the very bytes of the weight; integers in one byte each."""

    def __init__(self) -> None:
        self._found: dict[Question, Rounded] = {}

    def __contains__(self, question: Question) -> bool:
        return question in self._found

    def __getitem__(self, question: Question) -> Rounded:
        found = self._found[question]
        return replace(found, integers=found.integers.astype(np.int32))

    def __setitem__(self, question: Question, answer: Rounded) -> None:
        small: Any = answer.integers.astype(np.int8 if question.grid.symmetric else np.uint8)
        self._found[question] = replace(answer, integers=small)


@dataclass(frozen=True)
class Question:
    """What tells questions apart.

    Attributes:
        key, grid: as `graphopt.quantization.rounding.interface.Rounding` gets them.
        shape: of the weight.
        digest: of the weight and the least scales.
    """

    key: str
    grid: WeightGrid
    shape: tuple[int, ...]
    digest: bytes

    @classmethod
    def of(cls, key: str, weight: Floats, grid: WeightGrid, least: Floats | float) -> Question:
        """The question that a `Rounding` is asked."""
        digest = hashlib.blake2b(np.ascontiguousarray(weight, np.float32).tobytes(), digest_size=16)
        digest.update(np.asarray(least, np.float64).tobytes())
        return cls(key, grid, weight.shape, digest.digest())


def metric_of(moments: Moments, *, centred: bool) -> Metric | str:
    """Damped second moments, or why there are none."""
    if moments.n == 0:
        return "the calibration data does not reach it"
    try:
        metric: Metric = damped(moments.covariance if centred else moments.second, damping_of(moments))
    except ValueError as error:
        return str(error)
    return metric


def damping_of(moments: Moments) -> float:
    """What to add to the diagonal, relative to its mean; more where observations are few."""
    return min(MOST_DAMPING, DAMPING * max(1.0, ENOUGH * moments.dim / moments.n))


def notes(without: dict[str, str]) -> list[str]:
    """What to say of weights that were rounded without moments; keys and reasons."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in without.items():
        by_reason.setdefault(reason, []).append(key)
    return [
        f"{len(keys)} weights rounded to the nearest without moments of their inputs ({reason}): "
        f"{', '.join(sorted(keys)[:5])}{', ...' if len(keys) > 5 else ''}"
        for reason, keys in by_reason.items()
    ]


def _reads(layer: Layer) -> object:
    return layer.source, layer.window, layer.stuffing


def _by_portion(layers: list[Layer], memory: int) -> list[list[Layer]]:
    """One layer for each input, in order, as many together as fit."""
    first = {_reads(layer): layer for layer in reversed(layers)}
    order = [first[reads] for reads in dict.fromkeys(map(_reads, layers))]
    return list(portions(order, lambda layer: layer, memory))
