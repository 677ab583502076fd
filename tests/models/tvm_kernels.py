"""A model compiled by TVM with our schedules, beside ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.executor import Session


@dataclass(frozen=True)
class Kernels:
    """A compiled model: how far it is from ONNX Runtime, which kernels it has, which rules failed, its assembly."""

    error: float
    names: set[str]
    unscheduled: set[str]
    failures: list[Any]


def x86(cores: int = 1) -> Any:
    """An AVX2 target: every x86-64 machine of the last ten years runs it."""
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "num-cores": cores})


def scheduled(model: ir.Model, target: Any) -> tuple[Any, list[Any]]:
    """The model's kernels with their schedules, and the rules that failed."""
    from graphopt.backends import tvm_build, tvm_schedules

    failures: list[Any] = []
    fused = tvm_build.fused(tvm_build.imported(model), target)
    return tvm_schedules.schedule(fused, target, failures=failures), failures


def assembly(module: Any, target: Any) -> str:
    """The machine code of scheduled kernels as text."""
    import tvm

    def texts(part: Any) -> list[str]:
        own = [part.inspect_source("asm")] if part.kind == "llvm" else []
        return own + [text for inner in part.imports for text in texts(inner)]

    return "\n".join(texts(tvm.compile(module, target=target).mod))


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference over the largest number; infinite where NaN and infinities are not in the same places."""
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    difference, largest = (np.abs(values).max(initial=0) for values in (got[finite] - want[finite], want[finite]))
    return float(difference / max(largest, 1e-30))


def compared(model: ir.Model, feeds: dict[str, np.ndarray], target: Any | None = None) -> Kernels:
    """Compile and run a model, by TVM and by ONNX Runtime; the error is relative to the largest output."""
    import tvm
    from tvm import relax, tirx

    target = target or x86()
    module, failures = scheduled(model, target)
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(feeds[v.name]) for v in model.graph.inputs))
    outputs = [result] if hasattr(result, "numpy") else list(result)
    expected = Session(model, optimize=False).run(feeds)
    error = 0.0
    for output, value in zip(model.graph.outputs, outputs, strict=True):
        want = expected[output.name]
        assert value.numpy().shape == want.shape
        error = max(error, _distance(value.numpy(), want))
    kernels = {name.name_hint: f for name, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    unscheduled = {name for name, f in kernels.items() if not f.attrs.get("tirx.is_scheduled", 0)}
    return Kernels(error, set(kernels), unscheduled, failures)
