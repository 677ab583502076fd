"""dequantize: a model that somebody quantised, in float32 again and in operators of the standard.

    (q - z) s        weights: exactly the numbers that the integers stand for
    x                activations: without the rounding in between, or (activations=keep) with it

Operators are written in float one by one (`graphopt.quantization.back.operators`, `integer_chains`), then the pairs
around activations go (`integer_tensors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.quantization.back.recognised import holds_quantised


@dataclass(frozen=True)
class Dequantize(Pass):
    """Bring a quantised model back to float32, so that it can be changed, or quantised for another target.

    Algebra: weights become (q - z) s, exactly. With `activations=keep` an activation stays rounded to the grid of its
    QuantizeLinear, and the result is that of the given model but for the rounding of integer kernels. With
    `activations=drop` it is not rounded any more: the outputs change by the noise that quantisation had added, which is
    why the effect is lossy. Saturation that stood for an activation stays: a zero point at the lowest integer is
    written as Relu, or as Clip(0, 6) where the highest one stands for 6.

    Covers QuantizeLinear and DequantizeLinear of all types and blocks, QLinear*, QGemm, MatMulInteger and ConvInteger
    with their scales, DynamicQuantizeMatMul, MatMulIntegerToFloat, DynamicQuantizeLSTM, MatMulNBits and
    GatherBlockQuantized, in bodies too. Does not fire: on integers that come from outside (a uint8 input keeps its
    DequantizeLinear), on weights that are computed, on layouts without standard operators (channels last, QAttention,
    QMoE, ...). Preserves: inputs, outputs and their types; a weight `w_quantized` becomes `w`.
    Source: the operator specifications of ONNX and ONNX Runtime.
    """

    name: ClassVar[str] = "dequantize"
    effect: ClassVar[Effect] = Effect.LOSSY

    activations: Literal["drop", "keep"] = option("drop", "keep: activations stay rounded, by Q/DQ pairs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Dequantise `model` in place."""
        from graphopt.files.shape_inference import infer_shapes
        from graphopt.quantization.back.dequantise import dequantise
        from graphopt.rewriting.constants import freeze_overridable
        from graphopt.rewriting.prepare import inline_functions

        before = holds_quantised(model)
        if not before and not model.functions:
            return PassResult(changed=False, notes=["nothing is quantised"])
        notes = inline_functions(model)
        frozen = freeze_overridable(model)
        if frozen:
            notes.append(f"{len(frozen)} initializers that callers could override are constants now")
        infer_shapes(model)
        done = dequantise(model, keep=self.activations == "keep")
        infer_shapes(model)
        if done.operators:
            counted = ", ".join(f"{count} {op}" for op, count in sorted(done.operators.items()))
            notes.append(f"written in float: {counted}")
        notes.append(f"{done.weights} quantised constants are float32, exactly the numbers they stood for")
        if self.activations == "keep":
            notes.append(f"{done.kept} activations are rounded as before: the outputs are those of the given model")
        elif done.dropped:
            notes.append(f"{done.dropped} roundings of activations dropped: the outputs lose the noise that they added")
        if done.clips:
            notes.append(f"{done.clips} Relu or Clip written for saturation that stood for them")
        after = holds_quantised(model)
        changed = before != after or bool(frozen) or bool(done.operators or done.weights or done.dropped)
        rows = [{"operator": op, "before": count, "after": after.get(op, 0)} for op, count in sorted(before.items())]
        return PassResult(changed, done.skipped, notes, {"quantised operators": rows} if rows else {})
