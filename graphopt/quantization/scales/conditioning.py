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

WAYS = (("equalize",), ("smooth",), ("equalize", "smooth"))
"""Passes that may go before, by name."""

SAMPLES = 32
"""Calibration samples on which they are compared."""

GAIN_DB = 1.0
"""What one must gain: less may be chance."""

ACCURATE_DB = 45.0
"""Where so much is left without any, none is tried."""


def condition(model: ir.Model, ctx: Context, quantise: Callable[[ir.Model], object]) -> list[str]:
    """Carry out in `model` what makes its quantised outputs most accurate.

    Args:
        model: in float; changed in place, to one that computes the same.
        ctx: with calibration data.
        quantise: quantises a model in place, quickly.

    Returns:
        sentences for the report; none where nothing was tried.

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

    plain = decibels(model)
    if plain >= ACCURATE_DB:
        return []
    best, best_way = plain + GAIN_DB, tuple[str, ...]()
    idle: set[str] = set()
    for number, way in enumerate(WAYS):
        ctx.progress.step("equalising and smoothing", number, len(WAYS))
        if idle & set(way):
            continue
        candidate = private_clone(model)
        still = {name for name in way if not ctx.resolve(name)().run(candidate, ctx).changed}
        idle |= still
        if not still and (found := decibels(candidate)) > best:
            best, best_way = found, way
    if not best_way:
        return [f"equalize and smooth left out: neither gains {GAIN_DB:g} dB of signal to noise at the outputs"]
    for name in best_way:
        ctx.resolve(name)().run(model, ctx)
    return [f"{' and '.join(best_way)} before: {plain:.1f} dB of signal to noise without, {best:.1f} dB with"]
