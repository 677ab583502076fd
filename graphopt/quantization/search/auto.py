"""scheme=auto: the fastest mixture of number formats on the target that stays within the allowed drop, by measurement.

1. Which formats each layer can have on the target is known (`formats`); layers that share kernels are put in classes
   (`classes`), and a class gets one format.
2. Whole models are timed, interleaved, on the shapes of the calibration data (`clock`): usual mixtures first, then one
   class changed at a time (`choice`).
3. The fastest goes on. Where its int8 layers gain by it, it is equalised or smoothed first (`conditioning`). Layers
   that disturb the outputs too much go back to float (`repair`), until the drop is within `--max-drop`, or 1 % where
   no gate was set.
4. What is left is timed against the input of the pass once more. Where it is not shown to be faster, the next fastest
   is tried, and where none is, the model stays as it was, and the measured ratios are the reason.

Timing decides, so that two runs may choose differently; `assignment=` repeats a choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt import registry
from graphopt.base import Context, PassResult, Skip
from graphopt.pipeline.clone import private_clone
from graphopt.pipeline.gates import EQUAL
from graphopt.pipeline.measure import Measures
from graphopt.pipeline.presets import MAX_DROP
from graphopt.quantization.apply import apply
from graphopt.quantization.formats import BITS, FORMATS, Candidate, Format, candidates
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.search.auto_report import class_rows, replayed, stays_in_float
from graphopt.quantization.search.auto_report import counted as formats_counted
from graphopt.quantization.search.choice import Mixture, Ratio, Search, search
from graphopt.quantization.search.classes import LayerClass, assignment, classes
from graphopt.quantization.search.clock import comparer, described, ratios, run_seconds, shapes
from graphopt.quantization.search.layer_times import layer_times, runs_on_this_cpu
from graphopt.quantization.search.repair import Repair, repair
from graphopt.quantization.search.replay import entries, resolve
from graphopt.quantization.search.tradeoff import Price
from graphopt.quantization.search.writer import Writer
from graphopt.quantization.static.scheme import StaticOptions, prepare
from graphopt.quantization.static.sensitive import work_of
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.norm_sums import FUSED, keep_sums_apart
from graphopt.rewriting.scopes import graphs

if TYPE_CHECKING:
    from graphopt.data.feeds import Call
    from graphopt.target import Target, WeightKernels

TRIES = 3
"""Mixtures that are repaired and confirmed at most."""

SECONDS = 60.0
"""Time of the search for a small model; what goes back to float may take as long again. What began is finished."""

RUNS = 200
"""For a large model the search may take as long as so many runs of it on all shapes."""

CONFIRM_SECONDS = 1.0
"""Measured time of each model in the last comparison; four times that where it is unclear."""

LEAST_TIME = 0.02
"""Share of the time in float below which a class is not timed in formats that change nothing around it."""

LEAST_SAVED = 1e-3
"""Share of the time that a class is taken to save at least, where noise hides what it does."""

PRODUCTS = ("MatMul", "Gemm")
"""Operators for which runtimes have kernels that read weights as integers."""

STARTS: Mapping[str, Mapping[str, Format]] = {
    "int8": {"layer": "int8", "product": "int8"},
    "int8 but for products of activations": {"layer": "int8"},
    "int8-dynamic": {"layer": "int8-dynamic", "recurrent": "int8-dynamic"},
    "int8 convolutions, int8-dynamic for the rest": {
        "layer": "int8-dynamic", "recurrent": "int8-dynamic", "Conv": "int8", "ConvTranspose": "int8",
    },
    "int8-weights": {"layer": "int8-weights", "recurrent": "int8-weights"},
    "int4-weights": {"layer": "int4-weights"},
}  # fmt: skip
"""Usual mixtures: the format of each kind of candidate or operator type, the last that applies."""


def quantise_auto(
    model: ir.Model,
    ctx: Context,
    options: StaticOptions,
    given: Sequence[str] = (),
    *,
    block: int | None = None,
    symmetric: bool | None = None,
    batch: int = 1,
) -> PassResult:
    """Choose formats for the layers of `model` and write them, in place.

    Args:
        model: the model.
        ctx: target, data, and the gates.
        options: how ranges are found and weights rounded, and what stays in float.
        given: a choice to repeat (`graphopt.quantization.search.replay`); no time is measured then.
        block: columns that share a scale where weights alone are quantised; None: what is best for their form.
        symmetric: whether those have no zero points; None: with 8 bits they have none.
        batch: samples of the calls that are timed.

    Raises:
        UsageError: an entry of `given` cannot be followed; no call of `batch` samples can be made.
        DataError: there is no calibration data.
    """
    scheme = ctx.target.quant
    if scheme is None:
        reason = f"target {ctx.target.name} computes in floating point only: the model stays in float"
        return PassResult(changed=False, notes=[reason, *_half(ctx.target)])
    copy = private_clone(model)
    prepared, doubts = prepare(copy, ctx, scheme, options)
    prepared.smooth = options.prepare == "auto"
    prepared.block, prepared.symmetric = block, symmetric
    listed = candidates(copy, ctx.target, options.exclude, block=block, symmetric=symmetric)
    found = _possible(listed, prepared)
    result = PassResult(changed=False, notes=_half(ctx.target))
    work = _Auto(model, ctx, Writer(ctx, options, prepared), found, result, batch)
    if given:
        chosen = resolve(found.values(), given)
        result.notes += work.writer.condition(chosen)
    elif not work.groups:
        result.notes.append("no layer has another format on the target")
        chosen = {}
    else:
        unavailable = registry.unavailable(ctx.target)
        chosen = work.timed() if unavailable is None else work.untimed(unavailable)
    _explain(found.values(), chosen, result)
    if work.changes(chosen):
        result.changed = True
        result.notes = [*doubts, *result.notes]
        done = work.writer.write(model, chosen)
        result.skipped += done.skipped
        result.notes += [*done.notes, work.counted(chosen)]
        result.details["quantised layers"] = done.rows
        if not given:
            result.notes.append(replayed(entries(found.values(), chosen)))
    return result


@dataclass
class _Auto:
    """One choice: what its steps hand on to each other.

    Attributes:
        model: the input of the pass, untouched.
        writer: has a clone of it in the form that has integer kernels, and what was measured on that.
        found: nodes whose format can be chosen.
        result: gets what is to be told.
        batch: samples of the calls that are timed.
        noises: of classes in formats alone, those that were asked for.
    """

    model: ir.Model
    ctx: Context
    writer: Writer
    found: Mapping[str, Candidate]
    result: PassResult
    batch: int
    noises: dict[tuple[str, Format], float] = field(default_factory=dict)

    @property
    def prepared(self) -> Prepared:
        """What was measured on the clone, as it is now."""
        return self.writer.prepared

    @cached_property
    def formats(self) -> dict[str, tuple[Format, ...]]:
        """What nodes may be that have a choice, without the formats that can save no time.

        Looking up a row of a table takes none, and only matrix products of some width compute from weights that are
        integers: others become floats when the model is loaded.
        """
        found: dict[str, tuple[Format, ...]] = {}
        wide = _wide_products(self.prepared.model, self.ctx.target.weights)
        for key, c in self.found.items():
            formats = tuple(f for f in c.formats if f not in BITS or key in wide)
            if c.kind != "table" and len(formats) > 1:
                found[key] = formats
        return found

    @cached_property
    def groups(self) -> list[LayerClass]:
        """Classes of nodes; none where only operators between layers have a choice."""
        if all(self.found[key].kind == "between" for key in self.formats):
            return []
        return [self._worth_timing(group) for group in classes(self.prepared.model, self.formats)]

    def _worth_timing(self, group: LayerClass) -> LayerClass:
        """The class without the formats in which it is too small for a gain to be seen.

        int8 stays, because it also decides where its neighbours convert.
        """
        if sum(self.shares.get(key, 1.0) for key in group.keys) >= LEAST_TIME:
            return group
        return replace(group, formats=tuple(f for f in group.formats if f in ("float", "int8")))

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of the time in float by node; of none where that cannot be measured."""
        if not runs_on_this_cpu(self.ctx.target):
            return {}
        names = {key: self.found[key].label for key in self.formats if not self.found[key].body}
        times, total = layer_times(self.prepared.model, names, self.feeds[-1])
        return {key: seconds / total for key, seconds in times.items()} if total > 0 else {}

    @cached_property
    def feeds(self) -> list[Call]:
        """The calls that are timed."""
        assert self.ctx.calibration is not None
        return shapes(self.ctx.calibration, self.batch)

    @cached_property
    def base(self) -> dict[str, Format]:
        """The mixture that computes in float: operators between int8 layers follow these."""
        between = {key for key, c in self.found.items() if c.kind == "between"}
        return {group.name: "int8" if between.issuperset(group.keys) else "float" for group in self.groups}

    @cached_property
    def drop(self) -> Callable[[ir.Model], float | None]:
        """How much worse a model is than the input of the run, or of the pass where there is no run."""
        return self.ctx.drop or Measures(private_clone(self.model), self.ctx).drop

    def changes(self, chosen: Mapping[str, Format]) -> bool:
        """Whether an assignment quantises anything; operators between layers alone are nothing."""
        return any(format != "float" and self.found[key].kind != "between" for key, format in chosen.items())

    def build(self, chosen: Mapping[str, Format]) -> ir.Model:
        """The model of an assignment."""
        copy = private_clone(self.prepared.model)
        apply(copy, chosen, self.prepared)
        if self.changes(chosen) and FUSED in self.ctx.target.slow_fusions:
            keep_sums_apart(copy)  # as the pass leaves every quantised model
        return copy

    def assigned(self, mixture: Mixture) -> dict[str, Format]:
        """The assignment of a mixture."""
        return assignment(self.groups, mixture, self.formats)

    def starts(self) -> dict[str, dict[str, Format]]:
        """Usual mixtures, by name."""
        return {name: {g.name: self._usual(g, rule) for g in self.groups} for name, rule in STARTS.items()}

    def _usual(self, group: LayerClass, rule: Mapping[str, Format]) -> Format:
        candidate = self.found[group.keys[0]]
        usual = self.base[group.name]
        wanted = rule.get(candidate.op_type, rule.get(candidate.kind, usual))
        return wanted if wanted in group.formats else usual

    def untimed(self, reason: str) -> dict[str, Format]:
        """The choice for a target that cannot run here: the first usual mixture that its kernels take."""
        self.result.notes.append(
            f"nothing was timed, because target {self.ctx.target.name!r} cannot run here ({reason}); layers get the "
            "first format that its kernels take: int8, int8-dynamic, int8-weights"
        )
        order = [f for f in FORMATS if f not in ("float", "int4-weights")]
        chosen: dict[str, Format] = {
            key: next((f for f in order if f in formats), "float") for key, formats in self.formats.items()
        }
        self.result.notes += self.writer.condition(chosen)
        done = self.repaired(chosen, Price().speedup, work_of(self.prepared), SECONDS)
        self.result.notes.append(done.told)
        return done.assignment

    def timed(self) -> dict[str, Format]:
        """The choice by measurement: nothing where no mixture is both faster and accurate enough."""
        feeds = self.feeds
        where = " and ".join(map(described, feeds))
        seconds = max(SECONDS, RUNS * run_seconds(self.prepared.model, self.ctx.target, feeds))
        end = time.monotonic() + seconds
        compare = comparer(
            lambda mixture: self.build(self.assigned(mixture)), self.ctx.target, feeds,
            lambda count: self.ctx.progress.step("timing formats", count),
        )  # fmt: skip
        seen = search(
            {group.name: group.formats for group in self.groups}, self.base, self.starts(), compare, self.noise,
            bound=self._bound, expired=lambda: time.monotonic() > end,
        )  # fmt: skip
        if seen.stopped:
            self.result.notes.append(f"the search was stopped after {seconds:.0f} s; a better mixture may exist")
        chosen, refusals = self._confirmed(seen, where, time.monotonic() + seconds)
        if not self.changes(chosen):
            self.result.notes.append(stays_in_float(seen, refusals, where))
        for group in self.groups:
            for format in {chosen.get(key, "float") for key in group.keys} - {"float"}:
                self.noise(group.name, format)
        self.result.details["formats by class"] = class_rows(self.groups, seen, self.noises, chosen)
        return chosen

    def noise(self, name: str, format: Format) -> float:
        """Noise-to-signal power at the outputs of one class in one format."""
        if (name, format) not in self.noises:
            alone = self.build(self.assigned({**self.base, name: format}))
            self.noises[name, format] = self.prepared.reference.noise(alone)
        return self.noises[name, format]

    @property
    def _bound(self) -> float:
        """The largest ratio of times on each shape: no slower, unless the user allows more."""
        return max(EQUAL, self.ctx.max_latency or 0.0)

    def _confirmed(self, seen: Search, where: str, end: float) -> tuple[dict[str, Format], list[str]]:
        """The first mixture that is accurate enough and then faster than the input; and why those before it are not."""
        refusals: list[str] = []
        for mixture, mean in seen.found[:TRIES]:
            if refusals and time.monotonic() > end:
                refusals.append("there was no time for other mixtures")
                break
            mixed = self.assigned(mixture)
            self.result.notes += self.writer.condition(mixed)
            left = max(0.0, end - time.monotonic())
            done = self.repaired(mixed, 1 / mean, self._time_saved(mixture, seen), left)
            if not self.changes(done.assignment):
                told = self.counted(mixed)
                refusals.append(f"{told}: a drop of more than {self._limit:g} whatever goes back to float")
                continue
            ratio = self._against_input(self.build(done.assignment))
            if ratio.certainly_below < 1 and ratio.mean < 1 / EQUAL and not ratio.shown_above(self._bound):
                self.result.notes += [f"{ratio} of the time of the model before the pass, on {where}", done.told]
                return done.assignment, refusals
            told = f"{self.counted(done.assignment)}, with {len(done.returned)} in float for accuracy"
            refusals.append(f"{told}: {ratio}, not shown to be faster")
        return {}, refusals

    def counted(self, chosen: Mapping[str, Format]) -> str:
        return formats_counted(format for key, format in chosen.items() if self.found[key].kind != "between")

    def _against_input(self, candidate: ir.Model) -> Ratio:
        """Time over that of the input of the pass; measured for longer where noise hides the verdict."""
        models = [self.model, candidate]
        (ratio,) = ratios(models, self.ctx.target, self.feeds, CONFIRM_SECONDS)
        if ratio.certainly_below >= 1 > min(ratio.lows):
            (ratio,) = ratios(models, self.ctx.target, self.feeds, 4 * CONFIRM_SECONDS)
        return ratio

    @property
    def _limit(self) -> float:
        return MAX_DROP if self.ctx.max_drop is None else self.ctx.max_drop

    def _time_saved(self, mixture: Mixture, seen: Search) -> dict[str, float]:
        """What each layer saves of the model's time: what its class was seen to save, by the work of its layers.

        Where the search ended before all classes were seen in float, it is the work alone.
        """
        work = work_of(self.prepared)
        slower = {
            t.group: t.ratio.mean - 1 for t in seen.trials if t.format == "float" and t.before == mixture[t.group]
        }
        groups = [group for group in self.groups if mixture[group.name] != "float"]
        if not all(group.name in slower for group in groups):
            return work
        saved: dict[str, float] = {}
        for group in groups:
            shares = {key: work.get(key, 0.0) or 1.0 for key in group.keys}
            total = max(slower[group.name], LEAST_SAVED)
            saved |= {key: total * share / sum(shares.values()) for key, share in shares.items()}
        return saved

    def repaired(
        self, chosen: Mapping[str, Format], speedup: float, work: Mapping[str, float], seconds: float
    ) -> Repair:
        """A mixture brought within the allowed drop."""
        self.writer.round()
        reference, progress = self.prepared.reference, self.ctx.progress
        return repair(chosen, self.build, reference, work, speedup, self.drop, self._limit, progress, seconds)


def _wide_products(model: ir.Model, kernels: WeightKernels) -> set[str]:
    """Keys of products with as many channels as kernels that compute from integer weights ask for."""
    found = set()
    for graph in graphs(model):
        for node in graph:
            weight = constant(node.inputs[1]) if is_onnx(node, *PRODUCTS) and len(node.inputs) > 1 else None
            if weight is None or len(weight.shape) != 2:
                continue
            inputs, outputs = weight.shape.numpy()
            if node.attributes.get_int("transB", 0):
                inputs, outputs = outputs, inputs
            if inputs >= kernels.inputs and outputs >= kernels.outputs:
                found |= {v.name for v in node.outputs[:1] if v.name}
    return found


def _half(target: Target) -> list[str]:
    """What is to be told of half types, which are no candidates: a model has one of them whole or not at all."""
    if not target.half.faster:
        return []
    schemes = " and ".join(f"scheme={'fp16' if name == 'float16' else 'bf16'}" for name in target.half.faster)
    return [f"formats of 8 bits or less were compared; on target {target.name} {schemes} are faster than float32 too"]


def _possible(found: Mapping[str, Candidate], prepared: Prepared) -> dict[str, Candidate]:
    """Candidates without int8 where the data showed that no scale fits."""
    unfit = prepared.unfit_units()
    return {
        key: replace(
            c, formats=tuple(f for f in c.formats if f != "int8"), reasons={**c.reasons, "int8": unfit[key]}
        ) if key in unfit else c
        for key, c in found.items()
    }  # fmt: skip


def _explain(found: Iterable[Candidate], chosen: Mapping[str, Format], result: PassResult) -> None:
    """Tell for each layer that has no other format why, and which went back."""
    for candidate in found:
        if candidate.kind != "between" and len(candidate.formats) == 1:
            reasons = "; ".join(dict.fromkeys(candidate.reasons.values()))
            result.skipped.append(Skip(candidate.label, reasons))
