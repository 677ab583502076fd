"""One format for all layers that can have it, with scales that need no calibration data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir

from graphopt.base import Context, PassResult, Skip
from graphopt.files.opset import opset_of, raise_opset
from graphopt.files.shape_inference import infer_shapes
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.apply import apply
from graphopt.quantization.formats import BITS, Candidate, Format, candidates
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.rounding.interface import Rounding, nearest
from graphopt.quantization.weights.unpacked import OPSET_MIN
from graphopt.target import QuantScheme, int8_scheme


def quantise_uniformly(
    model: ir.Model,
    ctx: Context,
    wanted: Format,
    *,
    exclude: tuple[str, ...] = (),
    per_channel: bool | None = None,
    rounding: Rounding = nearest,
    block: int | None = None,
    symmetric: bool | None = None,
    smooth: bool = True,
) -> PassResult:
    """Give every layer one format, in place; what cannot have it stays in float and is told with the reason.

    Products of two activations are left in float: both operands would have to be quantised each time, for products that
    are often short; `scheme=auto` measures whether that pays.

    Args:
        model: the model.
        ctx: its target counts.
        wanted: a format whose scales do not come from calibration.
        exclude: globs over names of nodes that stay in float.
        per_channel: one weight scale per output channel; None: as the target wants it.
        rounding: makes weights integers.
        block: columns that share a scale where weights alone are quantised; None: what is best for their form.
        symmetric: whether those have no zero points; None: with 8 bits they have none.
        smooth: scales may be put in front of layers with dynamic scales, where there is calibration data.

    Raises:
        UsageError: activations are to be integers, and the target computes in floating point only.
    """
    scheme = ctx.target.quant if wanted in BITS else int8_scheme(ctx.target, "quantize")
    infer_shapes(model)
    found = candidates(model, ctx.target, exclude, block=block, symmetric=symmetric)
    raised = None
    if wanted in BITS and opset_of(model) < OPSET_MIN:
        newer = private_clone(model)
        raise_opset(newer, OPSET_MIN, wanted)
        infer_shapes(newer)
        more = candidates(newer, ctx.target, exclude, block=block, symmetric=symmetric)
        if any(wanted in c.formats for c in more.values()):
            raised, found = raise_opset(model, OPSET_MIN, wanted), more
            infer_shapes(model)
    scheme = scheme or QuantScheme()
    channels = scheme.per_channel if per_channel is None else per_channel
    prepared = Prepared(
        model, scheme, channels, exclude,
        calibration=ctx.calibration, threads=ctx.jobs, smooth=smooth,
        rounding=rounding, weights=ctx.target.weights, block=block, symmetric=symmetric,
    )  # fmt: skip
    listed = [c for c in found.values() if c.kind != "between"]
    # Weights are asked for one by one: a product may read its weight through a Transpose.
    tried = [c for c in listed if wanted in BITS or c.kind != "product"]
    chosen = {c.key: wanted for c in tried if wanted in c.formats}
    result = PassResult(
        changed=False, skipped=[Skip(c.label, _reason(c, wanted)) for c in listed if c.key not in chosen]
    )
    if not chosen:
        result.notes.append("nothing to quantise")
        return result
    done = apply(model, chosen, prepared)
    refused = {skip.node for skip in done.skipped}
    result.changed = len(refused) < len(chosen) or raised is not None
    result.skipped += done.skipped
    written = [c for c in listed if c.key in chosen and c.label not in refused]
    result.details["quantised layers"] = [_row(c, wanted) for c in written]
    counted = ", ".join(f"{count} {op}" for op, count in sorted(Counter(c.op_type for c in written).items()))
    result.notes += [f"{wanted}: {counted}", *([raised] if raised else []), *done.notes]
    return result


def _reason(candidate: Candidate, wanted: Format) -> str:
    if wanted in candidate.reasons:
        return candidate.reasons[wanted]
    return "a product of two activations: both would be quantised each time (scheme=auto measures whether that pays)"


def _row(candidate: Candidate, wanted: Format) -> dict[str, Any]:
    return {"layer": candidate.label, "op": candidate.op_type, "type": wanted}
