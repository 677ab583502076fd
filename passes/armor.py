"""armor: W ~ A S B, a sparse core between block-diagonal wrappers, fitted to the layer's own error.

    A, S, B = argmin tr((W - A S B) H (W - A S B)^T),    S with N of every M,    A and B block-diagonal

by alternating exact steps (graphopt.numerics.sparsity.armor); the bias takes over the mean of the difference as in
`sparsify`. Blocks are as large as `overhead` allows: with `wrappers=in`, b n <= overhead m n parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.errors import DataError, UsageError

if TYPE_CHECKING:
    from graphopt.numerics.sparsity.patterns import Pattern
    from graphopt.sparsity.layers import Floats, SparseLayer
    from graphopt.sparsity.refit import Inputs


@dataclass(frozen=True)
class Armor(Pass):
    """Factorise weights into a sparse core and block-diagonal wrappers that make up for the zeros.

    A 2:4 core alone bends a layer far more than one between wrappers of a few per cent of its parameters. Targets with
    sparse tensor cores get the factors (`form=factors`), so that the core runs at up to twice the speed; others get the
    product multiplied out (`form=dense`): dense weights, dense speed, and the report says so.

    Does not fire: where `sparsify` does not, on layers for which no block of whole groups fits into `overhead`, and for
    `form=factors` on grouped convolutions and inputs of unknown rank. Preserves: names, shapes and types of parameters;
    new nodes are named after their layer.
    Source: ARMOR, arXiv:2510.05528 (the factorisation, and `objective=paper`); the full-Hessian objective, exact
    wrappers and sweeps over all groups: graphopt.numerics.sparsity.armor.
    """

    name: ClassVar[str] = "armor"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs_calibration: ClassVar[bool] = True

    pattern: str = option("2:4", "what stays of the core, N:M")
    form: Literal["auto", "factors", "dense"] = option("auto", "auto: factors where the target skips zeros")
    overhead: float = option(0.05, "elements of the wrappers relative to the weight's", low=0.001, high=1.0)
    wrappers: Literal["in", "out", "both"] = option("in", "which sides of the core have one")
    objective: Literal["hessian", "paper"] = option("hessian", "the layer's error, or the paper's diagonal proxy")
    cycles: int = option(20, "rounds over wrappers and core at most", low=1)
    smallest: int = option(16, "layers with fewer input channels stay dense", low=1)
    exclude: tuple[str, ...] = option((), "globs over node and weight names that stay dense")
    samples: int | None = option(None, "calibration samples to use at most; default: all", low=1)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: out of range, or no pattern of groups.
        """
        super().__post_init__()
        self._pattern()

    def _pattern(self) -> Pattern:
        from graphopt.numerics.sparsity.patterns import parse

        try:
            pattern = parse(self.pattern)
        except ValueError as error:
            raise UsageError(str(error), where="armor.pattern", hint="armor{pattern=2:4}") from error
        if not pattern.of:
            raise UsageError("a core needs groups", where="armor.pattern", hint="armor{pattern=2:4}")
        return pattern

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        from graphopt.sparsity.layers import prepare, sparse_layers
        from graphopt.sparsity.refit import layers_with_inputs, record, speed_note

        if ctx.calibration is None:
            raise DataError("no calibration data", where="armor", hint="give unlabelled samples with --calib")
        result = PassResult(changed=False, notes=prepare(model))
        layers, result.skipped = sparse_layers(model, self._pattern(), self.exclude, self.smallest)
        written = self.form == "factors" or (self.form == "auto" and ctx.target.sparsity_2_4)
        for layer, inputs in layers_with_inputs(model, layers, ctx, self.samples):
            record(result, layer, self._factorise(model, layer, inputs, written=written), f"{self.pattern} cores")
        speed_note(ctx, result)
        return result

    def _factorise(
        self, model: ir.Model, layer: SparseLayer, inputs: list[Inputs] | None, *, written: bool
    ) -> dict[str, Any] | str:
        """Factorise one layer: a row for the report, or the reason why it was left alone."""
        import numpy as np

        from graphopt.numerics.sparsity.armor import Factors, armor
        from graphopt.sparsity.factors import factors_blocked, write_factors
        from graphopt.sparsity.marks import declare_pattern
        from graphopt.sparsity.refit import fitted

        blocked = factors_blocked(layer) if written else None
        block = self._block(layer, dividing=written)
        if blocked or not block:
            return blocked or f"no block of whole groups costs at most {self.overhead:.1%} of its weights"
        factors: list[Factors] = []

        def solve(weight: Floats, metric: Floats | None) -> Floats:
            assert metric is not None  # `run` asked for data
            factors.append(
                armor(
                    weight.astype(np.float32),
                    metric,
                    self._pattern(),
                    block=block,
                    objective=self.objective,
                    wrappers=self.wrappers,
                    taps=layer.taps,
                    cycles=self.cycles,
                )
            )
            return np.asarray(factors[-1].dense(), dtype=np.float64)

        found = fitted(layer, inputs, solve)
        if isinstance(found, str):
            return found
        if written:
            write_factors(model, layer, factors[0], found.bias)
            declare_pattern(layer.layer.linear.node, self._pattern())
        else:
            refused = layer.store(found.weight, found.bias)
            if refused:
                return refused
        return found.row(layer) | {"block": block, "overhead": factors[0].overhead()}

    def _block(self, layer: SparseLayer, *, dividing: bool) -> int:
        """The largest block that `overhead` allows; `dividing`: that divides the channels it runs along."""
        from graphopt.numerics.sparsity.armor import block_size

        pattern, linear = self._pattern(), layer.layer.linear
        outputs = linear.outputs // layer.layer.groups
        size = block_size(outputs, layer.channels * layer.taps, self.overhead, self.wrappers, pattern, layer.taps)
        sides = {"in": (layer.channels,), "out": (outputs,), "both": (layer.channels, outputs)}[self.wrappers]
        while dividing and size and any(side % size for side in sides):
            size -= pattern.of
        return size
