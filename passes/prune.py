"""prune: choose live units, remove them and let the layers that read them make up for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.analysis.units import Coupling
    from graphopt.latency.budget import LatencyBudget
    from graphopt.pruning.branches import Branch
    from graphopt.pruning.decision import Decision
    from graphopt.pruning.erasing import Eraser
    from graphopt.pruning.families import Candidates
    from graphopt.pruning.selection import Erasures, Family, Term
    from graphopt.pruning.turning import Turned
    from graphopt.rewriting.layers import Layer

BUDGETS = {
    "macs": "multiply-accumulates",
    "params": "parameters",
    "bytes": "bytes of the weights",
    "units": "units",
    "latency": "time",
}
"""What each budget is a fraction of."""

Kind = Literal["channel", "head", "kv_group", "query_head", "head_dim", "group", "group_channel"]
"""Kinds of units, `graphopt.analysis.members.Mode`."""


@dataclass(frozen=True)
class Prune(Pass):
    """Remove channels, neurons and other units until a budget of work is met, and refit the layers that read them.

    What it does: the coupling analysis gives the units that must die together; each is ranked by the error it leaves
    once the other inputs of its readers compensate; a solver chooses how many of each family go, so that the budget is
    met at the least harm and every width keeps the multiple that the target's kernels want; then every disturbed layer
    is refitted by least squares, front to back, to what the dense model computes, and the dead units are cut out.
    Channel shuffles become a Gather each where that harms less (`graphopt.pruning.shuffled`).

    Algebra: a reader y = W x of units K that stay becomes W' = (C_yx,K + lam W_K)(S_KK + lam I)^-1,
    b' = mean_y - W' mean_x,K, with moments of the calibration data (no labels, no training). See
    `graphopt.pruning.importance`, `graphopt.pruning.selection` and `graphopt.pruning.reconstruct`. With `distil` all
    float weights are then trained to match the dense outputs and residual sums (`graphopt.fx.distil`).

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
    latency: float | None = option(None, "budget: time of the result over time of this pass's input", low=0, high=1)
    precision: Literal["same", "int8"] = option(
        "same", "with latency=: what the result is timed as; int8 where quantize follows (the input stays as it is)"
    )
    table: str | None = option(None, "with latency=: file of a table measured on another device (bench --table --json)")
    erase: bool | None = option(None, "whole residual branches may go; default: with latency= and data")
    score: Literal["obs", "taylor", "flap", "l2", "l1", "lamp", "fpgm", "random"] = option(
        "obs", "how units are ranked; obs, flap and taylor (which needs torch) need data, l2 is taken without"
    )
    reconstruct: Literal["ls", "mean", "none"] = option(
        "ls", "ls refits weights and biases, mean only biases, none just cuts; ls and mean need data"
    )
    multiple: int | None = option(None, "widths are multiples of this, or full; default: the target's", low=1)
    min_keep: int = option(1, "channels that every axis keeps at least", low=1)
    exclude: tuple[str, ...] = option((), "globs over node and parameter names that must stay as they are")
    fixed: tuple[Kind, ...] = option(
        (), "kinds of units that stay (inspect --units tells them): with head_dim attention loses whole heads only"
    )
    gather: bool = option(True, "channel shuffles become Gathers where that harms less at the same budget")
    center: bool = option(True, "layer norms whose channels go become RMS norms where that is exact (center-norms)")
    samples: int | None = option(None, "calibration samples to use at most; default: all", low=1)
    sweeps: int = option(1, "how often all layers are refitted; from the second on where a Relu forgives", low=1)
    refine: Literal["none", "blockwise"] = option(
        "none", "blockwise: also move layers before a cut towards what the next layer puts out; about thrice the time"
    )
    distil: int = option(0, "steps of training to match the dense outputs, without labels; needs data and torch", low=0)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: out of range, not exactly one budget, or an unknown kind of unit.
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

        if self.latency is None and (self.table is not None or self.precision != "same"):
            hint = "give the budget as latency=, or leave them out"
            raise UsageError("table= and precision= are of the budget latency= only", where="prune", hint=hint)

        unknown = [kind for kind in self.fixed if kind not in get_args(Kind)]
        if unknown:
            hint = f"kinds are {', '.join(get_args(Kind))}"
            raise UsageError(f"there is no kind of unit {unknown[0]!r}", where="prune.fixed", hint=hint)

    @property
    def budget(self) -> tuple[str, float]:
        """Which budget was given, and the fraction."""
        return next((n, v) for n in BUDGETS if (v := getattr(self, n)) is not None)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        from onnx_ir.passes.common import LiftConstantsToInitializersPass

        from graphopt.pruning.shuffled import choose_form
        from graphopt.rewriting.centring import restore_layer_norms
        from graphopt.rewriting.constants import allow_private_initializers
        from graphopt.rewriting.names import Names
        from graphopt.rewriting.prepare import prepare

        result = PassResult(changed=True)
        if self.distil:
            from graphopt.fx.after_pruning import check_distillable

            check_distillable(model, ctx)
        prepared, note = prepare(model), allow_private_initializers(model)
        result.notes += [*prepared, note] if note else prepared
        LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
        # channels of a stream between RMS norms go without a trace; copies of shared tables would spoil the budget
        centred = self.center and ctx.resolve("center-norms")(copies=0.0).run(model, ctx).changed  # type: ignore[call-arg]
        score, reconstruct = self._fallbacks(ctx, result)
        form = choose_form(
            model, lambda form: _Run(self, form, ctx, score, reconstruct, given=model), gather=self.gather
        )
        done = form.trial.go()
        result.notes += form.trial.result.notes
        result.skipped += form.trial.result.skipped
        result.details |= form.trial.result.details
        if done and form.rows:
            result.notes.append(form.note)
            result.details["shuffles"] = form.rows
        model.graph = form.trial.model.graph
        if centred and (norms := restore_layer_norms(model.graph, Names(model))):
            result.notes.append(f"{norms} layer norms whose channels were cut are RMS norms now (see center-norms)")
        if not done:
            result.notes.append("nothing had to go: the budget is met already")
            result.changed = bool(prepared or note or centred)
        return result

    def _fallbacks(self, ctx: Context, result: PassResult) -> tuple[str, str]:
        """Score and reconstruction that are possible with the data at hand; says so where they are not those asked."""
        if ctx.calibration is not None:
            return self.score, self.reconstruct
        needs = self.score in {"obs", "flap", "taylor"}
        if needs or self.reconstruct != "none":
            result.notes.append(
                "warning: pruned without calibration data: units are chosen by their weights and no layer is refitted, "
                "so accuracy will suffer; give data with --calib"
            )
        return ("l2" if needs else self.score), "none"


class _Run:
    """One run of the pass on one form of the model: decided when it is made, carried out by `go`."""

    def __init__(
        self, options: Prune, model: ir.Model, ctx: Context, score: str, reconstruct: str, *, given: ir.Model
    ) -> None:
        from graphopt.analysis.units import analyse
        from graphopt.pruning.families import candidates
        from graphopt.rewriting.layers import give_biases, layers_of

        self.options, self.model, self.ctx, self.given = options, model, ctx, given
        self.result = result = PassResult(changed=True)
        self.score, self.reconstruct = score, reconstruct
        self.name, self.fraction = options.budget
        self.multiple = options.multiple or ctx.target.channel_multiple
        self._limits = {"multiple": self.multiple, "min_keep": options.min_keep}
        self.bare: list[Layer] = give_biases(model) if reconstruct != "none" else []
        self.coupling: Coupling = analyse(model)
        self.layers: dict[str, Layer] = layers_of(model)[0]
        self.families: list[Candidates]
        self.families, notes = candidates(
            self.coupling, self.layers, options.exclude, refitted=reconstruct != "none", fixed=options.fixed
        )
        self.eraser: Eraser | None = None
        self.branches: list[Branch] = []
        self.turned: Turned | None = None
        result.notes += notes
        result.skipped += [Skip(f"{f.tensor}, axis {f.axis}", f.reason) for f in self.coupling.frozen]

        self.met = True
        self.decision: Decision = self._decide()

    @property
    def dead(self) -> frozenset[int]:
        """Units that go."""
        return self.decision.choice.dead

    @property
    def harm(self) -> float:
        """See `graphopt.pruning.shuffled.Trial`."""
        from graphopt.pruning.scores import ONE_SCALE, weight_share

        if not self.met:
            return math.inf
        return self.decision.choice.harm if self.score in ONE_SCALE else weight_share(self.coupling, self.dead)

    def go(self) -> bool:
        """Refit and cut; False where nothing had to go.

        Raises:
            UsageError: the budget is out of reach.
        """
        from graphopt.pruning.decision import out_of_reach
        from graphopt.rewriting.layers import drop_zero_biases

        if not self.met and self.decision.choice.least:
            raise out_of_reach(self.decision, f"{self.name}={self.fraction:g}", BUDGETS[self.name], self._limits)
        if self.turned is not None:
            dead = self.decision.choice.dead
            self.turned.restore(self.layers, self.turned.shortened(self.coupling, self.layers, dead))
        if not self.decision.empty:
            self._carry_out(self.decision)
        drop_zero_biases(self.bare)
        return not self.decision.empty

    # -- what to remove ----------------------------------------------------------------------------------------------

    def _decide(self) -> Decision:
        """Rank the units and choose; `met` tells whether the budget is."""
        from graphopt.pruning.decision import Decision, built
        from graphopt.pruning.selection import choose
        from graphopt.pruning.work import labelled_axes, terms_of, uncounted

        budget = self._latency() if self.name == "latency" else None
        terms = budget.terms if budget is not None else terms_of(self.name, self.model, self.coupling, self._sample())
        if not terms:
            raise UsageError(
                "the multiply-accumulates of no layer are known, because sizes of tensors are not",
                where="prune",
                hint="fix sizes with --dim NAME=SIZE, or give the budget as params=",
            )
        if self.name == "macs" and (missed := uncounted(self.model, frozenset().union(*(t.nodes for t in terms)))):
            self.result.notes.append(
                f"warning: sizes of tensors are unknown at {len(missed)} layers ({missed[0]}, ...), whose "
                "multiply-accumulates do not count in macs=; fix the input's sizes with --dim NAME=SIZE"
            )
        keep = self.fraction if budget is None else min(1.0, budget.keep(self.fraction))
        ranked, axes = self._rank(), labelled_axes(self.coupling)
        erasures = self._erasures(terms, keep)

        def decide(keep: float) -> Decision:
            choice = choose(ranked, terms, axes, keep=keep, erasures=erasures, **self._limits)
            return Decision(choice, ranked, self.branches[: choice.erased])

        if budget is None:
            decision = decide(keep)
            self.met = not decision.choice.least
            return decision
        settled = budget.settle(self.fraction, decide, lambda d: built(self.model, self.coupling, d, self.eraser))
        self.met = settled.within(self.fraction) or (settled.ratio is None and not settled.choice.choice.least)
        self.result.notes.append(settled.note(self.fraction, integer=self.options.precision == "int8"))
        return settled.choice

    def _sample(self) -> dict[str, Any] | None:
        calibration = self.ctx.calibration
        return None if calibration is None else dict(next(iter(calibration.batches(batch_size=1, limit=1))))

    def _latency(self) -> LatencyBudget:
        from graphopt.latency.budget import LatencyBudget
        from graphopt.verify import random_feeds

        feeds = self._sample() or random_feeds(self.model, self.ctx.seed, samples=1)[0]
        budget = LatencyBudget.of(
            self.model, self.coupling, feeds, self.ctx.target, integer=self.options.precision == "int8",
            multiple=self.multiple, table=self.options.table, progress=self.ctx.progress, given=self.given,
        )  # fmt: skip
        new = f", {budget.measured} of them new" if budget.measured else ""
        self.result.notes.append(f"times of layers from {budget.source}{new}")
        return budget

    def _rank(self) -> list[Family]:
        from graphopt.pruning.rank import rank
        from graphopt.pruning.turning import turn_heads

        ctx, data, samples = self.ctx, self.ctx.calibration, self.options.samples
        if self.score == "obs" and self.reconstruct == "ls" and data is not None:
            self.turned, notes = turn_heads(self.model, self.layers, data, samples=samples, threads=ctx.jobs)
            self.result.notes += notes
        ranked, notes = rank(
            self.score, self.model, self.coupling, self.layers, self.families, ctx, samples=samples,
            centred=self.reconstruct != "none", strengths=self.turned.strengths() if self.turned else {},
        )  # fmt: skip
        self.result.notes += notes
        return ranked

    def _erasures(self, terms: Sequence[Term], keep: float) -> Erasures:
        """Branches in the order in which they would go, where they may."""
        from graphopt.pruning.erasing import Eraser, erasures_for
        from graphopt.pruning.selection import NO_ERASURES

        wanted, data = self.options.erase, self.ctx.calibration
        possible = data is not None and self.reconstruct != "none"
        if wanted and not possible:
            self.result.notes.append("warning: no branch is erased: that needs calibration data and reconstruct=ls")
        if wanted is False or data is None or not possible or (wanted is None and self.name != "latency"):
            return NO_ERASURES
        self.eraser = Eraser(self.model, data, self.ctx.jobs, self.ctx.progress, self.options.exclude)
        self.branches, found = erasures_for(self.eraser, terms, keep, self.families, self.coupling)
        return found

    # -- doing it ----------------------------------------------------------------------------------------------------

    def _carry_out(self, decision: Decision) -> None:
        from graphopt.analysis.remove import remove_units
        from graphopt.pipeline.clone import private_clone
        from graphopt.pruning.batchnorm_means import batchnorm_means
        from graphopt.pruning.decision import rows, told

        dense = private_clone(self.model)
        removed, touched = self._erase(decision)
        dead = self._refit(dense, removed, touched)
        values = None
        if self.ctx.calibration is None and self.options.reconstruct != "none":
            values, used = batchnorm_means(self.coupling)
            self.result.notes.append(
                f"means behind {used} BatchNormalization nodes stand in for what was cut"
                if used
                else "no BatchNormalization is left whose means could stand in for what was cut (prune before fold)"
            )
        report = remove_units(self.model, self.coupling, dead, values)
        self.result.notes += told(decision, dead, BUDGETS[self.name], self.multiple)
        self.result.details["families"] = rows(decision)
        if self.options.distil:
            from graphopt.fx.after_pruning import match_dense

            steps, samples = self.options.distil, self.options.samples
            outcome = match_dense(dense, self.model, self.coupling, dead, self.ctx, steps=steps, samples=samples)
            self.result.notes.append(outcome)
        if self.reconstruct == "none":
            unknown = "a removed input held an unknown value, taken as 0"
            self.result.notes += [f"{name}: {unknown}" for name in report.assumed_zero]

    def _erase(self, decision: Decision) -> tuple[list[list[int]], frozenset[str]]:
        """Erase the branches; the units that go by family in what is left, and what must be refitted for it."""
        from graphopt.pruning.decision import erase_branches

        if not decision.branches or self.eraser is None:
            return [list(units) for units in decision.removed], frozenset()
        left = erase_branches(self.model, self.coupling, decision, self.eraser, self.options.exclude)
        self.coupling, self.layers, self.families = left.coupling, left.layers, left.families
        return left.removed, left.touched

    def _refit(self, dense: ir.Model, removed: list[list[int]], touched: frozenset[str]) -> set[int]:
        """Refit what is disturbed; the units that go, which the refit may have chosen anew."""
        from graphopt.pruning.importance import silence
        from graphopt.pruning.reconstruct import Plan, reconstruct

        ctx, options = self.ctx, self.options
        if self.reconstruct == "none" or ctx.calibration is None:
            return {u for units in removed for u in units}
        # what another operator than a refitted layer reads is zeroed first, as it will be missing in the end
        seen_elsewhere = {u for f, units in zip(self.families, removed, strict=True) if f.others for u in units}
        silence(self.model, self.coupling, seen_elsewhere)
        outcome = reconstruct(
            Plan(
                dense=dense,
                model=self.model,
                coupling=self.coupling,
                families=self.families,
                removed=removed,
                calibration=ctx.calibration,
                mode="ls" if self.reconstruct == "ls" else "mean",
                sweeps=options.sweeps,
                blockwise=options.refine == "blockwise",
                samples=options.samples,
                threads=ctx.jobs,
                progress=ctx.progress,
                reselect=options.score == "obs",
                touched=touched,
            )
        )
        self.result.notes += outcome.notes
        what = "by least squares" if self.reconstruct == "ls" else "in their biases"
        samples = options.samples or ctx.calibration.samples or "all"
        self.result.notes.append(f"{outcome.refitted} layers refitted {what} on {samples} samples")
        if outcome.rows:
            self.result.details["refitted layers"] = outcome.rows
        return outcome.dead
