"""A target is data: the device and runtime a model is made for, read from a TOML table (backends/targets.toml)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class QuantScheme:
    """How a target wants int8 tensors.

    Attributes:
        activation: "uint8" or "int8". On x86 (VNNI) ONNX Runtime is fast for uint8 activations only.
        weight: "int8" or "uint8".
        symmetric_activation: True where the runtime takes zero point 0 only (TensorRT).
        per_channel: one weight scale per output channel.
        ops: operator types that the target executes in int8.
    """

    activation: Literal["uint8", "int8"] = "uint8"
    weight: Literal["uint8", "int8"] = "int8"
    symmetric_activation: bool = False
    per_channel: bool = True
    ops: tuple[str, ...] = ()


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
        channel_multiple: the kernels' channel granularity; pruned widths are rounded to it.
        sparsity_2_4: True where 2:4 weights are executed faster.
        quant: int8 scheme, None where int8 is not supported.
        artefacts: what `lower` writes besides the model.
        description: one line for `graphopt targets`.
    """

    name: str
    backend: str
    device: str = "cpu"
    arch: str = "x86-64"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    opset_max: int | None = None
    ir_max: int | None = None
    channel_multiple: int = 1
    sparsity_2_4: bool = False
    quant: QuantScheme | None = field(default_factory=QuantScheme)
    artefacts: tuple[str, ...] = ()
    description: str = ""
