"""Static int8 without calibration data: ranges from what the model tells of itself (`statistical`)."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.base import Context, PassResult, Skip
from graphopt.numerics.normal import Normal
from graphopt.numerics.rounding import affine
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.ranges.ranging import WIDEST
from graphopt.quantization.ranges.statistical import statistics
from graphopt.quantization.rounding.choice import rounding_for
from graphopt.quantization.static.plan import plan
from graphopt.quantization.static.prepare import to_integer_form
from graphopt.quantization.static.report import layer_rows, summary
from graphopt.quantization.static.scheme import StaticOptions
from graphopt.target import int8_scheme


def quantise_without_data(
    model: ir.Model, ctx: Context, options: StaticOptions, input_range: tuple[float, ...]
) -> PassResult:
    """Quantise weights and activations of `model` in place, with estimated ranges.

    Args:
        model: the model.
        ctx: gives the target.
        options: of static int8; those that need data do nothing.
        input_range: lowest and highest value of the inputs; empty: normal, with mean 0 and deviation 1.

    Raises:
        UsageError: the target does not execute int8.
    """
    scheme = int8_scheme(ctx.target, "quantize")
    result = PassResult(changed=False)
    possible = plan(model, scheme, exclude=options.exclude)
    if not possible.units:
        result.skipped = possible.skipped
        result.notes.append("nothing to quantise")
        return result
    result.notes += to_integer_form(model)
    per_channel = scheme.per_channel if options.per_channel is None else options.per_channel
    prepared = Prepared(
        model,
        scheme,
        per_channel,
        options.exclude,
        rounding=rounding_for(options.rounding, model, ctx),
        weights=ctx.target.weights,
    )
    assumed = Normal.uniform(*input_range) if input_range else Normal.of(0.0, 1.0)
    found = statistics(model, assumed)
    ranges = {name: found.normals[name].range for name in prepared.everything.ranged if name in found.normals}
    prepared.rule = "estimated without data"
    prepared.activations = {
        name: affine(low, high, prepared.grid) for name, (low, high) in ranges.items() if -WIDEST < low < high < WIDEST
    }
    in_float = prepared.unfit_units()
    chosen = prepared.planned(in_float)
    emitter = prepared.write(model, chosen)
    units = prepared.everything.units
    result.changed = bool(chosen.units)
    result.skipped = [*chosen.skipped, *(Skip(units[key].label, reason) for key, reason in in_float.items())]
    result.details["quantised layers"] = layer_rows(
        prepared.everything, chosen, prepared.activations, emitter.weight_sqnr, {}, {}
    )
    result.notes.append(summary(chosen, scheme, prepared.rule, per_channel=per_channel))
    told = "in the given range" if input_range else "normal with mean 0 and deviation 1"
    result.notes.append(
        f"warning: quantised without data: ranges are estimates, from {found.measured} normalisations in the model and "
        f"from inputs taken to be {told}; measure the accuracy, or calibrate with unlabelled samples (--calib)"
    )
    return result
