"""quantize: integers for weights and activations, typed as the target's kernels want them.

    x^ = (clip(round(x / s) + z) - z) s         activations: one scale and zero point per tensor, from calibration
    w^ = clip(round(w / s_o)) s_o               weights: zero point 0, one scale per output channel o
    b^ = round(b / (s s_o)) s s_o               biases: int32, in units of the accumulator

The work is done by graphopt/quantization/: `static.py` for the scheme int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.quantization.static import StaticOptions, quantise_static


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
    ranges: Literal["auto", "search", "minmax", "average", "percentile", "mse", "entropy"] = option(
        "auto",
        "range of an activation: its extremes, their average over the batches, its percentiles, least squared error or "
        "least divergence on its histogram; auto: minmax or mse, whichever disturbs the outputs less; search: for each "
        "tensor what disturbs the layers that read it least, if that beats every single rule",
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
        return quantise_static(model, ctx, self._static_options())

    def _static_options(self) -> StaticOptions:
        return StaticOptions(
            ranges=self.ranges,
            percentile=self.percentile,
            per_channel=self.per_channel,
            sensitive=self.sensitive,
            sparse_outputs=self.sparse_outputs,
            exclude=self.exclude,
            samples=self.samples,
        )
