"""Number formats layer by layer within a budget: `size`, `latency`, `drop` of the pass `quantize`.

Three tables say what each format of each layer costs: the noise it makes at the outputs alone (measured on the
calibration data), the bytes of its weights, the time of its kernels inside the model (by the runtime's profiler).
`budget` chooses; then the model that comes out is measured, its bytes, its time and its drop, and
where it misses what was asked the bounds on the tables are moved by as much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnx_ir as ir

from graphopt import registry
from graphopt.base import Context, PassResult, Skip
from graphopt.errors import DataError, MissingBackendError, UsageError
from graphopt.model import weight_bytes
from graphopt.pipeline.clone import private_clone
from graphopt.pipeline.measure import Measures
from graphopt.quantization.apply import apply
from graphopt.quantization.formats import FORMATS, Candidate, Format, candidates
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.search.budget import Assignment, Budget, Choice, Cost, within
from graphopt.quantization.search.clock import ratios, shapes
from graphopt.quantization.search.layer_times import layer_times, runs_on_this_cpu
from graphopt.quantization.search.mixed_report import layer_table, told
from graphopt.quantization.search.sensitivity import by_halves
from graphopt.quantization.search.writer import Writer
from graphopt.quantization.static.scheme import StaticOptions, prepare
from graphopt.quantization.weights.sizes import bytes_of
from graphopt.target import int8_scheme

INTEGERS: tuple[Format, ...] = ("int8", "int8-dynamic", "int8-weights", "int4-weights")
"""What layers may be where every format is allowed."""

SECONDS = 90.0
"""Time for measuring noise; with more layers than that allows, neighbours are measured together."""

MOST, LEAST = 160, 24
"""Measurements of noise, of all formats together."""

CORRECTIONS = 4
"""How often bounds on the tables are moved."""

MISSED = 1.01
"""A bound counts as kept up to this factor: two measurements of one model differ by as much."""

TIMED_SECONDS = 0.4

GUESSED: Mapping[Format, float] = {
    "float": 1.0, "int8": 0.4, "int8-dynamic": 0.6, "int8-weights": 0.9, "int4-weights": 0.8,
}  # fmt: skip
"""Time of formats over that in float, on targets that cannot run here: only what bounds on size and drop need."""


@dataclass(frozen=True)
class Wanted:
    """The budgets of the pass; None for none.

    Attributes:
        size: bytes of all weights, over those of the model before the pass.
        latency: time, over that of the model before the pass.
        drop: loss of accuracy by the user's evaluation, else 1 - fidelity.
    """

    size: float | None = None
    latency: float | None = None
    drop: float | None = None

    def __bool__(self) -> bool:
        return not (self.size is None and self.latency is None and self.drop is None)


def quantise_within(
    model: ir.Model,
    ctx: Context,
    options: StaticOptions,
    allowed: tuple[Format, ...],
    wanted: Wanted,
    *,
    block: int | None = None,
    symmetric: bool | None = None,
    batch: int = 1,
) -> PassResult:
    """Choose formats for layers within budgets and write them, in place.

    Args:
        model: the model.
        ctx: target and data.
        options: how ranges are found and weights rounded, and what stays in float.
        allowed: formats that layers may have besides float.
        wanted: the budgets, at least one.
        block: columns that share a scale where weights alone are quantised; None: what is best for their form.
        symmetric: whether those have no zero points; None: with 8 bits they have none.
        batch: samples of the calls that are timed.

    Raises:
        UsageError: no choice keeps the budgets; the target computes in floating point only.
        DataError: there is no calibration data.
        MissingBackendError: latency is bounded and the target cannot run here.
    """
    scheme = int8_scheme(ctx.target, "quantize")
    if ctx.calibration is None:
        raise DataError("no calibration data", where="quantize", hint="give unlabelled samples with --calib")
    if wanted.latency is not None and (reason := _unmeasurable(ctx)) is not None:
        raise MissingBackendError(
            reason, where=f"quantize.latency on target {ctx.target.name!r}", hint="give size= or drop= instead"
        )
    copy = private_clone(model)
    prepared, notes = prepare(copy, ctx, scheme, options)
    prepared.smooth = options.prepare == "auto"
    prepared.block, prepared.symmetric = block, symmetric
    writer = Writer(ctx, options, prepared)
    found = candidates(copy, ctx.target, options.exclude, block=block, symmetric=symmetric)
    if "int8" in allowed:
        notes += writer.condition({c.key: "int8" for c in found.values() if "int8" in c.formats})
    result = PassResult(changed=False)
    work = _Mixed(model, ctx, writer.prepared, found, allowed, wanted, batch)
    result.skipped += work.refused()
    if not work.formats:
        result.notes.append("nothing to quantise")
        return result
    choice = work.choose()
    result.changed = any(f != "float" for f in choice.formats.values())
    result.notes += work.notes
    if result.changed:
        done = writer.write(model, work.typed(choice.formats))
        result.skipped += done.skipped
        result.notes = [*notes, *result.notes, *done.notes]
    result.details["quantised layers"] = layer_table(
        found, work.table, choice.formats, work.recovered(choice), timed=runs_on_this_cpu(ctx.target)
    )
    return result


def _unmeasurable(ctx: Context) -> str | None:
    if runs_on_this_cpu(ctx.target):
        return None
    return registry.unavailable(ctx.target) or "times of its layers inside a model cannot be measured"


@dataclass
class _Mixed:
    """One choice: what its steps hand on to each other."""

    model: ir.Model
    ctx: Context
    prepared: Prepared
    found: Mapping[str, Candidate]
    allowed: tuple[Format, ...]
    wanted: Wanted
    batch: int
    notes: list[str] = field(default_factory=list)

    @cached_property
    def formats(self) -> dict[str, tuple[Format, ...]]:
        """What each layer may be, where it has a choice."""
        unfit = self.prepared.unfit_units()
        possible = {
            key: tuple(
                f for f in c.formats
                if f == "float" or (f in self.allowed and not (f == "int8" and key in unfit))
            )
            for key, c in self.found.items() if c.kind != "between"
        }  # fmt: skip
        return {key: formats for key, formats in possible.items() if len(formats) > 1}

    def refused(self) -> list[Skip]:
        """Layers without a choice, and why."""
        unfit = self.prepared.unfit_units()
        skips = []
        for key, candidate in self.found.items():
            if candidate.kind != "between" and key not in self.formats:
                reasons = [candidate.reasons[f] for f in self.allowed if f in candidate.reasons]
                reasons += [unfit[key]] if key in unfit else []
                skips.append(Skip(candidate.label, "; ".join(dict.fromkeys(reasons))))
        return skips

    def typed(self, formats: Mapping[str, str]) -> dict[str, Format]:
        """The assignment that `apply` takes."""
        return {key: next(f for f in FORMATS if f == formats[key]) for key in formats}

    def build(self, formats: Mapping[str, str]) -> ir.Model:
        """The model of an assignment; layers left out are in float."""
        copy = private_clone(self.prepared.model)
        chosen = self.typed(formats)
        if any(f != "float" for f in chosen.values()):
            apply(copy, chosen, self.prepared)
        return copy

    def uniform(self, format: Format) -> dict[str, Format]:
        """Every layer that can be it in one format, the others in float."""
        return {key: format if format in formats else "float" for key, formats in self.formats.items()}

    @cached_property
    def used(self) -> list[Format]:
        """Formats besides float that some layer may have."""
        return [f for f in FORMATS[1:] if any(f in formats for formats in self.formats.values())]

    @cached_property
    def table(self) -> dict[str, dict[str, Cost]]:
        """What formats cost, by layer."""
        noise = {f: self._noise(f) for f in self.used}
        times, self._total = self._times()
        sizes = bytes_of(self.prepared, self.formats)
        return {
            key: {
                f: Cost(0.0 if f == "float" else noise[f][key], sizes[key][f], times[f][key]) for f in formats
            }
            for key, formats in self.formats.items()
        }  # fmt: skip

    def _noise(self, format: Format) -> dict[str, float]:
        keys = [key for key, formats in self.formats.items() if format in formats]
        reference = self.prepared.reference
        begin = time.perf_counter()
        reference.noise(self.build({keys[0]: format}))
        each = max(time.perf_counter() - begin, 1e-3)
        most = int(min(MOST, max(LEAST, SECONDS / each)) / len(self.used))

        def alone(part: Any) -> float:
            noise = reference.noise(self.build(dict.fromkeys(part, format)))
            return noise if math.isfinite(noise) else 1e6

        return by_halves(keys, alone, self.ctx.progress, most=max(2, most))

    @cached_property
    def _feeds(self) -> list[Any]:
        assert self.ctx.calibration is not None
        return shapes(self.ctx.calibration, self.batch)

    def _times(self) -> tuple[dict[Format, dict[str, float]], float]:
        """Seconds of layers by format, and of the whole model in float; of the largest of the usual inputs."""
        names = {key: self.found[key].label for key in self.formats}
        if not runs_on_this_cpu(self.ctx.target):
            self.notes.append(f"times are guesses, since target {self.ctx.target.name!r} cannot be timed here")
            from graphopt.quantization.static.sensitive import work_of

            work = work_of(self.prepared)
            sizes = {key: work.get(key, 0.0) for key in names}
            return {f: {k: GUESSED[f] * s for k, s in sizes.items()} for f in ("float", *self.used)}, sum(
                sizes.values()
            )
        feeds = self._feeds[-1]
        in_float, total = layer_times(self.prepared.model, names, feeds)
        times: dict[Format, dict[str, float]] = {"float": in_float}
        for format in self.used:
            times[format] = layer_times(self.build(self.uniform(format)), names, feeds)[0]
        return times, total

    @cached_property
    def _drop(self) -> Callable[[ir.Model], float | None]:
        return self.ctx.drop or Measures(private_clone(self.model), self.ctx).drop

    def drop(self, formats: Assignment) -> float:
        """How much worse the model of an assignment is, as the gate on accuracy measures it."""
        measured = self._drop(self.build(formats))
        if measured is None:
            raise UsageError("the drop cannot be measured", where="quantize.drop", hint="give --eval, or bound size")
        return measured

    def choose(self) -> Choice:
        """The best assignment whose model keeps the budgets when it is measured.

        Raises:
            UsageError: there is none.
        """
        table, wanted = self.table, self.wanted
        in_float = {key: costs["float"] for key, costs in table.items()}
        bytes_before = weight_bytes(self.model)
        bytes_asked = None if wanted.size is None else wanted.size * bytes_before
        bytes_bound, time_bound = None, None
        if bytes_asked is not None:
            bytes_bound = bytes_asked - (bytes_before - sum(c.bytes for c in in_float.values()))
        if wanted.latency is not None:
            time_bound = wanted.latency * self._total - (self._total - sum(c.time for c in in_float.values()))
        for _ in range(CORRECTIONS):
            found = self._within(Budget(bytes_bound, time_bound, wanted.drop))
            built = self.build(found.formats)
            size = weight_bytes(built)
            ratio = self._ratio(built) if wanted.latency is not None else None
            large = bytes_asked is not None and size > bytes_asked
            slow = ratio is not None and wanted.latency is not None and ratio > wanted.latency * MISSED
            if not large and not slow:
                break
            if large and bytes_bound is not None and bytes_asked is not None:
                bytes_bound -= size - bytes_asked
            if slow and time_bound is not None and ratio is not None and wanted.latency is not None:
                time_bound -= (ratio - wanted.latency) * self._total
        else:
            self.notes.append(
                "warning: the budget is missed: the model that comes nearest by the tables of layers has "
                f"{size / bytes_before:.3f} of the bytes" + (f" and {ratio:.3f} of the time" if ratio else "")
            )
        self.notes.append(told(found, table, size / bytes_before, ratio))
        return found

    def _within(self, budget: Budget) -> Choice:
        found = within(self.table, budget, self.drop)
        if found is None:
            least = {
                name: sum(min(getattr(c, name) for c in costs.values()) for costs in self.table.values())
                for name in ("bytes", "time")
            }
            fixed = weight_bytes(self.model) - sum(c["float"].bytes for c in self.table.values())
            rest = self._total - sum(c["float"].time for c in self.table.values())
            size = (fixed + least["bytes"]) / max(1, weight_bytes(self.model))
            latency = (rest + least["time"]) / max(1e-12, self._total)
            alone = []
            if self.wanted.size is not None:
                alone.append(f"size could be {size:.3f}")
            if self.wanted.latency is not None:
                alone.append(f"latency about {latency:.3f}")
            raise UsageError(
                "no formats keep the budgets" + (f": alone, {' and '.join(alone)}" if alone else ""),
                where="quantize",
                hint="allow more, or more formats (scheme=auto)",
            )
        return found

    def _ratio(self, built: ir.Model) -> float:
        (ratio,) = ratios([self.model, built], self.ctx.target, self._feeds, TIMED_SECONDS)
        return ratio.mean

    def recovered(self, choice: Choice) -> dict[str, float]:
        """By how much the noise falls with one layer back in float, of the loudest."""
        from graphopt.quantization.search.sensitivity import recovered
        from graphopt.quantization.static.sensitive import LOUDEST

        quantised = [key for key, f in choice.formats.items() if f != "float"]
        quantised.sort(key=lambda key: -self.table[key][choice.formats[key]].noise)
        reference = self.prepared.reference
        whole = reference.noise(self.build(choice.formats))
        return recovered(
            reference, quantised[:LOUDEST], whole,
            lambda part: self.build({**choice.formats, **dict.fromkeys(part, "float")}), self.ctx.progress,
        )  # fmt: skip
