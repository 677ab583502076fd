"""prune: choose live units, remove them and let the layers that read them make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.analysis.units import Coupling
    from graphopt.pruning.families import Candidates
    from graphopt.pruning.layers import Layer
    from graphopt.pruning.selection import Choice, Family, Term

BUDGETS = {
    "macs": "multiply-accumulates",
    "params": "parameters",
    "bytes": "bytes of the weights",
    "units": "units",
}
"""What each budget is a fraction of."""


@dataclass(frozen=True)
class Prune(Pass):
    """Remove channels, neurons and other units until a budget of work is met, and refit the layers that read them.

    What it does: the coupling analysis gives the units that must die together; each is ranked by the error it leaves
    once the other inputs of its readers compensate; a solver chooses how many of each family go, so that the budget is
    met at the least harm and every width keeps the multiple that the target's kernels want; then every disturbed layer
    is refitted by least squares, front to back, to what the dense model computes, and the dead units are cut out.

    Algebra: a reader y = W x of units K that stay becomes W' = (C_yx,K + lam W_K)(S_KK + lam I)^-1,
    b' = mean_y - W' mean_x,K, with moments of the calibration data (no labels, no training). See
    `graphopt.pruning.importance`, `graphopt.pruning.selection` and `graphopt.pruning.reconstruct`.

    Does not fire on: units that a graph input, output or an unknown operator freezes (`graphopt inspect --units` tells
    which and why), units whose removal is not exact for a reader that cannot be refitted, and what `exclude` names.

    Preserves: inputs and outputs of the model with their shapes, names of nodes and parameters. Lossy: guard it with
    `--max-drop`. Fewer multiply-accumulates are not less time: the report shows the measured latency beside them.

    Source: OBS: Hassibi & Stork, 1992; in groups with refitting: Frantar & Alistarh, arXiv:2208.11580; families of
    coupled units: Fang et al., DepGraph, arXiv:2301.12900, here solved on labels.
    """

    name: ClassVar[str] = "prune"
    effect: ClassVar[Effect] = Effect.LOSSY

    macs: float | None = option(None, "budget: the fraction of the multiply-accumulates to keep", low=0, high=1)
    params: float | None = option(None, "budget: the fraction of the parameters to keep", low=0, high=1)
    bytes: float | None = option(None, "budget: the fraction of the weights' bytes to keep", low=0, high=1)
    units: float | None = option(None, "budget: the fraction of the units to keep", low=0, high=1)
    score: Literal["obs", "l2", "random"] = option("obs", "how units are ranked; obs needs data, l2 is taken without")
    reconstruct: Literal["ls", "mean", "none"] = option(
        "ls", "ls refits weights and biases, mean only biases, none just cuts; ls and mean need data"
    )
    multiple: int | None = option(None, "widths are multiples of this, or full; default: the target's", low=1)
    min_keep: int = option(1, "channels that every axis keeps at least", low=1)
    exclude: tuple[str, ...] = option((), "globs over node and parameter names that must stay as they are")
    samples: int | None = option(None, "calibration samples to use at most; default: all", low=1)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: out of range, or not exactly one budget.
        """
        super().__post_init__()
        given = [(n, v) for n in BUDGETS if (v := getattr(self, n)) is not None]
        if len(given) != 1:
            what = "two budgets" if given else "no budget"
            hint = f"give one of {', '.join(f'{n}=' for n in BUDGETS)}, for example prune{{macs=0.7}}"
            raise UsageError(what, where="prune", hint=hint)
        if given[0][1] in (0.0, 1.0):
            raise UsageError(
                f"{given[0][0]}={given[0][1]:g} keeps nothing or all", where="prune", hint="give a fraction between"
            )

    @property
    def _budget(self) -> tuple[str, float]:
        """Which budget was given, and the fraction."""
        return next((n, v) for n in BUDGETS if (v := getattr(self, n)) is not None)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        from onnx_ir.passes.common import LiftConstantsToInitializersPass

        from graphopt.analysis.remove import remove_units
        from graphopt.analysis.units import analyse
        from graphopt.pruning.batchnorm_means import batchnorm_means
        from graphopt.pruning.families import candidates
        from graphopt.pruning.layers import drop_zero_biases, give_biases, layers_of
        from graphopt.pruning.selection import choose
        from graphopt.pruning.work import labelled_axes
        from graphopt.rewriting.edit import allow_private_initializers
        from graphopt.rewriting.prepare import prepare

        result = PassResult(changed=True)
        prepared, note = prepare(model), allow_private_initializers(model)
        result.notes += [*prepared, note] if note else prepared
        LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
        score, reconstruct = self._fallbacks(ctx, result)
        bare = give_biases(model) if reconstruct != "none" else []
        coupling = analyse(model)
        layers, _ = layers_of(model)
        families, notes = candidates(coupling, layers, self.exclude, refitted=reconstruct != "none")
        result.notes += notes
        result.skipped += [Skip(f"{f.tensor}, axis {f.axis}", f.reason) for f in coupling.frozen]
        terms = self._work_terms(model, coupling, ctx)
        if not terms:
            raise UsageError(
                "the multiply-accumulates of no layer are known, because sizes of tensors are not",
                where="prune",
                hint="fix sizes with --dim NAME=SIZE, or give the budget as params=",
            )
        ranked = self._rank(model, ctx, coupling, layers, families, score, result)
        choice = choose(
            ranked,
            terms,
            labelled_axes(coupling),
            keep=self._budget[1],
            multiple=self.multiple or ctx.target.channel_multiple,
            min_keep=self.min_keep,
        )
        self._check(choice, ranked, ctx)
        if not choice.dead:
            result.notes.append("nothing had to go: the budget is met already")
            result.changed = bool(prepared or note)
            drop_zero_biases(bare)
            return result
        dead = self._reconstruct(model, ctx, coupling, families, ranked, choice, reconstruct, result)
        values = None
        if ctx.calibration is None and self.reconstruct != "none":
            values, used = batchnorm_means(coupling)
            result.notes.append(
                f"means behind {used} BatchNormalization nodes stand in for what was cut"
                if used
                else "no BatchNormalization is left whose means could stand in for what was cut (prune before fold)"
            )
        report = remove_units(model, coupling, dead, values)
        drop_zero_biases(bare)
        result.notes += self._summary(choice, ranked, dead, ctx)
        result.notes += [f"{name}: a removed input held an unknown value, taken as 0" for name in report.assumed_zero
                         if reconstruct == "none"]  # fmt: skip
        result.details["families"] = [
            {"family": f.name, "units": len(f.units), "removed": k, "harm": float(f.harm[k])}
            for f, k in zip(ranked, choice.removed, strict=True)
        ]
        return result

    def _work_terms(self, model: ir.Model, coupling: Coupling, ctx: Context) -> Sequence[Term]:
        """What the budget is about; sizes that the model leaves open are those of the first calibration sample."""
        from graphopt.pruning.work import mac_terms, parameter_terms, unit_terms

        budget, _ = self._budget
        if budget == "units":
            return unit_terms(coupling)
        if budget in {"params", "bytes"}:
            return parameter_terms(coupling, in_bytes=budget == "bytes")
        sample = None if ctx.calibration is None else next(iter(ctx.calibration.batches(batch_size=1, limit=1)))
        return mac_terms(model, coupling, sample)

    def _fallbacks(self, ctx: Context, result: PassResult) -> tuple[str, str]:
        """Score and reconstruction that are possible with the data at hand; says so where they are not those asked."""
        if ctx.calibration is not None:
            return self.score, self.reconstruct
        if self.score == "obs" or self.reconstruct != "none":
            result.notes.append(
                "warning: pruned without calibration data: units are chosen by their weights and no layer is refitted, "
                "so accuracy will suffer; give data with --calib"
            )
        return ("l2" if self.score == "obs" else self.score), "none"

    def _rank(
        self,
        model: ir.Model,
        ctx: Context,
        coupling: Coupling,
        layers: dict[str, Layer],
        families: list[Candidates],
        score: str,
        result: PassResult,
    ) -> list[Family]:
        from graphopt.pruning.importance import Setting, at_random, by_reconstruction, by_weight

        if score == "random":
            return at_random(families, ctx.seed)
        if score == "l2" or ctx.calibration is None:
            return by_weight(coupling, families)
        setting = Setting(model, coupling, layers, ctx.calibration, self.samples, ctx.jobs, ctx.progress)
        ranked, notes = by_reconstruction(setting, families)
        result.notes += notes
        return ranked

    def _reconstruct(
        self,
        model: ir.Model,
        ctx: Context,
        coupling: Coupling,
        families: list[Candidates],
        ranked: list[Family],
        choice: Choice,
        mode: str,
        result: PassResult,
    ) -> set[int]:
        from graphopt.pipeline.clone import private_clone
        from graphopt.pruning.importance import silence
        from graphopt.pruning.reconstruct import Plan, reconstruct

        if mode == "none" or ctx.calibration is None:
            return set(choice.dead)
        removed = [f.units[:k] for f, k in zip(ranked, choice.removed, strict=True)]
        dense = private_clone(model)
        # what another operator than a refitted layer reads is zeroed first, as it will be missing in the end
        seen_elsewhere = {u for f, units in zip(families, removed, strict=True) if f.others for u in units}
        silence(model, coupling, seen_elsewhere)
        outcome = reconstruct(
            Plan(
                dense=dense,
                model=model,
                coupling=coupling,
                families=families,
                removed=removed,
                calibration=ctx.calibration,
                mode="ls" if mode == "ls" else "mean",
                samples=self.samples,
                threads=ctx.jobs,
                progress=ctx.progress,
                reselect=self.score == "obs",
            )
        )
        result.notes += outcome.notes
        what = "by least squares" if mode == "ls" else "in their biases"
        result.notes.append(
            f"{outcome.refitted} layers refitted {what} on {self.samples or ctx.calibration.samples or 'all'} samples"
        )
        if outcome.rows:
            result.details["refitted layers"] = outcome.rows
        return outcome.dead

    def _check(self, choice: Choice, families: list[Family], ctx: Context) -> None:
        if not choice.least:
            return
        multiple = self.multiple or ctx.target.channel_multiple
        name, fraction = self._budget
        units = sum(len(f.units) for f in families)
        raise UsageError(
            f"{name}={fraction:g} cannot be met: with all {units} candidate units gone that multiple={multiple} and "
            f"min_keep={self.min_keep} let go, {choice.least:.3f} is left",
            where="prune",
            hint="raise the budget, set multiple=1, or see `graphopt inspect --units` for what is frozen",
        )

    def _summary(self, choice: Choice, families: list[Family], dead: set[int], ctx: Context) -> list[str]:
        what = BUDGETS[self._budget[0]]
        touched = sum(k > 0 for k in choice.removed)
        return [
            f"removed {len(dead)} of {sum(len(f.units) for f in families)} units in {touched} of {len(families)} "
            f"families; {choice.kept:.4f} of the {what} stay, widths in multiples of "
            f"{self.multiple or ctx.target.channel_multiple}"
        ]
