"""One layer after the other: its metric, its new weight, its bias, a row for the report.

With the mean mu and the covariance S of a layer's inputs, any new weight V is best with the bias b' = b + (W - V) mu,
and what then remains of the error is tr((W - V) S (W - V)^T): layers with a bias are fitted in their covariance, others
in their second moments. All moments are those of the dense model, so the order of the layers does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, PassResult, Skip
from graphopt.numerics.sparsity.moments import check_weight, damped, relative_error
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.moments import input_moments

Solve = Callable[[Floats, Floats | None], Floats]
"""(W, S) -> V, both (outputs, columns) of one group, tap by tap; S is None where there is no calibration data."""


@dataclass(frozen=True)
class Inputs:
    """Statistics of what one group of a layer reads, tap by tap.

    Attributes:
        metric: (columns, columns): S.
        mean: (columns,): mu.
    """

    metric: Floats
    mean: Floats


def layers_with_inputs(
    model: ir.Model, layers: list[SparseLayer], ctx: Context, samples: int | None
) -> Iterator[tuple[SparseLayer, list[Inputs] | None]]:
    """Each layer with the statistics of its inputs in the model as it is now, one a group; None without data."""
    if ctx.calibration is None:
        yield from ((layer, None) for layer in layers)
        return
    stream = input_moments(model.clone(), layers, ctx.calibration, samples=samples, threads=ctx.jobs)
    done = 0
    for readers, moments in stream:
        for layer in readers:
            ctx.progress.step("sparse weights", done, len(layers))
            done += 1
            yield layer, [_inputs(layer, each) for each in moments]


def _inputs(layer: SparseLayer, moments: Any) -> Inputs:
    second = moments.covariance if layer.layer.has_bias else moments.second
    return Inputs(layer.by_tap(layer.by_tap(second).T).T, layer.by_tap(moments.mean))


@dataclass(frozen=True)
class Fitted:
    """New weights of a layer.

    Attributes:
        weight: (groups, outputs per group, columns), tap by tap.
        bias: (outputs,).
        error: relative to the layer's own signal on the calibration data; None without any.
    """

    weight: Floats
    bias: Floats
    error: float | None

    def row(self, layer: SparseLayer) -> dict[str, Any]:
        """For the report."""
        row: dict[str, Any] = {"layer": layer.layer.label, "shape": "x".join(map(str, self.weight.shape[1:]))}
        return row if self.error is None else row | {"error": self.error}


def fitted(layer: SparseLayer, inputs: list[Inputs] | None, solve: Solve) -> Fitted | str:
    """Solve for new weights, group by group, and the bias that goes with them; or the reason why there are none."""
    weight, bias = layer.weight(), layer.layer.bias().copy()
    new, errors = np.zeros_like(weight), []
    per_group = len(bias) // len(weight)
    for group, dense in enumerate(weight):
        known = inputs[group] if inputs is not None else None
        try:
            check_weight(dense)
            metric = damped(known.metric) if known is not None else None
            new[group] = solve(dense, metric)
        except ValueError as error:
            return str(error)
        if known is not None and metric is not None:
            errors.append(relative_error(dense, new[group], metric))
            if layer.layer.has_bias:
                bias[group * per_group : (group + 1) * per_group] += (dense - new[group]) @ known.mean
    return Fitted(new, bias, float(np.mean(errors)) if errors else None)


def record(result: PassResult, layer: SparseLayer, row: dict[str, Any] | str, title: str) -> None:
    """Write down what happened to a layer."""
    if isinstance(row, str):
        result.skipped.append(Skip(layer.layer.label, row))
    else:
        result.changed = True
        result.details.setdefault(title, []).append(row)


def speed_note(ctx: Context, result: PassResult) -> None:
    """Say so where the target does not run sparse weights faster."""
    if result.changed and not ctx.target.sparsity_2_4:
        result.notes.append(f"target {ctx.target.name} has no kernels that skip zeros: its speed stays the same")
