"""The schemes fp16 and bf16 of `quantize`: ask the target, measure ranges of activations, convert, tell the gain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, PassResult
from graphopt.errors import UsageError
from graphopt.quantization.back.recognised import holds_quantised
from graphopt.quantization.half.convert import TYPES, to_half
from graphopt.quantization.half.types import is_float32
from graphopt.rewriting.nodes import is_onnx

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

NAMES = {"fp16": "float16", "bf16": "bfloat16"}


def quantise_half(model: ir.Model, ctx: Context, scheme: str, *, exclude: tuple[str, ...], samples: int) -> PassResult:
    """Convert the float32 part of `model` to half, in place.

    Args:
        model: any model; what is quantised already stays.
        ctx: target, and calibration data where there is some.
        scheme: "fp16" or "bf16".
        exclude: globs over node names that stay in float32.
        samples: of the calibration data, for the ranges of activations.

    Raises:
        UsageError: the target does not execute this type.
    """
    name, half = NAMES[scheme], ctx.target.half
    if name not in half.types:
        others = [other for other in NAMES if NAMES[other] in half.types]
        raise UsageError(
            f"target {ctx.target.name} does not execute {name}" + (f": {half.note}" if half.note else ""),
            where=f"quantize{{scheme={scheme}}}",
            hint=f"take scheme={others[0]}" if others else "leave the pass out, or choose another target",
        )
    if not any(is_float32(v) for v in _computed(model)) and not _float_weights(model):
        return PassResult(changed=False, notes=["nothing is float32"])
    held = _computes_in_half(model)
    if held is not None:
        note = f"it computes in {held} already: what is float32 in it was left so by whoever converted it, and stays"
        return PassResult(changed=False, notes=[note])
    largest = None
    if ctx.calibration is not None:
        largest = magnitudes(model, ctx.calibration, samples=samples, threads=ctx.jobs)
    quantised = holds_quantised(model)
    done = to_half(
        model, TYPES[name], exclude=exclude, float_ops=half.float_ops, largest=largest, quantised=half.quantised
    )
    notes = [f"{done.nodes} nodes compute in {name}, {len(done.kept)} stay in float32; {done.casts} casts between them"]
    notes += done.notes
    if quantised and half.quantised:
        notes.append(f"QuantizeLinear and DequantizeLinear read and write {name}, with scales of that type")
    elif quantised:
        counted = ", ".join(f"{count} {op}" for op, count in sorted(quantised.items()))
        notes.append(f"quantised already, and left as it is: {counted} (the pass dequantize takes it back)")
    if name not in half.faster:
        why = half.note or f"its table does not say that {name} is faster there"
        notes.append(f"warning: {name} saves memory on target {ctx.target.name}, not time: {why}")
    return PassResult(changed=done.nodes > 0 or bool(done.casts), skipped=done.kept, notes=notes)


def magnitudes(model: ir.Model, calibration: Calibration, *, samples: int, threads: int) -> dict[str, float]:
    """The largest finite magnitude of every float32 tensor of the main graph on the data, in bounded memory."""
    from graphopt.data.activations import activations

    names = [str(v.name) for v in _computed(model)]
    found: dict[str, float] = {}
    for tensors in activations(model, names, calibration, limit=samples, threads=threads):
        for name, values in tensors.items():
            if values.size:
                finite = np.abs(values[np.isfinite(values)])
                found[name] = max(found.get(name, 0.0), float(finite.max(initial=0.0)))
    return found


def _computed(model: ir.Model) -> list[ir.Value]:
    """float32 tensors of the main graph that nodes compute."""
    return [v for n in model.graph for v in n.outputs if n.op_type != "Constant" and v.name and is_float32(v)]


def _computes_in_half(model: ir.Model) -> str | None:
    """The half type in which nodes of a model compute already; None where none does."""
    for node in model.graph.all_nodes():
        if is_onnx(node, "Cast", "Constant"):
            continue
        for value in node.outputs:
            if value.dtype is not None and value.dtype in TYPES.values():
                return value.dtype.name.lower()
    return None


def _float_weights(model: ir.Model) -> bool:
    return any(is_float32(v) for v in model.graph.initializers.values())
