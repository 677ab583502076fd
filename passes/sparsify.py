"""sparsify: weights with N of every M zeroed along the input channels, the others refitted to make up for it.

For a layer y = W x + b with input mean mu and covariance S (second moments where it has no bias), W becomes the sparse
V that minimises the layer's own error, and the bias takes over the mean of what was cut:

    V = argmin tr((W - V) S (W - V)^T),      b' = b + (W - V) mu                       (graphopt.sparsity.refit)

`method=cd` (the default) descends over supports and values from SparseGPT's solution (numerics/sparsity/descent.py);
the other methods are the published ones (numerics/sparsity/one_shot.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.errors import DataError, UsageError

if TYPE_CHECKING:
    from graphopt.numerics.sparsity.patterns import Pattern
    from graphopt.sparsity.layers import Floats


@dataclass(frozen=True)
class Sparsify(Pass):
    """Make the weights of convolutions, Gemm and MatMul sparse: 2 of every 4 along the input channels, say.

    On hardware with sparse tensor cores such layers run up to twice as fast; a target without them gains only in
    storage, and the report says so. Weights keep their names and shapes, the zeros stand in place.

    Does not fire: on layers with fewer input channels than `smallest` (depthwise convolutions among them), on
    ConvTranspose, on weights that are shared, computed, zero or not finite, on inputs that are all zero on the data, on
    what `exclude` names. Preserves: names, shapes and types of everything; a convolution or Gemm may get a bias.
    Source: SparseGPT, arXiv:2301.00774; Wanda, arXiv:2306.11695; NoWag, arXiv:2504.14569; exact coordinate descent on
    the full second moments: graphopt.numerics.sparsity.descent.
    """

    name: ClassVar[str] = "sparsify"
    effect: ClassVar[Effect] = Effect.LOSSY

    pattern: str = option("2:4", "what stays: N:M (2:4, 1:4, 4:8) or a share of all weights (50%)")
    method: Literal["cd", "sparsegpt", "wanda", "nowag", "magnitude"] = option(
        "cd", "how weights are chosen and refitted; all but magnitude need calibration data"
    )
    sweeps: int = option(6, "for method=cd: passes over all groups at most", low=1)
    smallest: int = option(16, "layers with fewer input channels stay dense", low=1)
    exclude: tuple[str, ...] = option((), "globs over node and weight names that stay dense")
    samples: int | None = option(None, "calibration samples to use at most; default: all", low=1)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: out of range, or no pattern.
        """
        super().__post_init__()
        self._pattern()

    def _pattern(self) -> Pattern:
        from graphopt.numerics.sparsity.patterns import parse

        try:
            return parse(self.pattern)
        except ValueError as error:
            raise UsageError(str(error), where="sparsify.pattern", hint="sparsify{pattern=2:4}") from error

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        from graphopt.sparsity.layers import prepare, sparse_layers
        from graphopt.sparsity.marks import declare_pattern
        from graphopt.sparsity.refit import fitted, layers_with_inputs, record, speed_note

        if self.method != "magnitude" and ctx.calibration is None:
            raise DataError(
                f"method={self.method} weighs by what layers read, and there is no calibration data",
                where="sparsify",
                hint="give unlabelled samples with --calib, or sparsify{method=magnitude}",
            )
        result = PassResult(changed=False, notes=prepare(model))
        layers, result.skipped = sparse_layers(model, self._pattern(), self.exclude, self.smallest)
        for layer, inputs in layers_with_inputs(model, layers, ctx, self.samples):
            found = fitted(layer, inputs, self._solve)
            row = found if isinstance(found, str) else layer.store(found.weight, found.bias) or found.row(layer)
            if not isinstance(row, str):
                declare_pattern(layer.layer.linear.node, self._pattern())
            record(result, layer, row, f"{self.pattern} layers")
        speed_note(ctx, result)
        return result

    def _solve(self, weight: Floats, metric: Floats | None) -> Floats:
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
                found = coordinate_descent(single, metric, pattern, sweeps=self.sweeps)
            case _:
                found = magnitude(weight, pattern)
        return np.asarray(found, dtype=np.float64)
