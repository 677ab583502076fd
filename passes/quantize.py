"""quantize: static int8 with QuantizeLinear/DequantizeLinear (QDQ), typed as the target's kernels want it.

    x^ = (clip(round(x / s) + z) - z) s         activations: one scale and zero point per tensor, from calibration
    w^ = clip(round(w / s_o)) s_o               weights: zero point 0, one scale per output channel o
    b^ = round(b / (s s_o)) s s_o               biases: int32, in units of the accumulator

The steps: bring the graph into the form that has integer kernels (graphopt/quantization/prepare.py), plan what works on
integers (plan.py beside it), measure ranges on the calibration data (graphopt/numerics/ranges.py), measure how much
every layer alone disturbs the outputs and leave in float the few that dominate (sensitivity.py), write the result
(emit.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import DataError, UsageError
from graphopt.files.opset import raise_opset
from graphopt.files.shape_inference import infer_shapes
from graphopt.numerics.ranges import Histogram, minmax_range, mse_range, percentile_range
from graphopt.numerics.rounding import Affine, Grid, affine
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.emit import Emitter
from graphopt.quantization.outputs import affordable
from graphopt.quantization.plan import Plan, Unit, name_of, plan
from graphopt.quantization.prepare import spatial_means_to_pools
from graphopt.quantization.rules import Kind
from graphopt.quantization.sensitivity import Reference, Rule, culprits, decibel, measure
from graphopt.rewriting.edit import array
from graphopt.target import QuantScheme

MIN_OPSET = 13
"""QuantizeLinear and DequantizeLinear take one scale per channel from here on."""

WIDEST = 1e30
"""A tensor that reaches this is a mask (float32 lowest stands for minus infinity), and no scale fits it."""

POOR_DB = 20.0
"""Below this signal-to-noise ratio of the outputs (1 % noise power) the report warns."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Static int8 quantisation: integer weights and activations, scales from calibration data.

    Activations get the integer type of the target (uint8 on x86, where the VNNI instructions multiply unsigned by
    signed bytes; x86 processors without VNNI add these products in 16 bits, which can saturate), weights int8 with zero
    point 0 and one scale per output channel, biases int32. Convolutions, Gemm and MatMul are computed on integers, and
    so is what lies between them (Add, Mul, Concat, pooling, LeakyRelu, Sigmoid, data movement) where integers enter and
    leave; Relu and Clip(0, .) vanish in the saturation. Other operators stay in float without a Q/DQ pair of their own.

    Which layers stay in float is measured, not assumed: with `sensitive=auto` each layer is quantised alone on a few
    samples, and ranked by the noise it makes at the outputs. Where everything in int8 leaves less than 30 dB of signal
    to noise, the fewest layers stay in float that gain 10 dB, or that lift it above 20 dB; they may hold a quarter of
    the multiply-accumulates. Where that is not enough, the noise has no culprits and no layer stays in float.

    Does not fire: on operators without an integer kernel on the target, on weights or biases that are not constant, on
    anything quantised already, in branch and loop bodies, on tensors that hold inf or masks. Opset below 13 is raised.
    Preserves: inputs, outputs, names of nodes; a weight `w` becomes `w_quantized`, `w_scale`, `w_zero_point`.
    Source: Jacob et al. 2018 (arXiv:1712.05877); Banner et al. 2019 (arXiv:1810.05723) for `ranges=mse`.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs_calibration: ClassVar[bool] = True

    scheme: Literal["int8"] = option("int8", "integers for weights and activations")
    ranges: Literal["auto", "minmax", "percentile", "mse"] = option(
        "auto",
        "range of an activation: its extremes, its percentiles, or least squared error on its histogram; "
        "auto takes minmax or mse, whichever disturbs the outputs less",
    )
    percentile: float = option(99.99, "for ranges=percentile: the share of values inside the range", low=50, high=100)
    per_channel: bool | None = option(None, "one weight scale per output channel; default: as the target wants it")
    sensitive: Literal["auto", "none"] = option("auto", "auto leaves in float the few layers that cause most noise")
    sparse_outputs: Literal["auto", "all", "none"] = option(
        "auto",
        "on targets whose int8 kernels that skip zeros write int8: of which sparse layers the output is quantised too; "
        "auto: as many as cost 1 dB of signal to noise",
    )
    exclude: tuple[str, ...] = option((), "globs over node names that stay in float")
    samples: int = option(512, "calibration samples for the ranges", low=1)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantise `model` in place."""
        scheme = ctx.target.quant
        if scheme is None:
            raise UsageError(
                f"target {ctx.target.name} does not execute int8", where="quantize", hint="leave the pass out"
            )
        if ctx.calibration is None:
            raise DataError("no calibration data", where="quantize", hint="give unlabelled samples with --calib")
        result = PassResult(changed=False)
        if not plan(model, scheme, exclude=self.exclude).units:
            result.skipped = plan(model, scheme, exclude=self.exclude).skipped
            result.notes.append("nothing to quantise")
            return result
        note = raise_opset(model, MIN_OPSET, "int8 with one scale per channel")
        if note:
            result.notes.append(note)
        infer_shapes(model)
        pools = spatial_means_to_pools(model)
        if pools:
            result.notes.append(f"{len(pools)} ReduceMean over space written as GlobalAveragePool, an integer kernel")
        work = _Work(self, model, ctx, scheme)
        work.go(result)
        result.changed = True
        return result


class _Work:
    """One run of the pass: what its steps hand on to each other."""

    def __init__(self, options: Quantize, model: ir.Model, ctx: Context, scheme: QuantScheme) -> None:
        self.options, self.model, self.ctx, self.scheme = options, model, ctx, scheme
        self.per_channel = scheme.per_channel if options.per_channel is None else options.per_channel
        self.grid = Grid.of(scheme.activation, symmetric=scheme.symmetric_activation)
        self.activations: dict[str, Affine] = {}
        self.in_float: dict[str, str] = {}
        self.noise: dict[str, float] = {}
        self.histograms: dict[str, Histogram] = {}
        self.rule = "minmax"
        self.outputs: tuple[str, ...] = ()
        self._float_outputs: Reference | None = None

    def go(self, result: PassResult) -> None:
        """Plan, measure, choose, write."""
        chosen = first = self._planned()
        wide = self._plan(None) if self._asks_for_outputs else first
        histograms = self.histograms = self._histograms(wide)
        unfit = {tensor: reason for tensor, h in histograms.items() if (reason := _unfit(h))}
        for key, unit in first.units.items():
            read = {first.roots[name] for name in _tensors(self.model, unit.key, unit.data)}
            wrong = next(
                (
                    t
                    for t in (*read, *(first.roots.get(c, c) for c in unit.carriers if unit.quantise_output))
                    if t in unfit
                ),
                None,
            )
            if wrong:
                self.in_float[key] = f"tensor {wrong} {unfit[wrong]}"
        rules = ("minmax", "mse") if self.options.ranges == "auto" else (self.options.ranges,)
        scales = {rule: self._scales(wide, rule) for rule in rules}
        self.rule, self.activations = rules[0], scales[rules[0]]
        if self.in_float:
            chosen = self._replanned(first)
        if len(rules) > 1 and chosen.units:
            self._choose_ranges(first, scales)
        if self.options.sensitive == "auto" and chosen.units:
            chosen = self._by_sensitivity(first, chosen, result)
        if self._asks_for_outputs:
            chosen = self._with_outputs(wide, chosen, result)
        emitter = Emitter(self.model, chosen, self.activations, self.scheme, self.per_channel)
        emitter.run()
        result.skipped.extend(chosen.skipped)
        labels = {key: unit.label for key, unit in first.units.items()}
        result.skipped.extend(Skip(labels[key], reason) for key, reason in self.in_float.items())
        self._report(result, first, chosen, emitter)

    @property
    def _asks_for_outputs(self) -> bool:
        return self.scheme.sparse_outputs and self.options.sparse_outputs != "none"

    def _planned(self) -> Plan:
        return self._plan(self.outputs)

    def _plan(self, outputs: Sequence[str] | None) -> Plan:
        return plan(self.model, self.scheme, exclude=self.options.exclude, in_float=self.in_float, outputs=outputs)

    def _histograms(self, planned: Plan) -> dict[str, Histogram]:
        from graphopt.data.activations import activations

        calibration = self.ctx.calibration
        if calibration is None:
            raise DataError("no calibration data", where="quantize")
        found = {name: Histogram() for name in planned.ranged}
        stream = activations(self.model, planned.ranged, calibration, limit=self.options.samples, threads=self.ctx.jobs)
        for count, tensors in enumerate(stream):
            self.ctx.progress.step("ranges", count)
            for name, values in tensors.items():
                found[name].update(values)
        return found

    def _scales(self, planned: Plan, rule: str) -> dict[str, Affine]:
        """Quantisation parameters of all tensors that can be quantised."""
        found = {}
        for name in planned.ranged:
            histogram = self.histograms[name]
            if _unfit(histogram):
                continue
            if rule == "mse":
                low, high = mse_range(histogram, self.grid)
            elif rule == "percentile":
                low, high = percentile_range(histogram, self.options.percentile)
            else:
                low, high = minmax_range(histogram)
            found[name] = affine(low, high, self.grid)
        return found

    def _choose_ranges(self, first: Plan, scales: dict[str, dict[str, Affine]]) -> None:
        """Take the rule with which the model quantised as a whole is closest to the float model."""
        noise = {}
        for rule, found in scales.items():
            self.activations = found
            planned = self._replanned(first)
            noise[rule] = self._reference().noise(self._variant(planned, list(planned.units)))
        self.rule = min(noise, key=lambda rule: noise[rule])
        self.activations = scales[self.rule]

    def _reference(self) -> Reference:
        """The outputs of the float model on a few samples, computed once."""
        if self._float_outputs is None:
            if self.ctx.calibration is None:
                raise DataError("no calibration data", where="quantize")
            self._float_outputs = Reference(
                self.model, self.ctx.calibration, samples=SENSITIVITY_SAMPLES, threads=self.ctx.jobs,
                optimize=self.ctx.target.device == "cpu",
            )  # fmt: skip
        return self._float_outputs

    def _replanned(self, first: Plan) -> Plan:
        """The plan without the layers that stay in float.

        A tensor that became a root because the data movement before it is in float now has its source's range.
        """
        chosen = self._planned()
        for name in chosen.ranged:
            if name not in self.activations:
                self.activations[name] = self.activations[first.roots[name]]
        return chosen

    def _variant(self, planned: Plan, keys: Sequence[str]) -> ir.Model:
        copy = private_clone(self.model)
        Emitter(copy, planned.only(keys), self.activations, self.scheme, self.per_channel).run()
        return copy

    def _by_sensitivity(self, first: Plan, planned: Plan, result: PassResult) -> Plan:
        """Measure every layer alone, and plan again with the dominant ones in float."""
        reference = self._reference()
        noise = reference.noise(self._variant(planned, list(planned.units)))
        keys = [key for key, unit in planned.units.items() if unit.rule.kind is not Kind.MOVE]
        self.noise = measure(reference, keys, lambda part: self._variant(planned, part), self.ctx.progress)

        def without(left_out: Sequence[str]) -> float:
            return reference.noise(self._variant(planned, [k for k in planned.units if k not in set(left_out)]))

        worst = culprits(self.noise, {k: self._macs(first.units[k], first) for k in keys}, noise, without, Rule())
        for key in worst:
            self.in_float[key] = (
                f"alone it leaves {decibel(self.noise[key]):.1f} dB of signal to noise at the outputs; in float by "
                "measurement (sensitive=none quantises it)"
            )
        before = f"all of them: {decibel(noise):.1f} dB"
        if worst:
            planned = self._replanned(first)
            noise = reference.noise(self._variant(planned, list(planned.units)))
            before += f"; without the {len(worst)} layers that disturb the outputs most: {decibel(noise):.1f} dB"
        result.notes.append(f"signal to noise of the worst output on {SENSITIVITY_SAMPLES} samples: {before}")
        if decibel(noise) < POOR_DB:
            result.notes.append(
                f"warning: quantisation leaves {decibel(noise):.1f} dB of signal to noise at the outputs, spread over "
                "many layers; check the accuracy, or exclude the worst layers of the table"
            )
        return planned

    def _with_outputs(self, wide: Plan, chosen: Plan, result: PassResult) -> Plan:
        """The plan with outputs of sparse products in integers, as the target wants them, where that is cheap."""
        keys = [
            key
            for key, unit in wide.units.items()
            if unit.quantise_output and key in chosen.units and not chosen.units[key].quantise_output
            and all(name in self.activations for name in unit.carriers)
        ]  # fmt: skip
        if not keys:
            return chosen
        reference = self._reference()

        def noise(some: Sequence[str]) -> float:
            planned = self._plan(some)
            return reference.noise(self._variant(planned, list(planned.units)))

        before = noise([])
        self.outputs = tuple(keys if self.options.sparse_outputs == "all" else affordable(keys, before, noise))
        after = noise(self.outputs)
        result.notes.append(
            f"outputs of {len(self.outputs)} of {len(keys)} products with sparse weights are quantised for kernels "
            f"that skip zeros: {decibel(before):.1f} dB of signal to noise without, {decibel(after):.1f} dB with them"
        )
        return self._planned()

    def _macs(self, unit: Unit, planned: Plan) -> float:
        """Multiply-accumulates of a unit on the calibration data, from the sizes of the tensors seen there.

        A product of two activations counts the last axis of the second as recorded, and as 1 where that is symbolic.
        """
        node = next(n for n in self.model.graph if n.outputs and n.outputs[0].name == unit.key)
        if unit.rule.kind is not Kind.COMPUTE:
            return 0.0
        read = self.histograms[planned.roots[name_of(node.inputs[unit.data[0]])]].total
        weight = array(node.inputs[unit.weight]) if unit.weight is not None else None
        if weight is None:
            second = node.inputs[1].shape if node.inputs[1] is not None else None
            columns = second[-1] if second else 1
            return read * (columns if isinstance(columns, int) else 1)
        if unit.op_type == "Conv":
            return self.histograms[planned.roots[unit.carriers[0]]].total * float(weight.size / weight.shape[0])
        contracted = -2 if unit.op_type == "MatMul" else 0
        if unit.op_type == "Gemm" and node.attributes.get_int("transB", False):
            contracted = -1
        return read * float(weight.size / weight.shape[contracted])

    def _report(self, result: PassResult, first: Plan, chosen: Plan, emitter: Emitter) -> None:
        rows: list[dict[str, Any]] = []
        for key, unit in first.units.items():
            kept = key in chosen.units
            row: dict[str, Any] = {"layer": unit.label, "op": unit.op_type, "type": "int8" if kept else "float32"}
            root = chosen.roots.get(unit.carriers[0]) if kept and unit.quantise_output else None
            params = self.activations.get(root) if root else None
            row["output scale"] = float(params.scale) if params else None
            row["output zero point"] = int(params.zero_point) if params else None
            row["weight SQNR dB"] = _rounded(emitter.weight_sqnr.get(key))
            row["output SQNR dB, alone"] = _rounded(decibel(self.noise[key])) if key in self.noise else None
            rows.append(row)
        result.details["quantised layers"] = rows
        compute = sum(u.rule.kind is Kind.COMPUTE for u in chosen.units.values())
        result.notes.append(
            f"{compute} weighted layers and {len(chosen.units) - compute} operators between them work on integers "
            f"({self.scheme.activation} activations, {self.scheme.weight} weights, "
            f"{'per channel' if self.per_channel else 'per tensor'}, ranges {self.rule})"
        )


SENSITIVITY_SAMPLES = 16
"""Calibration samples on which layers are compared."""


def _unfit(histogram: Histogram) -> str | None:
    """Why a tensor cannot be quantised; None where it can."""
    if histogram.nonfinite:
        return f"holds inf or nan on the calibration data ({histogram.nonfinite} values)"
    if max(-histogram.low, histogram.high) > WIDEST:
        return f"spans [{histogram.low:.3g}, {histogram.high:.3g}] on the calibration data"
    return None if histogram.total else "is empty on the calibration data"


def _tensors(model: ir.Model, key: str, indices: Sequence[int]) -> list[str]:
    node = next(n for n in model.graph if n.outputs and n.outputs[0].name == key)
    return [str(v.name) for i in indices if (v := node.inputs[i]) is not None]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 1)
