"""One set of layers: metric, new weights, biases, errors.

With the mean mu and the covariance S of what a layer reads, any new weight V is best with the bias b' = b + (W - V) mu,
and what then remains of the error is tr((W - V) S (W - V)^T): layers with a bias are fitted in their covariance, others
in their second moments. Where the layer has a goal t of its own (`graphopt.sparsity.sequential`), W and b are first
replaced by its least squares fit, W = (C_tx + lam W)(S + lam I)^-1, b = mean_t - W mu, with the lam of the metric.

What cannot be used is told as a reason, and the layer stays as it is: moments or weights that are not finite or all
zero, solutions that are not finite or do not fit the weight's type, errors larger than allowed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphopt.numerics import least_squares
from graphopt.numerics.least_squares import Sample
from graphopt.numerics.metric import DAMPING, check_weight, damped, relative_error
from graphopt.numerics.moments import Moments
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.tasks import Set, Task


@dataclass(frozen=True)
class Problem:
    """What a solver is given: one group of channels of a set of layers.

    Attributes:
        layers: the set.
        weights: one a layer, (outputs, columns), tap by tap.
        metric: (columns, columns), damped; None without calibration data.
        seconds: that the solver may take; None: as long as it needs.
    """

    layers: Set
    weights: list[Floats]
    metric: Floats | None
    seconds: float | None


@dataclass(frozen=True)
class Solution:
    """A solver's answer for one weight.

    Attributes:
        weight: (outputs, columns), what the layer will compute with.
        factors: what it is the product of, where it is one.
    """

    weight: Floats
    factors: Any = None


Solve = Callable[[Problem], Sequence[Solution]]


@dataclass(frozen=True)
class Fitted:
    """New weights of a layer.

    Attributes:
        layer: which.
        weight: (groups, outputs per group, columns), tap by tap.
        bias: (outputs,).
        factors: one a group.
        error: relative to the layer's own signal on the calibration data; None without any.
        observations: that the error is taken over.
    """

    layer: SparseLayer
    weight: Floats
    bias: Floats
    factors: list[Any]
    error: float | None = None
    observations: int | None = None

    def row(self) -> dict[str, Any]:
        """For the report."""
        row: dict[str, Any] = {
            "layer": self.layer.layer.label, "shape": "x".join(map(str, self.weight.shape[1:]))
        }  # fmt: skip
        return row if self.error is None else row | {"error": self.error}


@dataclass(frozen=True)
class Refused:
    """A layer that stays as it is."""

    layer: SparseLayer
    reason: str


class Budget:
    """Seconds for all solvers together, dealt out by what they cost; what one leaves over is the others'.

    Args:
        seconds: from now on.
        costs: of everything that will be solved, together.
        jobs: solvers at work at once.
    """

    def __init__(self, seconds: float, costs: float, jobs: int) -> None:
        self._end = time.monotonic() + seconds
        self._left, self._jobs = costs, jobs
        self._lock = threading.Lock()

    def share(self, cost: float) -> float:
        """Seconds for a task that begins now."""
        left = max(0.0, self._end - time.monotonic())
        with self._lock:
            return min(left, left * self._jobs * cost / self._left) if self._left > 0 else left

    def spent(self, cost: float) -> None:
        """A task is done."""
        with self._lock:
            self._left -= cost


def cost(layers: Set) -> float:
    """Of solving a set, in the unit m n^2."""
    return float(sum(each.layer.linear.outputs for each in layers) * layers[0].layer.width ** 2)


def fit(
    task: Task, solve: Solve, step: int, budget: Budget | None = None, max_error: float | None = None
) -> list[Fitted | Refused]:
    """New weights for the layers of a task, in their order.

    Args:
        task: what to fit to what.
        solve: makes weights sparse; raises ValueError where it cannot.
        step: size of the pattern's groups; 1: none. It divides the columns of a tap in every problem.
        budget: of time.
        max_error: layers that would be further off stay as they are.
    """
    works: list[_Work | Refused] = [_work(task, k) for k in range(len(task.layers))]
    sound = [each for each in works if isinstance(each, _Work)]
    if sound:
        spent = cost(tuple(each.layer for each in sound))
        seconds = budget.share(spent) if budget is not None else None
        reason = _solve(sound, task, solve, step, seconds)
        if budget is not None:
            budget.spent(spent)
        if reason:
            return [each if isinstance(each, Refused) else Refused(each.layer, reason) for each in works]
    return [each if isinstance(each, Refused) else each.finished(max_error) for each in works]


def _solve(sound: list[_Work], task: Task, solve: Solve, step: int, seconds: float | None) -> str | None:
    """Solve group by group; the reason where that fails."""
    first = sound[0]
    layers = tuple(each.layer for each in sound)
    groups, filling = len(first.weight), _Filling(layers[0], step)
    for group in range(groups):
        try:
            metric = damped(first.samples[group].covariance) if task.inputs is not None else None
            part = None if seconds is None else seconds / groups
            weights = [filling.columns(each.goal[group]) for each in sound]
            found = solve(Problem(layers, weights, None if metric is None else filling.metric(metric), part))
        except np.linalg.LinAlgError:
            return "the moments of its inputs are singular in spite of damping"
        except ValueError as error:
            return str(error)
        for each, solution in zip(sound, found, strict=True):
            each.solutions.append(filling.undone(solution))
    return None


class _Filling:
    """Columns of zeros behind each tap, so that no group of a pattern reaches from one tap into the next.

    A row that ends within a group needs none: its last group is shorter.
    """

    def __init__(self, layer: SparseLayer, step: int) -> None:
        short = -layer.channels % step if layer.taps > 1 else 0
        wide = layer.channels + short
        self._width = wide * layer.taps
        self._place = np.add.outer(np.arange(layer.taps) * wide, np.arange(layer.channels)).ravel() if short else None

    def columns(self, weight: Floats) -> Floats:
        if self._place is None:
            return weight
        filled = np.zeros((len(weight), self._width))
        filled[:, self._place] = weight
        return filled

    def metric(self, metric: Floats) -> Floats:
        if self._place is None:
            return metric
        filled = np.mean(np.diag(metric)) * np.eye(self._width)
        filled[np.ix_(self._place, self._place)] = metric
        return filled

    def undone(self, solution: Solution) -> Solution:
        if self._place is None:
            return solution
        factors = solution.factors
        if factors is not None:
            factors = replace(factors, core=factors.core[:, self._place])
        return Solution(solution.weight[:, self._place], factors)


@dataclass
class _Work:
    """A layer on its way.

    Attributes:
        layer: which.
        weight, bias: as they are, (groups, outputs, columns) tap by tap, (outputs,).
        samples: moments by group; empty without data; uncentred where the layer has no bias.
        fitted: whether the goal is the samples' second stream.
        goal: what the sparse weight is to come close to.
        solutions: by group.
    """

    layer: SparseLayer
    weight: Floats
    bias: Floats
    samples: list[Sample]
    means: list[Floats]
    fitted: bool
    goal: Floats
    solutions: list[Solution]

    def finished(self, max_error: float | None) -> Fitted | Refused:
        """Weight, bias and error, or the reason why not."""
        new = np.stack([solution.weight for solution in self.solutions])
        if not np.isfinite(new).all():
            return Refused(
                self.layer, "no finite weights were found: its inputs are nearly dependent or of extreme size"
            )
        bias, errors = self.bias.copy(), []
        rows = len(bias) // len(new)
        for group, sample in enumerate(self.samples):
            errors.append(self._error(group, new[group]))
            if self.layer.layer.has_bias:
                own = slice(group * rows, (group + 1) * rows)
                if self.fitted:
                    bias[own] = sample.mean_y - new[group] @ sample.mean_x
                else:
                    bias[own] += (self.weight[group] - new[group]) @ self.means[group]
        error = float(np.mean(errors)) if errors else None
        if error is not None and max_error is not None and not error <= max_error:
            return Refused(self.layer, f"its error of {error:.2%} would exceed max_error={max_error:g}")
        if not (self.layer.layer.fits(new) and self.layer.layer.fits(bias)):
            return Refused(self.layer, f"its new weights overflow {self.layer.layer.dtype}")
        observations = min(each.n for each in self.samples) if self.samples else None
        factors = [solution.factors for solution in self.solutions]
        return Fitted(self.layer, new, bias, factors, error, observations)

    def _error(self, group: int, new: Floats) -> float:
        sample = self.samples[group]
        if not self.fitted:
            return relative_error(self.weight[group], new, sample.covariance)
        signal = float(sample.variance_y.sum())
        return float(least_squares.residual(sample, new).sum()) / signal if signal > 0 else 0.0


def _work(task: Task, place: int) -> _Work | Refused:
    layer = task.layers[place]
    weight, bias = layer.weight(), layer.layer.bias()
    try:
        for group in weight:
            check_weight(group)
    except ValueError as error:
        return Refused(layer, str(error))
    if task.inputs is None:
        return _Work(layer, weight, bias, [], [], False, weight, [])
    if not all(moments.n for moments in task.inputs):
        return Refused(layer, "nothing of the calibration data reaches it")
    if any(_constant(moments) for moments in task.inputs):
        seen = task.inputs[0].n
        return Refused(
            layer, f"its inputs never vary over the {seen} positions of the calibration data; give more samples"
        )
    goals = task.goals[place] if task.goals is not None else [None] * len(task.inputs)
    samples = [_sample(layer, moments, goal) for moments, goal in zip(task.inputs, goals, strict=True)]
    goal = weight
    if task.goals is not None:
        if not all(np.isfinite(part).all() for each in samples for part in (each.covariance, each.cross)):
            return Refused(layer, "the moments of its inputs or of its wanted outputs are not finite")
        goal = np.stack(
            [
                least_squares.solve(each.covariance, each.cross, dense, DAMPING)
                for each, dense in zip(samples, weight, strict=True)
            ]
        )
    means = [layer.by_tap(np.asarray(moments.mean)) for moments in task.inputs]
    return _Work(layer, weight, bias, samples, means, task.goals is not None, goal, [])


def _constant(moments: Moments) -> bool:
    """Whether inputs are always the same and not zero: nothing is known of how the layer answers to others."""
    with np.errstate(all="ignore"):
        mean = np.asarray(moments.mean)
        return bool(np.all(moments.variance == 0) and np.isfinite(mean).all() and mean.any())


def _sample(layer: SparseLayer, moments: Moments, goal: Moments | None) -> Sample:
    """Tap by tap; second moments in place of centred ones where there is no bias to take up the mean."""
    with np.errstate(all="ignore"):
        mean = layer.by_tap(np.asarray(moments.mean))
        raw = moments.covariance if layer.layer.has_bias else moments.second
        covariance = layer.by_tap(layer.by_tap(np.asarray(raw)).T).T
        nothing = np.zeros(0)
        if goal is None:
            return Sample(moments.n, mean, nothing, covariance, nothing, nothing)
        cross, mean_y, variance = layer.by_tap(np.asarray(goal.cross)), goal.mean_y, goal.variance_y
        if layer.layer.has_bias:
            return Sample(moments.n, mean, mean_y, covariance, cross, variance)
        cross = cross + np.outer(mean_y, mean)
        return Sample(moments.n, mean, mean_y, covariance, cross, variance + mean_y**2)
