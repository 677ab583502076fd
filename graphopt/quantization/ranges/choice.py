"""From calibration data to the scales in use: one rule, the better of two, or tensor by tensor (`search`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

from graphopt.errors import DataError
from graphopt.numerics.rounding import Affine
from graphopt.progress import Progress
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.ranges.ranging import RangeRule, affines, histograms
from graphopt.quantization.ranges.search import candidates, searched
from graphopt.quantization.static.plan import Plan

RangeChoice = Literal["auto", "search"] | RangeRule

SINGLE: tuple[RangeRule, ...] = get_args(RangeRule)

COMPARED: Mapping[RangeChoice, tuple[RangeRule, ...]] = {
    **{rule: (rule,) for rule in SINGLE},
    "auto": ("minmax", "mse"),
    "search": SINGLE,
}
"""Which rules are compared on the whole model."""


def measure_ranges(
    prepared: Prepared, measured: Plan, choice: RangeChoice, *, percentile: float, samples: int, progress: Progress
) -> None:
    """Measure histograms on the calibration data, and set the scales, and which rule made them, of `prepared`.

    Where several rules are in question, that one is taken with which the model quantised as a whole is closest to the
    float model, on a few samples. With `search` single tensors then get the range that their readers prefer, where the
    outputs come closer by it.

    Args:
        prepared: gets its `histograms`, `activations` and `rule`.
        measured: the plan of all that may get a scale.
        choice: the rule, or how it is chosen.
        percentile: for the rule of that name.
        samples: of the calibration data, at most.
        progress: told of every batch.

    Raises:
        DataError: there is no calibration data.
    """
    if prepared.calibration is None:
        raise DataError("no calibration data", where="quantize", hint="give unlabelled samples with --calib")
    model, calibration, grid = prepared.model, prepared.calibration, prepared.grid
    seen = prepared.histograms = histograms(
        model, measured.ranged, calibration, samples=samples, threads=prepared.threads, progress=progress
    )
    rules = COMPARED[choice]
    scales: dict[str, dict[str, Affine]] = {rule: affines(seen, rule, grid, percentile=percentile) for rule in rules}
    prepared.compared = scales
    choose_rule(prepared, prepared.unfit_units())
    if choice == "search":
        trials = {
            name: candidates(seen[name], [found[name] for found in scales.values()], grid) for name in scales[rules[0]]
        }
        wanted = searched(model, measured, trials, calibration, threads=prepared.threads, progress=progress)
        best = {name: scales[prepared.rule][name] for name in trials}
        prepared.compared = {**scales, "search": _adopted(prepared, best, wanted, progress)}
        choose_rule(prepared, prepared.unfit_units())


def _adopted(
    prepared: Prepared, best: dict[str, Affine], wanted: Mapping[str, Affine], progress: Progress
) -> dict[str, Affine]:
    """`best`, with the ranges `wanted` in place of its own for the tensors where that brings the outputs closer.

    All are tried together, then halves of what did not help, down to single tensors: at most two runs a tensor.
    """
    in_float = prepared.unfit_units()

    def noise(scales: Mapping[str, Affine]) -> float:
        prepared.activations = dict(scales)
        return prepared.reference.noise(prepared.variant(prepared.planned(in_float, prepared.outputs)))

    least = noise(best)
    pending = [[name for name in best if wanted[name] != best[name]]]
    step = 0
    while pending:
        names = pending.pop()
        if not names:
            continue
        step += 1
        progress.step("range search on the model", step)
        trial = {**best, **{name: wanted[name] for name in names}}
        found = noise(trial)
        if found < least:
            best, least = trial, found
        elif len(names) > 1:
            pending += [names[len(names) // 2 :], names[: len(names) // 2]]
    return best


def choose_rule(prepared: Prepared, in_float: Collection[str]) -> None:
    """Of the rules in question, take the one with which the model is closest to the float model, on a few samples.

    Args:
        prepared: gets its `activations` and `rule`.
        in_float: keys of units that stay in float; which rule is best depends on them.
    """
    noise: dict[str, float] = {}
    for rule, found in prepared.compared.items():
        prepared.rule, prepared.activations = rule, found
        chosen = prepared.planned(in_float, prepared.outputs)
        if len(prepared.compared) == 1 or not chosen.units:
            return
        noise[rule] = prepared.reference.noise(prepared.variant(chosen))
    prepared.rule = min(noise, key=lambda rule: noise[rule])
    prepared.activations = prepared.compared[prepared.rule]
