"""Execution providers of ONNX Runtime: where each is to be had, and how a target wants it set up for a model.

A target's `options` may hold tables of settings, each by provider: `providers` for every model, `float` and `quantised`
for models without and with operators of quantisation, and `bundle` for what runs from a bundle alone; there a setting
that begins with "./" is a path in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.lowering.size_ranges import Shapes, input_ranges, open_sizes

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.target import Target

CPU, TENSORRT = "CPUExecutionProvider", "TensorrtExecutionProvider"

PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    TENSORRT: "onnxruntime-gpu",
    "NvTensorRTRTXExecutionProvider": "onnxruntime-trt-rtx",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "DmlExecutionProvider": "onnxruntime-directml",
}
"""pip packages that bring an execution provider; the others come with the runtime's own build for their device."""

Settings = dict[str, dict[str, str]]


def missing_provider(target: Target) -> str | None:
    """Why this ONNX Runtime has none of the target's providers that compute on its device; None where it has one."""
    import onnxruntime as ort

    present = ort.get_available_providers()
    wanted = [p for p in target.providers if p != CPU or target.device == "cpu"]
    if not wanted or any(provider in present for provider in wanted):
        return None
    package = next((PACKAGES[p] for p in wanted if p in PACKAGES), None)
    how = f"pip install {package}" if package else "a build of ONNX Runtime for that device has it"
    return f"ONNX Runtime {ort.__version__} here has no {' and no '.join(wanted)} ({how})"


def needs(target: Target) -> tuple[str, ...]:
    """What must be on a device of the target."""
    package = next((PACKAGES[p] for p in target.providers if p in PACKAGES), "onnxruntime")
    return (
        f"Python 3.9 or newer with numpy and {package} (`pip install numpy {package}`)",
        *(str(line) for line in target.options.get("needs", ())),
    )


def settings(model: ir.Model, target: Target, sizes: str | None, *, bundled: bool) -> Settings:
    """The settings of each provider for a model.

    Args:
        model: as it is deployed.
        target: whose `options` hold them.
        sizes: ranges of open dimensions (`graphopt.lowering.size_ranges`), for providers that build for ranges.
        bundled: it runs from a bundle.

    Raises:
        UsageError: the ranges do not fit the model, or no provider of the target builds for ranges.
    """
    from graphopt.quantization.back.recognised import holds_quantised

    found: Settings = {}
    tables = ["providers", "quantised" if holds_quantised(model) else "float", *(("bundle",) if bundled else ())]
    for table in tables:
        for provider, entries in target.options.get(table, {}).items():
            found.setdefault(provider, {}).update({key: str(value) for key, value in entries.items()})
    if sizes is not None:
        if TENSORRT not in target.providers:
            raise UsageError(
                f"no provider of target {target.name!r} builds for ranges", where="sizes", hint="leave it out"
            )
        found.setdefault(TENSORRT, {}).update(profile(input_ranges(model, sizes)))
    return found


def profile(ranges: Mapping[str, Shapes]) -> dict[str, str]:
    """Ranges of shapes as the TensorRT provider reads them: `x:1x3x224x224,y:1x8`."""
    if not ranges:
        return {}
    keys = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
    return {
        key: ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in ranges.items())
        for index, key in enumerate(keys)
    }


def unprofiled(model: ir.Model, target: Target, sizes: str | None) -> tuple[str, ...]:
    """What the reader of a bundle must know where TensorRT is left to find out sizes by itself."""
    names = open_sizes(model)
    if TENSORRT not in target.providers or sizes is not None or not names:
        return ()
    wanted = ",".join(f"{name}=LEAST:USUAL:LARGEST" for name in dict.fromkeys(n for v in names.values() for n in v))
    return (
        f"TensorRT builds its engine anew whenever an input is larger or smaller than all before; lowering with "
        f"`--set sizes={wanted}` tells it the range once and for all.",
    )


def chosen(target: Target, of: Mapping[str, Mapping[str, str]], folder: Path) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of a target that are here, with their settings, for a session of a bundle in `folder`."""
    import onnxruntime as ort

    present = ort.get_available_providers()
    found: list[str | tuple[str, dict[str, str]]] = []
    for provider in target.providers:
        if provider not in present:
            continue
        entries = {k: str(folder / v[2:]) if v.startswith("./") else v for k, v in of.get(provider, {}).items()}
        found.append((provider, entries) if entries else provider)
    return found


def fell_back(session: Any, target: Target) -> str | None:
    """What to say of a session that computes on the processor though the target is another device; None for others."""
    used = session.get_providers()
    if target.device == "cpu" or any(provider != CPU for provider in used):
        return None
    wanted = " and ".join(p for p in target.providers if p != CPU)
    return f"ONNX Runtime could not start {wanted}, and would compute on the processor (it lacks their libraries)"
