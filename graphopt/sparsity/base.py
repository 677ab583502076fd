"""What `sparsify` and `armor` have in common: options, and the way through a model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.base import Context, Pass, PassResult, Skip, option
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from graphopt.numerics.sparsity.patterns import Pattern
    from graphopt.parallel import Workers
    from graphopt.sparsity.layers import SparseLayer
    from graphopt.sparsity.refit import Budget, Fitted, Problem, Refused, Solution
    from graphopt.sparsity.tasks import Set, Stages, Task


@dataclass(frozen=True)
class SparsePass(Pass):
    """A pass that replaces the weights of linear layers."""

    made: ClassVar[str] = "layers"
    """What the report's table lists."""

    pattern: str = option("2:4", "what stays: N:M (2:4, 1:4, 4:8) or a share of all weights (50%)")
    max_error: float | None = option(
        None, "layers whose output would be further off stay dense (relative squared error)", low=0
    )
    propagate: bool | None = option(
        None,
        "fit layers front to back, behind the sparse ones, to the dense outputs; default: but for published methods",
    )
    smallest: int | None = option(None, "layers with fewer channels stay dense; default: the target's", low=1)
    exclude: tuple[str, ...] = option((), "globs over node and weight names that stay dense")
    samples: int | None = option(None, "calibration samples to use at most; default: all", low=1)
    memory: int = option(
        1024, "MiB of input moments held at once; more layers than fit are more passes over the data", low=1
    )
    seconds: float | None = option(
        None, "time for the fits; what measuring inputs takes is taken from it; not the same bytes twice", low=0
    )

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
            hint = f"{self.name}{{pattern=2:4}}"
            raise UsageError(str(error), where=f"{self.name}.pattern", hint=hint) from error

    @property
    @abstractmethod
    def _propagates(self) -> bool:
        """What `propagate` is by default."""

    @abstractmethod
    def _sets(self, layers: list[SparseLayer], ctx: Context, result: PassResult) -> Sequence[Set]:
        """Which layers are solved together; those left out are told to `result`."""

    @abstractmethod
    def _solve(self, problem: Problem, ctx: Context) -> Sequence[Solution]:
        """Weights of the pattern for one problem."""

    @abstractmethod
    def _write(self, model: ir.Model, found: list[Fitted], ctx: Context) -> None:
        """Put new weights of a set into the model."""

    def _row(self, found: Fitted) -> dict[str, Any]:
        """A layer's line in the report."""
        return found.row()

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        from graphopt.parallel import Workers
        from graphopt.sparsity.layers import prepare, sparse_layers
        from graphopt.sparsity.refit import Budget, cost

        began = _now()
        result = PassResult(changed=False, notes=prepare(model))
        kernels = ctx.target.sparse
        if self.smallest is not None:
            outputs = min(kernels.outputs, self.smallest)
            kernels = replace(kernels, inputs=self.smallest, outputs=outputs, kernel_positions=False)
        layers, result.skipped = sparse_layers(model, self._pattern(), self.exclude, kernels)
        sets = self._sets(layers, ctx, result)
        budget = None
        if self.seconds is not None:
            budget = Budget(self.seconds - (_now() - began), sum(map(cost, sets)), ctx.jobs)
        with Workers(ctx.jobs) as workers:
            self._carry_out(model, sets, ctx, result, workers, budget)
        self._tell(ctx, result)
        return result

    def _carry_out(
        self,
        model: ir.Model,
        sets: Sequence[Set],
        ctx: Context,
        result: PassResult,
        workers: Workers,
        budget: Budget | None,
    ) -> None:
        from graphopt.sparsity.refit import Fitted, fit

        title = f"{self.pattern} {self.made}"
        thin: list[Fitted] = []
        done, total = 0, sum(map(len, sets))
        stages, step = self._stages(model, sets, ctx, workers), self._pattern().of or 1

        def fitted(task: Task) -> list[Fitted | Refused]:
            return fit(task, lambda problem: self._solve(problem, ctx), step, budget, self.max_error)

        for stage in stages.stages():
            ctx.progress.step("sparse weights", done, total)
            for outcomes in workers.map(fitted, stage):
                found = [each for each in outcomes if isinstance(each, Fitted)]
                for each in found:
                    stages.solved(each.layer, each.weight, each.bias)
                    result.details.setdefault(title, []).append(self._row(each))
                if found:
                    result.changed = True
                    self._write(model, found, ctx)
                result.skipped += [Skip(r.layer.layer.label, r.reason) for r in outcomes if not isinstance(r, Fitted)]
                thin += [each for each in found if (each.observations or each.weight.shape[2]) < each.weight.shape[2]]
                done += len(outcomes)
                ctx.progress.step("sparse weights", done, total)
        if thin:
            one = thin[0]
            result.notes.append(
                f"warning: layers that saw fewer positions of the data than they have inputs: {len(thin)} "
                f"({one.layer.layer.label}: {one.observations} for {one.weight.shape[2]}), so that their errors are "
                "larger than reported; give more samples"
            )

    def _stages(self, model: ir.Model, sets: Sequence[Set], ctx: Context, workers: Workers) -> Stages:
        from graphopt.sparsity.moments import Measured
        from graphopt.sparsity.sequential import Sequential
        from graphopt.sparsity.tasks import Unmeasured

        if ctx.calibration is None:
            return Unmeasured(sets)
        if self._propagates if self.propagate is None else self.propagate:
            return Sequential(model, sets, ctx.calibration, self.samples, workers)
        return Measured(model, sets, ctx.calibration, self.samples, workers, self.memory << 20)

    def _tell(self, ctx: Context, result: PassResult) -> None:
        """Say what the user might expect and will not get."""
        if not result.changed:
            return
        if not ctx.target.sparsity_2_4:
            name = ctx.target.name
            result.notes.append(f"target {name} has no kernels that skip zeros: its speed stays the same")
        elif (self._pattern().keep, self._pattern().of) != (2, 4):
            result.notes.append(f"target {ctx.target.name} skips zeros of 2:4 only, not of {self.pattern}")
        if self.seconds is not None:
            result.notes.append(f"seconds={self.seconds:g} ends the fits: another run will not give the same bytes")


def _now() -> float:
    import time

    return time.monotonic()
