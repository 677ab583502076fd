"""sparsify: weights with N of every M zeroed along the input channels, the others refitted to make up for it.

For a layer y = W x + b with input mean mu and covariance S (second moments where it has no bias), W becomes the sparse
V that minimises the layer's own error, and the bias takes over the mean of what was cut:

    V = argmin tr((W - V) S (W - V)^T),      b' = b + (W - V) mu                       (graphopt.sparsity.refit)

`method=cd` (the default) descends over supports and values from SparseGPT's solution (numerics/sparsity/descent.py);
the other methods are the published ones (numerics/sparsity/one_shot.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, PassResult, option
from graphopt.errors import DataError
from graphopt.sparsity.base import SparsePass

if TYPE_CHECKING:
    from graphopt.sparsity.layers import Floats, SparseLayer
    from graphopt.sparsity.refit import Fitted, Problem, Solution
    from graphopt.sparsity.tasks import Set


@dataclass(frozen=True)
class Sparsify(SparsePass):
    """Make the weights of convolutions, Gemm and MatMul sparse: 2 of every 4 along the input channels, say.

    On hardware with sparse tensor cores such layers run up to twice as fast; a target without them gains only in
    storage, and the report says so. Weights keep their names and shapes, the zeros stand in place.

    Does not fire: on layers that the target's kernels would not run or not faster (too few channels, depthwise
    convolutions among them), on ConvTranspose, on layers in the bodies of If, Loop and Scan, on weights that are
    shared, computed, zero or not finite, on inputs that are all zero or not finite on the data, where the error would
    exceed `max_error`, on what `exclude` names. Preserves: names, shapes and types of everything; a convolution or Gemm
    may get a bias.
    Source: SparseGPT, arXiv:2301.00774; Wanda, arXiv:2306.11695; NoWag, arXiv:2504.14569; exact coordinate descent on
    the full second moments: graphopt.numerics.sparsity.descent.
    """

    name: ClassVar[str] = "sparsify"
    effect: ClassVar[Effect] = Effect.LOSSY

    method: Literal["cd", "sparsegpt", "wanda", "nowag", "magnitude"] = option(
        "cd", "how weights are chosen and refitted; all but magnitude need calibration data"
    )
    sweeps: int = option(6, "for method=cd: passes over all groups at most", low=1)

    def __post_init__(self) -> None:
        """Check the options, and ask for data before any work where the method needs it.

        Raises:
            UsageError: out of range, or no pattern.
        """
        super().__post_init__()
        object.__setattr__(self, "needs_calibration", self.method != "magnitude")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        if self.method != "magnitude" and ctx.calibration is None:
            raise DataError(
                f"method={self.method} weighs by what layers read, and there is no calibration data",
                where="sparsify",
                hint="give unlabelled samples with --calib, or sparsify{method=magnitude}",
            )
        return super().run(model, ctx)

    @property
    def _propagates(self) -> bool:
        return self.method == "cd"

    def _sets(self, layers: list[SparseLayer], ctx: Context, result: PassResult) -> Sequence[Set]:
        return [(layer,) for layer in layers]

    def _solve(self, problem: Problem, ctx: Context) -> Sequence[Solution]:
        from graphopt.sparsity.refit import Solution

        return [Solution(self._sparse(weight, problem.metric, problem.seconds)) for weight in problem.weights]

    def _sparse(self, weight: Floats, metric: Floats | None, seconds: float | None) -> Floats:
        import numpy as np

        from graphopt.numerics.sparsity.descent import coordinate_descent
        from graphopt.numerics.sparsity.one_shot import magnitude, nowag, sparsegpt, wanda

        pattern = self._pattern()
        single = weight.astype(np.float32)
        match self.method:
            case "wanda" | "nowag" if metric is not None:
                weighed = wanda if self.method == "wanda" else nowag
                found = weighed(weight, np.diag(metric), pattern)
            case "sparsegpt" if metric is not None:
                found = sparsegpt(single, metric, pattern)
            case "cd" if metric is not None:
                found = coordinate_descent(single, metric, pattern, sweeps=self.sweeps, seconds=seconds)
            case _:
                found = magnitude(weight, pattern)
        return np.asarray(found, dtype=np.float64)

    def _write(self, model: ir.Model, found: list[Fitted], ctx: Context) -> None:
        from graphopt.sparsity.marks import declare_pattern

        for each in found:
            each.layer.store(each.weight, each.bias)
            declare_pattern(each.layer.layer.linear.node, self._pattern())
