"""Exact rewrites before quantisation that make the ranges of channels alike, where integers then lose less.

Equalising moves range between what writes a channel and what reads it, smoothing moves outliers of activations into
weights; the float model stays the same. Either can help one model by many decibels and harm another, so that each is
tried: the model is quantised with and without, and the outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.base import Context
from graphopt.errors import DataError
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.search.sensitivity import Reference, decibel

Way = tuple[str, ...]

WAYS: tuple[Way, ...] = (("equalize",), ("smooth",), ("equalize", "smooth"))
"""Passes that may go before, by name."""

SAMPLES = 32
"""Calibration samples on which they are compared."""

GAIN_DB = 1.0
"""What one must gain: less may be chance."""

ACCURATE_DB = 45.0
"""Where so much is left without any, none is tried."""


def condition(model: ir.Model, ctx: Context, quantise: Callable[[ir.Model], object]) -> list[str]:
    """Carry out in `model` what makes its quantised outputs most accurate; see `best_way`."""
    way, notes = best_way(model, ctx, quantise)
    carry_out(model, ctx, way)
    return notes


def carry_out(model: ir.Model, ctx: Context, way: Way) -> None:
    """Run passes over `model`, in place; it computes the same afterwards."""
    for name in way:
        ctx.resolve(name)().run(model, ctx)


def best_way(model: ir.Model, ctx: Context, quantise: Callable[[ir.Model], object]) -> tuple[Way, list[str]]:
    """What to do before, so that the quantised outputs are most accurate.

    Args:
        model: in float; not changed.
        ctx: with calibration data.
        quantise: quantises a model in place, quickly.

    Returns:
        the passes to run, none where none helps; and sentences for the report, none where nothing was tried.

    Raises:
        DataError: there is no calibration data.
    """
    if ctx.calibration is None:
        raise DataError("no calibration data", where="quantize", hint="give unlabelled samples with --calib")
    reference = Reference(
        model, ctx.calibration, samples=SAMPLES, threads=ctx.jobs, optimize=ctx.target.device == "cpu"
    )

    def decibels(candidate: ir.Model) -> float:
        copy = private_clone(candidate)
        quantise(copy)
        return decibel(reference.noise(copy))

    on = f"on {reference.samples} calibration samples"
    plain = decibels(model)
    if plain >= ACCURATE_DB:
        return (), []
    best, chosen = plain + GAIN_DB, Way()
    idle: set[str] = set()
    for number, way in enumerate(WAYS):
        ctx.progress.step("equalising and smoothing", number, len(WAYS))
        if idle & set(way):
            continue
        candidate = private_clone(model)
        still = {name for name in way if not ctx.resolve(name)().run(candidate, ctx).changed}
        idle |= still
        if not still and (found := decibels(candidate)) > best:
            best, chosen = found, way
    if not chosen:
        return (), [f"equalize and smooth left out: neither gains {GAIN_DB:g} dB of signal to noise {on}"]
    return chosen, [f"{' and '.join(chosen)} before, signal to noise {on}: {plain:.1f} dB without, {best:.1f} dB with"]
