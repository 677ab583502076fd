"""quantize: number formats with fewer bits, typed as the target's kernels want them.

    x^ = (clip(round(x / s) + z) - z) s         activations: one scale and zero point per tensor, from calibration
    w^ = clip(round(w / s_o)) s_o               weights: zero point 0, one scale per output channel o
    b^ = round(b / (s s_o)) s s_o               biases: int32, in units of the accumulator

The work is done by graphopt/quantization/: `static` for int8, `schemes.py` for what gives every layer one format,
`half` for fp16 and bf16, `search` for auto and budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.errors import UsageError
from graphopt.quantization.asked import unmatched, without_effect
from graphopt.quantization.formats import Format
from graphopt.quantization.half.scheme import quantise_half
from graphopt.quantization.ranges.without_data import quantise_without_data
from graphopt.quantization.rounding.choice import notes_of, rounding_for, rounding_front_to_back
from graphopt.quantization.rounding.interface import Rounding
from graphopt.quantization.schemes import quantise_uniformly
from graphopt.quantization.search.auto import quantise_auto
from graphopt.quantization.search.mixed import INTEGERS, Wanted, quantise_within
from graphopt.quantization.static.scheme import StaticOptions, quantise_static
from graphopt.rewriting.norm_sums import FUSED, keep_sums_apart


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantisation: integers, or floats of 16 bits, where float32 was.

    scheme=int8: integer weights and activations, scales from calibration data. Activations get the integer type of the
    target (uint8 on x86, where the VNNI instructions multiply unsigned by signed bytes; x86 processors without VNNI add
    these products in 16 bits, which can saturate), weights int8 with zero point 0 and one scale per output channel,
    biases int32. Convolutions, Gemm and MatMul are computed on integers, and so is what lies between them (Add, Mul,
    Concat, pooling, LeakyRelu, Sigmoid, data movement) where integers enter and leave; Relu and Clip(0, .) vanish in
    the saturation. Other operators stay in float without a Q/DQ pair of their own.

    Which layers stay in float is measured, not assumed: with `sensitive=auto` each layer is quantised alone on a few
    samples, and ranked by the noise it makes at the outputs over the work it does. Left in float are those whose noise
    costs more than their time saves, both in multiples of the time of the model in integers: half of that time is worth
    10 dB below 35 dB of signal to noise (and a tenth as much above), and all of it 2 % of noise power. So a few
    culprits go, noise that is spread over all layers stays, and a model that integers ruin stays in float whole; the
    report names what stayed and why.

    scheme=int8-dynamic: MatMul, Gemm and LSTM with integer weights, and activations whose scales are found as they
    arrive; no data is needed, and bodies of branches and loops are quantised too. Convolutions stay in float, because
    their dynamic kernel is many times slower than the one in float. With data, a tensor with a few channels much larger
    than the others is multiplied by powers of two first, and the weights that read it by their inverses.

    scheme=int8-weights, int4-weights: weights as integers, activations in float; no data is needed. Where the target
    has kernels that compute from blocks of integers and gain by it, they do; other weights become floats when the model
    is loaded: a smaller file at the speed of floats. Tables of embeddings are looked up in integers.

    scheme=fp16, bf16: float32 becomes float16 or bfloat16 where the target has it, but for operators without such a
    kernel and tensors whose numbers leave its range. Calibration data is optional and tells these ranges.

    scheme=auto: the fastest mixture of float, int8, int8-dynamic and integer weights on the target that stays within
    `--max-drop` (1 % where none is given). Layers that share kernels get one format; whole models are timed beside each
    other on short and long samples of the calibration data, one at a time or `batch` of them, one kind of layer changed
    after the other; layers that cost more accuracy than time go back to float. What is not shown to be faster than
    float is not done, and the measured ratios are the reason. Timing decides, so that two runs may differ; the report
    tells what `assignment` repeats a choice. A search takes a minute or two, and as long as some hundred runs of the
    model where those take longer.

    size=, latency=, drop=: budgets, with any scheme of integers; each layer then is in float or in that format (with
    scheme=auto: in any), so that bytes and time stay within what is given and the noise at the outputs is least, or,
    with drop=, the time is least at which the measured drop stays within it. What formats cost each layer is measured;
    the choice is optimal for the sums of that, and corrected by what the whole model then measures.

    data=none: int8 without calibration data. Ranges follow from what normalisations say of their outputs and elsewhere
    from moments carried through the layers as if elements were independent; a warning says so.

    Does not fire: on operators without a kernel of the format on the target, on anything quantised already; for int8
    also on weights or biases that are not constant, in branch and loop bodies, on tensors that hold inf or masks. The
    opset is raised where the format needs it. Preserves: inputs, outputs, names of nodes; a weight `w` becomes
    `w_quantized`, `w_scale`, `w_zero_point`.
    Source: Jacob et al. 2018 (arXiv:1712.05877); Banner et al. 2019 (arXiv:1810.05723) for `ranges=mse`;
    Migacz 2017 for `ranges=entropy`; Nagel et al. 2019 (arXiv:1906.04721) for `data=none`.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs_calibration: ClassVar[bool] = True

    scheme: Literal["auto", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16", "bf16"] = option(
        "int8", "the number format"
    )
    ranges: Literal["auto", "search", "minmax", "average", "percentile", "mse", "entropy"] = option(
        "auto",
        "range of an activation: its extremes, their average over the batches, its percentiles, least squared error or "
        "least divergence on its histogram; auto: minmax or mse, whichever disturbs the outputs less; search: for each "
        "tensor what disturbs the layers that read it least, if that beats every single rule",
    )
    data: Literal["calibration", "none"] = option(
        "calibration",
        "for int8: none estimates ranges from normalisations and weights; no data is needed, accuracy is less sure",
    )
    input_range: tuple[float, ...] = option(
        (), "for data=none: the lowest and highest value of the inputs; default: normal with mean 0 and deviation 1"
    )
    percentile: float = option(99.99, "for ranges=percentile: the share of values inside the range", low=50, high=100)
    per_channel: bool | None = option(None, "one weight scale per output channel; default: as the target wants it")
    sensitive: Literal["auto", "none"] = option("auto", "auto leaves in float the few layers that cause most noise")
    sparse_outputs: Literal["auto", "all", "none"] = option(
        "auto",
        "on targets whose int8 kernels that skip zeros write int8: of which sparse layers the output is quantised too; "
        "auto: as many as cost 1 dB of signal to noise",
    )
    block: int | None = option(
        None,
        "for weights alone as integers: input channels that share a scale; default: what is best for the kernel",
        low=1,
    )
    symmetric: bool | None = option(
        None, "for weights alone as integers: no zero points; default: none with 8 bits, some with 4"
    )
    prepare: Literal["auto", "none"] = option(
        "auto",
        "for int8: auto equalises or smooths before where the outputs then are more accurate, by measurement; for "
        "int8-dynamic, if there is data: it multiplies what layers read where that shrinks outliers",
    )
    size: float | None = option(
        None,
        "budget: bytes of all weights over those before the pass; formats are chosen layer by layer",
        low=0,
        high=1,
    )
    latency: float | None = option(
        None, "budget: time over that before the pass, measured on the target; the same", low=0
    )
    drop: float | None = option(
        None, "budget: loss of accuracy by --eval, else 1 - fidelity on the calibration data; the same", low=0
    )
    rounding: Literal["auto", "nearest", "gptq", "descent"] = option(
        "auto",
        "how weights become integers: the nearest; gptq, descent: by the second moments of what they multiply, from "
        "calibration data; auto: descent for weights of 4 bits or in blocks, where it pays, if there is data",
    )
    correct_bias: bool = option(
        False,
        "for int8: biases take up the mean error of outputs, where the model then is closer to the float one",
    )
    exclude: tuple[str, ...] = option((), "globs over node names that stay in float")
    samples: int = option(512, "calibration samples for the ranges", low=1)
    assignment: tuple[str, ...] = option(
        (),
        "for auto: a choice to repeat without measuring, as a report tells it: WHAT=FORMAT, where WHAT is a glob over "
        "node names, op:TYPE or out:TENSOR, and the last entry that fits counts",
    )
    batch: int = option(
        1, "for auto and latency=: samples of the calls that are timed; what is fast for one may not be for many", low=1
    )

    def __post_init__(self) -> None:
        """Check the options, and ask for data before any work where the scheme needs it.

        Raises:
            UsageError: a number outside its range.
        """
        super().__post_init__()
        if self._wanted and self.scheme in ("fp16", "bf16"):
            raise UsageError(
                "budgets choose between float and integers",
                where="quantize.size" if self.size is not None else "quantize",
                hint="leave size, latency and drop out, or take scheme=auto",
            )
        if self.data == "none" and (self.scheme != "int8" or self._wanted):
            raise UsageError(
                "only int8 without a budget does without data",
                where="quantize.data",
                hint="take scheme=int8 and no budget, or give calibration data",
            )
        if self.input_range and (len(self.input_range) != 2 or not self.input_range[0] < self.input_range[1]):
            raise UsageError(
                f"not a range: {self.input_range}", where="quantize.input_range", hint="write input_range=(0,1)"
            )
        needs = self.data == "calibration" and (self.scheme in ("auto", "int8") or bool(self._wanted))
        object.__setattr__(self, "needs_calibration", needs)

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.size, self.latency, self.drop)

    def if_slower(self) -> str:
        """scheme=auto, where it is not that already."""
        if self.scheme == "auto":
            return ""
        return "quantize{scheme=auto} quantises only what measurably becomes faster, and else leaves the model in float"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantise `model` in place."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        idle = [*unmatched(model, self.exclude), *without_effect(self.scheme, given)]
        result = self._quantised(model, ctx)
        result.notes += idle
        if result.changed and self.scheme not in ("fp16", "bf16") and FUSED in ctx.target.slow_fusions:
            apart = keep_sums_apart(model)
            if apart:
                result.notes.append(f"{len(apart)} sums before layer norms written as Sum: {FUSED} would be slower")
        return result

    def _quantised(self, model: ir.Model, ctx: Context) -> PassResult:
        if self._wanted:
            allowed = tuple(f for f in INTEGERS if self.scheme in ("auto", f))
            return quantise_within(
                model, ctx, self._static_options(), allowed, self._wanted,
                block=self.block, symmetric=self.symmetric, batch=self.batch,
            )  # fmt: skip
        match self.scheme:
            case "fp16" | "bf16":
                return quantise_half(model, ctx, self.scheme, exclude=self.exclude, samples=self.samples)
            case "int8-dynamic" | "int8-weights" | "int4-weights":
                return self._uniformly(model, ctx, self.scheme)
            case "auto":
                return quantise_auto(
                    model, ctx, self._static_options(), self.assignment,
                    block=self.block, symmetric=self.symmetric, batch=self.batch,
                )  # fmt: skip
            case "int8" if self.data == "none":
                return quantise_without_data(model, ctx, self._static_options(), self.input_range)
            case "int8":
                return quantise_static(model, ctx, self._static_options())

    def _uniformly(self, model: ir.Model, ctx: Context, scheme: Format) -> PassResult:
        def write(copy: ir.Model, rounding: Rounding) -> PassResult:
            return quantise_uniformly(
                copy, ctx, scheme, rounding=rounding, exclude=self.exclude, per_channel=self.per_channel,
                block=self.block, symmetric=self.symmetric, smooth=self.prepare == "auto",
            )  # fmt: skip

        if scheme == "int8-dynamic":
            return write(model, rounding_for(self.rounding, model, ctx))
        chosen = rounding_front_to_back(self.rounding, model, ctx, write)
        result = write(model, chosen)
        result.notes += notes_of(chosen)
        return result

    def _static_options(self) -> StaticOptions:
        return StaticOptions(
            ranges=self.ranges,
            percentile=self.percentile,
            per_channel=self.per_channel,
            sensitive=self.sensitive,
            sparse_outputs=self.sparse_outputs,
            exclude=self.exclude,
            samples=self.samples,
            prepare=self.prepare,
            rounding=self.rounding,
            correct_bias=self.correct_bias,
        )
