"""Static int8: ranges measured, the layers that disturb the outputs most left in float, the rest written as QDQ.

The steps: bring the graph into the form that has integer kernels (`prepare`), plan what works on integers (`plan`),
measure ranges on the calibration data (`ranges`), measure how much every layer alone disturbs the outputs and leave in
float those that cost more than they save (`sensitive`), write the result (`emit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt.base import Context, PassResult, Skip
from graphopt.errors import DataError
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.ranges.choice import RangeChoice, choose_rule, measure_ranges
from graphopt.quantization.ranges.ranging import doubts
from graphopt.quantization.rounding.bias_correction import correct_if_better
from graphopt.quantization.rounding.choice import RoundingChoice, notes_of, rounding_for
from graphopt.quantization.scales.conditioning import condition
from graphopt.quantization.search.clock import shapes
from graphopt.quantization.search.layer_times import layer_times, runs_on_this_cpu
from graphopt.quantization.search.sensitivity import decibel
from graphopt.quantization.static.outputs import affordable
from graphopt.quantization.static.plan import Plan, plan
from graphopt.quantization.static.prepare import to_integer_form
from graphopt.quantization.static.report import add_costs, layer_rows, summary
from graphopt.quantization.static.sensitive import sensitivity
from graphopt.quantization.weights.sizes import bytes_of
from graphopt.target import QuantScheme, int8_scheme


@dataclass(frozen=True)
class StaticOptions:
    """The options of the pass that static int8 has; see `graphopt.passes.quantize`."""

    ranges: RangeChoice = "auto"
    percentile: float = 99.99
    per_channel: bool | None = None
    sensitive: Literal["auto", "none"] = "auto"
    sparse_outputs: Literal["auto", "all", "none"] = "auto"
    exclude: tuple[str, ...] = ()
    samples: int = 512
    rounding: RoundingChoice = "auto"
    correct_bias: bool = False
    prepare: Literal["auto", "none"] = "none"
    timed: bool = True


QUICK_SAMPLES = 64
"""Calibration samples of the ranges by which ways to condition the model are compared."""


def quantise_static(model: ir.Model, ctx: Context, options: StaticOptions) -> PassResult:
    """Quantise weights and activations of `model` in place.

    Raises:
        UsageError: the target does not execute int8.
        DataError: there is no calibration data.
    """
    scheme = int8_scheme(ctx.target, "quantize")
    if ctx.calibration is None:
        raise DataError("no calibration data", where="quantize", hint="give unlabelled samples with --calib")
    result = PassResult(changed=False)
    possible = plan(model, scheme, exclude=options.exclude)
    if not possible.units:
        result.skipped = possible.skipped
        result.notes.append("nothing to quantise")
        return result
    if options.prepare == "auto":
        result.notes += condition(model, ctx, lambda copy: quantise_static(copy, ctx, quick(options)))
    prepared, notes = prepare(model, ctx, scheme, options)
    result.notes += notes
    _Work(prepared, ctx, options).go(result)
    result.changed = True
    return result


def quick(options: StaticOptions) -> StaticOptions:
    """Options with which a model is quantised in little time, to compare ways to condition it."""
    return replace(
        options, ranges="minmax", sensitive="none", samples=QUICK_SAMPLES, prepare="none",
        rounding="nearest", correct_bias=False, timed=False,
    )  # fmt: skip


def prepare(model: ir.Model, ctx: Context, scheme: QuantScheme, options: StaticOptions) -> tuple[Prepared, list[str]]:
    """Bring a model into the form that has integer kernels, in place, and measure what static scales need.

    Without calibration data nothing is measured: no tensor has a static scale then.

    Returns:
        what variants are written with, and sentences for the report.
    """
    notes = to_integer_form(model)
    per_channel = scheme.per_channel if options.per_channel is None else options.per_channel
    prepared = Prepared(
        model, scheme, per_channel, options.exclude,
        calibration=ctx.calibration, threads=ctx.jobs, optimize=ctx.target.device == "cpu",
        weights=ctx.target.weights,
    )  # fmt: skip
    if ctx.calibration is None:
        return prepared, notes
    asks = scheme.sparse_outputs and options.sparse_outputs != "none"
    measure_ranges(
        prepared, prepared.widest if asks else prepared.everything, options.ranges,
        percentile=options.percentile, samples=options.samples, progress=ctx.progress,
    )  # fmt: skip
    return prepared, notes + doubts(ctx.calibration, options.samples, prepared.histograms)


class _Work:
    """One run: what its steps hand on to each other."""

    def __init__(self, prepared: Prepared, ctx: Context, options: StaticOptions) -> None:
        self.prepared, self.ctx, self.options = prepared, ctx, options
        self.in_float: dict[str, str] = {}
        self.noise: dict[str, float] = {}
        self.recovered: dict[str, float] = {}
        self.outputs: tuple[str, ...] = ()

    def go(self, result: PassResult) -> None:
        """Plan, choose, write."""
        prepared, first = self.prepared, self.prepared.everything
        self.in_float.update(prepared.unfit_units())
        chosen = self._planned() if self.in_float else first
        if self.options.sensitive == "auto" and chosen.units:
            chosen = self._by_sensitivity(chosen, result)
        if self._asks_for_outputs:
            chosen = self._with_outputs(chosen, result)
        prepared.rounding = rounding_for(self.options.rounding, prepared.model, self.ctx)
        reference = prepared.reference if self.options.correct_bias else None  # of the model while it is in float
        before = private_clone(prepared.model)
        sizes = bytes_of(prepared, dict.fromkeys(first.units, ("float", "int8")))
        emitter = prepared.write(prepared.model, chosen)
        result.notes += notes_of(prepared.rounding)
        if reference is not None and self.ctx.calibration is not None:
            result.notes += correct_if_better(
                before, prepared.model, self.ctx.calibration, reference.noise, self.ctx.jobs
            )
        result.skipped.extend(chosen.skipped)
        result.skipped.extend(Skip(first.units[key].label, reason) for key, reason in self.in_float.items())
        rows = layer_rows(first, chosen, prepared.activations, emitter.weight_sqnr, self.noise, self.recovered)
        add_costs(rows, first.units, (self._times(before), self._times(prepared.model)), sizes)
        result.details["quantised layers"] = rows
        result.notes.append(summary(chosen, prepared.scheme, prepared.rule, per_channel=prepared.per_channel))

    def _times(self, model: ir.Model) -> dict[str, float]:
        """Seconds of units inside a model; of none where the target cannot run here."""
        if not self.options.timed or not runs_on_this_cpu(self.ctx.target) or self.ctx.calibration is None:
            return {}
        names = {key: unit.label for key, unit in self.prepared.everything.units.items()}
        return layer_times(model, names, shapes(self.ctx.calibration)[-1], threads=self.ctx.jobs)[0]

    @property
    def _asks_for_outputs(self) -> bool:
        return self.prepared.scheme.sparse_outputs and self.options.sparse_outputs != "none"

    def _planned(self) -> Plan:
        return self.prepared.planned(self.in_float, self.outputs)

    def _by_sensitivity(self, planned: Plan, result: PassResult) -> Plan:
        """Measure every layer, and plan again with those in float whose noise costs more than their time saves."""
        prepared = self.prepared
        found = sensitivity(prepared, planned, self.in_float, self.outputs, self.ctx.progress)
        self.noise, self.recovered = found.alone, found.recovered
        self.in_float.update(found.reasons)
        if found.reasons:
            choose_rule(prepared, self.in_float)
            planned = self._planned()
            found.chosen = prepared.reference.noise(prepared.variant(planned))
        labels = {key: unit.label for key, unit in prepared.everything.units.items()}
        result.notes += found.told(labels, samples=prepared.reference.samples)
        return planned

    def _with_outputs(self, chosen: Plan, result: PassResult) -> Plan:
        """The plan with outputs of sparse products in integers, as the target wants them, where that is cheap."""
        prepared = self.prepared
        keys = [
            key
            for key, unit in prepared.widest.units.items()
            if unit.quantise_output and key in chosen.units and not chosen.units[key].quantise_output
            and all(name in prepared.activations for name in unit.carriers)
        ]  # fmt: skip
        if not keys:
            return chosen
        reference = prepared.reference

        def noise(some: Sequence[str]) -> float:
            return reference.noise(prepared.variant(prepared.planned(self.in_float, some)))

        before = noise([])
        self.outputs = tuple(keys if self.options.sparse_outputs == "all" else affordable(keys, before, noise))
        after = noise(self.outputs)
        result.notes.append(
            f"outputs of {len(self.outputs)} of {len(keys)} products with sparse weights are quantised for kernels "
            f"that skip zeros: {decibel(before):.1f} dB of signal to noise without, {decibel(after):.1f} dB with them, "
            f"on {reference.samples} calibration samples"
        )
        return self._planned()
