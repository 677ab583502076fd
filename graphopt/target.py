"""A target is data: the device and runtime a model is made for, read from a TOML table (backends/targets.toml)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from graphopt.errors import UsageError

ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64", "aarch64": "aarch64"}
"""Target architectures by the name that the operating system gives the machine, lower case."""


@dataclass(frozen=True)
class QuantScheme:
    """How a target wants int8 tensors.

    Attributes:
        activation: "uint8" or "int8". On x86 (VNNI) ONNX Runtime is fast for uint8 activations only.
        weight: "int8" or "uint8".
        symmetric_activation: True where the runtime takes zero point 0 only (TensorRT).
        per_channel: one weight scale per output channel.
        bias: type in which biases of int8 layers are stored; "float" where the runtime takes no int32 ones (TensorRT).
        sparse_outputs: outputs of layers with sparse weights are quantised even where no int8 layer reads them, because
            the kernels that skip zeros write int8.
        float_outputs: its kernels read integers and may write float: the output of a layer needs no scale of its own.
        fused_sums: a sum is computed by the layer before it, whose result it takes unquantised: of its operands those
            get Q/DQ that no layer makes for it alone (the residual branch).
        per_channel_ops: operators whose weights may have one scale per channel; (): all.
        ops: operator types that the target executes in int8.
        dynamic: operator types that it executes in int8 with scales found as the activations arrive; MatMul and Gemm
            are written in standard ONNX, LSTM as an operator of ONNX Runtime.
    """

    activation: Literal["uint8", "int8"] = "uint8"
    weight: Literal["uint8", "int8"] = "int8"
    symmetric_activation: bool = False
    per_channel: bool = True
    bias: Literal["int32", "float"] = "int32"
    sparse_outputs: bool = False
    float_outputs: bool = False
    fused_sums: bool = False
    per_channel_ops: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ("MatMul", "Gemm")


@dataclass(frozen=True)
class HalfTypes:
    """What float16 and bfloat16 models are on a target.

    Attributes:
        types: half types that its runtime executes.
        faster: those among them in which models run faster than in float32.
        float_ops: operators without a kernel of a half type, which stay in float32; "Transpose>MatMul" is a product by
            a constant together with a Transpose before it that moves the first axis.
        quantised: its Q and DQ read and write half types, too, and a layer must stand right behind its DQ: the float
            part of a quantised model becomes half without a Cast in between (TensorRT, strongly typed).
        note: why a type is not faster, or what else must hold, for the reader of a report.
    """

    types: tuple[str, ...] = ("float16",)
    faster: tuple[str, ...] = ()
    float_ops: tuple[str, ...] = ()
    quantised: bool = False
    note: str = ""


@dataclass(frozen=True)
class WeightKernels:
    """How a target reads weights that are integers while activations are floats.

    Attributes:
        form: "MatMulNBits": products and look-ups of ONNX Runtime that compute from blocks of integers;
            "DequantizeLinear": the runtime knows such a product by this operator; "arithmetic": it has none, and
            weights become floats when the model is loaded.
        block: columns that share a scale where nobody says otherwise.
        inputs, outputs: products with fewer channels are slower from integers than in float.
        inputs_small_block: `inputs` for blocks smaller than `block`.
        table: a table of fewer bytes is looked up faster in float.
    """

    form: Literal["MatMulNBits", "DequantizeLinear", "arithmetic"] = "arithmetic"
    block: int = 128
    inputs: int = 1
    inputs_small_block: int = 1
    outputs: int = 1
    table: int = 1 << 20


@dataclass(frozen=True)
class SparseKernels:
    """Which layers the kernels that skip 2:4 zeros take, and where they gain.

    Attributes:
        inputs, outputs: with fewer channels (of a group) a layer stays dense, because it would not become faster.
        input_multiple, output_multiple: other channel counts (of a group) are not taken.
        kernel_positions: every position of a kernel counts towards `inputs` (64 channels under 3x3 are 576).
        convolutions: whether they take convolutions, or matrix products only.
        grouped: whether they take grouped convolutions.
        types: of the operands.
        symmetric: int8 activations need zero point 0.
        note: what else must hold, for the reader of a report.
        sources: where a rule was read, by the name that reports give it (`graphopt.sparsity.eligibility`).
    """

    inputs: int = 16
    outputs: int = 1
    input_multiple: int = 1
    output_multiple: int = 1
    kernel_positions: bool = False
    convolutions: bool = True
    grouped: bool = True
    types: tuple[str, ...] = ("float16", "bfloat16", "int8")
    symmetric: bool = False
    note: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One row of targets.toml.

    Attributes:
        name: what `--target` takes.
        backend: name of the backend that runs and lowers it.
        device: "cpu", "gpu", "npu".
        arch: "x86-64", "aarch64", "sm_87", ...
        providers: ONNX Runtime execution providers, in order of preference.
        opset_max, ir_max: newest versions the runtime reads; None: no cap.
        dtype: type in which float products are computed; "model": as the model has it.
        channel_multiple: the kernels' channel granularity; pruned widths are rounded to it.
        sparsity_2_4: True where 2:4 weights are executed faster.
        sparse: which layers `sparsify` and `armor` take.
        quant: int8 scheme, None where int8 is not supported.
        half: half types.
        weights: how weights are read that alone are quantised.
        slow_fusions: operators that its runtime fuses and that are slower than their parts; a pass that writes for the
            target keeps these apart (`graphopt.rewriting.norm_sums`).
        slow_operators: operators of the standard that its runtime executes slower than what they stand for, written
            out; a pass that recognises operators leaves these alone (`graphopt.rewriting.recognise`).
        artefacts: what `lower` writes besides the model.
        delegates: tables (`graphopt.delegates`) of the accelerators that its runtime may hand nodes to.
        static_shapes: it takes models without free dimensions only.
        prepare: pipeline (`graphopt.spec`) that a model goes through, on a copy, before its backend lowers it.
        quant_refusal: why it takes no model that is quantised already; "": it does.
        options: what its backend alone reads, by names of the backend's own.
        limits: what does not hold of its bundles or was not tried, a sentence each, for their readers.
        description: one line for `graphopt targets`.
    """

    name: str
    backend: str
    device: str = "cpu"
    arch: str = "x86-64"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    opset_max: int | None = None
    ir_max: int | None = None
    dtype: Literal["model", "float16", "bfloat16"] = "model"
    channel_multiple: int = 1
    sparsity_2_4: bool = False
    sparse: SparseKernels = field(default_factory=SparseKernels)
    quant: QuantScheme | None = field(default_factory=QuantScheme)
    half: HalfTypes = field(default_factory=HalfTypes)
    weights: WeightKernels = field(default_factory=WeightKernels)
    slow_fusions: tuple[str, ...] = ()
    slow_operators: tuple[str, ...] = ()
    artefacts: tuple[str, ...] = ()
    delegates: tuple[str, ...] = ()
    static_shapes: bool = False
    prepare: str = ""
    quant_refusal: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    description: str = ""


def this_architecture() -> str:
    """The processor of this machine, as targets name it."""
    name = platform.machine().lower()
    return ARCHITECTURES.get(name, name)


def other_processor(target: Target) -> str | None:
    """Why code for the processor of a target does not run on this machine's; None where it does."""
    here = this_architecture()
    return None if here == target.arch else f"this machine is {here}, the target {target.arch}"


def int8_scheme(target: Target, where: str, hint: str = "leave the pass out") -> QuantScheme:
    """How a target wants int8 tensors.

    Args:
        target: asked.
        where: what needs it, for the error message.
        hint: what to do where it has none.

    Raises:
        UsageError: it executes none; says why, where its table does.
    """
    if target.quant is None:
        why = f": {target.quant_refusal}" if target.quant_refusal else ""
        raise UsageError(f"target {target.name} does not execute int8{why}", where=where, hint=hint)
    return target.quant


def parse_target(name: str, table: object, source: str) -> Target:
    """Make a target from its table.

    Keys are the fields of `Target`; `quant` is a sub-table of `QuantScheme` or false, `sparse` one of `SparseKernels`,
    `half` one of `HalfTypes`, `weights` one of `WeightKernels`; `options` is a sub-table of anything.

    Args:
        name: name of the table, which becomes the target's.
        table: as TOML gives it.
        source: file or distribution, for error messages.

    Raises:
        UsageError: an unknown key, a wrong type, or a missing backend; names the table and the key.
    """
    where = f"target {name!r} in {source}"
    if not isinstance(table, Mapping):
        raise UsageError(
            f"is not a table but {type(table).__name__}", where=where, hint="write [name] and then its keys"
        )
    values = dict(table)
    scheme = values.pop("quant", None)
    parts = {"sparse": SparseKernels, "half": HalfTypes, "weights": WeightKernels}
    tables = {key: values.pop(key, {}) for key in parts}
    made: dict[str, Any] = _checked(values, Target, where, without=("name", "quant", *parts))
    for key, kind in parts.items():
        if not isinstance(tables[key], Mapping):
            raise UsageError(f"{key!r} must be a table", where=where, hint=f"write [name.{key}] and its keys")
        made[key] = kind(**_checked(dict(tables[key]), kind, f"{where}, {key}"))
    if min(getattr(made["sparse"], n) for n in ("inputs", "outputs", "input_multiple", "output_multiple")) < 1:
        raise UsageError("counts of channels are at least 1", where=f"{where}, sparse", hint="correct the table")
    if scheme is False:
        made["quant"] = None
    elif isinstance(scheme, Mapping):
        made["quant"] = QuantScheme(**_checked(dict(scheme), QuantScheme, f"{where}, quant"))
    elif scheme is not None:
        raise UsageError("'quant' must be a table or false", where=where, hint="write [name.quant] and its keys")
    if "backend" not in made:
        raise UsageError("lacks 'backend'", where=where, hint="name the backend that runs it, such as 'ort'")
    if made.get("channel_multiple", 1) < 1:
        raise UsageError("'channel_multiple' must be at least 1", where=where, hint="write 1 for no rounding")
    return Target(name=name, **made)


def _checked(values: dict[str, Any], kind: type, where: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    hints = {k: v for k, v in get_type_hints(kind).items() if k not in without}
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UsageError(f"unknown key {key!r}", where=where, hint=f"known keys are {', '.join(hints)}")
        made[key] = _typed(value, hints[key], f"{where}, key {key!r}")
    return made


def _typed(value: Any, wanted: Any, where: str) -> Any:
    """Check a TOML value against the annotation of the field; TOML arrays become tuples."""
    arguments = get_args(wanted)
    if get_origin(wanted) is Literal:
        if value in arguments:
            return value
        text = " or ".join(repr(a) for a in arguments)
    elif get_origin(wanted) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        text = "an array of strings"
    elif get_origin(wanted) is Mapping:
        anything = arguments[1] is Any
        if isinstance(value, Mapping) and (anything or all(isinstance(v, str) for v in value.values())):
            return dict(value)
        text = "a table" if anything else "a table of strings"
    else:
        kinds = tuple(a for a in (arguments or (wanted,)) if a is not type(None))
        # bool is a subclass of int, but `opset_max = true` is a mistake.
        if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
            return value
        text = " or ".join(k.__name__ for k in kinds)
    raise UsageError(f"{value!r} is not {text}", where=where, hint="correct the table")
