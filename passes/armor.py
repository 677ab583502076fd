"""armor: W ~ A S B, a sparse core between block-diagonal wrappers, fitted to the layer's own error.

    A, S, B = argmin tr((W - A S B) H (W - A S B)^T),    S with N of every M,    A and B block-diagonal

by alternating exact steps (graphopt.numerics.sparsity.armor); the bias takes over the mean of the difference as in
`sparsify`. Blocks are as large as `overhead` allows: with `wrappers=in`, b n <= overhead m n parameters, where m counts
the rows of all layers that share the wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, PassResult, Skip, option
from graphopt.errors import DataError, UsageError
from graphopt.sparsity.base import SparsePass

if TYPE_CHECKING:
    from graphopt.numerics.sparsity.armor import Factors
    from graphopt.sparsity.layers import SparseLayer
    from graphopt.sparsity.refit import Fitted, Problem, Solution
    from graphopt.sparsity.tasks import Set


@dataclass(frozen=True)
class Armor(SparsePass):
    """Factorise weights into a sparse core and block-diagonal wrappers that make up for the zeros.

    A 2:4 core alone bends a layer far more than one between wrappers of a few per cent of its parameters. Targets with
    sparse tensor cores get the factors (`form=factors`), so that the core runs at up to twice the speed; others get the
    product multiplied out (`form=dense`): dense weights, dense speed, and the report says so. With `shared`, layers
    that read the same tensor (queries, keys and values; gate and up) share the wrapper before them: one product instead
    of one a layer, with larger blocks at the same overhead.

    Does not fire: where `sparsify` does not, on layers for which no block of whole groups fits into `overhead`, and for
    `form=factors` on grouped convolutions and inputs of unknown rank. Preserves: names, shapes and types of parameters;
    new nodes are named after their layer.
    Source: ARMOR, arXiv:2510.05528 (the factorisation, and `objective=paper`); the full-Hessian objective, exact
    wrappers and sweeps over all groups: graphopt.numerics.sparsity.armor.
    """

    name: ClassVar[str] = "armor"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs_calibration: ClassVar[bool] = True
    made: ClassVar[str] = "cores"

    form: Literal["auto", "factors", "dense"] = option("auto", "auto: factors where the target skips zeros")
    overhead: float = option(0.05, "elements of the wrappers relative to the weights'", low=0.001, high=1.0)
    wrappers: Literal["in", "out", "both"] = option("in", "which sides of the core have one")
    shared: bool | Literal["auto"] = option(
        "auto", "one input wrapper for all layers that read the same; auto: where factors are written"
    )
    objective: Literal["hessian", "paper"] = option("hessian", "the layer's error, or the paper's diagonal proxy")
    cycles: int = option(20, "rounds over wrappers and core at most", low=1)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: out of range, no pattern, or a wrapper to share that there is not.
        """
        super().__post_init__()
        if not self._pattern().of:
            raise UsageError("a core needs groups", where="armor.pattern", hint="armor{pattern=2:4}")
        if self.shared is True and self.wrappers == "out":
            raise UsageError(
                "wrappers=out has no wrapper before the core to share", where="armor.shared", hint="say wrappers=in"
            )

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        if ctx.calibration is None:
            raise DataError("no calibration data", where="armor", hint="give unlabelled samples with --calib")
        return super().run(model, ctx)

    @property
    def _propagates(self) -> bool:
        return self.objective == "hessian"

    def _factors(self, ctx: Context) -> bool:
        """Whether the factors are written, not their product."""
        return self.form == "factors" or (self.form == "auto" and ctx.target.sparsity_2_4)

    def _sets(self, layers: list[SparseLayer], ctx: Context, result: PassResult) -> Sequence[Set]:
        from graphopt.sparsity.factors import factors_blocked

        written = self._factors(ctx)
        shared = (written if self.shared == "auto" else self.shared) and self.wrappers != "out"
        readers: dict[Any, list[SparseLayer]] = {}
        for layer in layers:
            reason = factors_blocked(layer) if written else None
            if reason:
                result.skipped.append(Skip(layer.layer.label, reason))
            else:
                key = layer.reads if shared and layer.layer.groups == 1 else layer.layer.key
                readers.setdefault(key, []).append(layer)
        sets = []
        for each in readers.values():
            if self._block(tuple(each), dividing=written):
                sets.append(tuple(each))
            else:
                result.skipped += [Skip(layer.layer.label, self._too_small()) for layer in each]
        return sets

    def _solve(self, problem: Problem, ctx: Context) -> Sequence[Solution]:
        import numpy as np

        from graphopt.numerics.sparsity.armor import armor, armor_shared
        from graphopt.sparsity.refit import Solution

        pattern, layers = self._pattern(), problem.layers
        block = self._block(layers, dividing=self._factors(ctx))
        if not block:  # layers that shared the block dropped out
            raise ValueError(self._too_small())
        assert problem.metric is not None  # `run` asked for data
        options: dict[str, Any] = {
            "block": block, "objective": self.objective, "wrappers": self.wrappers, "taps": layers[0].taps,
            "cycles": self.cycles, "seconds": problem.seconds,
        }  # fmt: skip
        weights = [weight.astype(np.float32) for weight in problem.weights]
        if len(weights) == 1:
            found = [armor(weights[0], problem.metric, pattern, **options)]
        else:
            found = armor_shared(weights, problem.metric, pattern, **options)
        if self._factors(ctx) and not all(layers[0].layer.fits(part) for each in found for part in _parts(each)):
            raise ValueError(f"its factors overflow {layers[0].layer.dtype}")
        return [Solution(np.asarray(each.dense(), dtype=np.float64), each) for each in found]

    def _write(self, model: ir.Model, found: list[Fitted], ctx: Context) -> None:
        from graphopt.sparsity.factors import write_shared
        from graphopt.sparsity.marks import declare_pattern

        if not self._factors(ctx):
            for each in found:
                each.layer.store(each.weight, each.bias)
            return
        write_shared(
            model,
            [each.layer for each in found],
            [each.factors[0] for each in found],
            [each.bias for each in found],
        )
        for each in found:
            declare_pattern(each.layer.layer.linear.node, self._pattern())

    def _row(self, found: Fitted) -> dict[str, Any]:
        factors = found.factors[0]
        side = factors.right if factors.right is not None else factors.left
        return found.row() | {"block": int(side.shape[1]), "overhead": factors.overhead()}

    def _too_small(self) -> str:
        return f"no block of whole groups costs at most {self.overhead:.1%} of its weights"

    def _block(self, layers: Set, *, dividing: bool) -> int:
        """The largest block that `overhead` allows; `dividing`: that divides the channels it runs along."""
        from graphopt.numerics.sparsity.armor import block_size

        pattern, first = self._pattern(), layers[0]
        outputs = [each.layer.linear.outputs // each.layer.groups for each in layers]
        width = first.channels * first.taps
        size = block_size(sum(outputs), width, self.overhead, self.wrappers, pattern, first.taps)
        sides = {"in": (first.channels,), "out": outputs, "both": (first.channels, *outputs)}[self.wrappers]
        while dividing and size and any(side % size for side in sides):
            size -= pattern.of
        return size


def _parts(factors: Factors) -> list[Any]:
    return [part for part in (factors.core, factors.left, factors.right) if part is not None]
