"""Targets of TVM: the options of a target's table as a `tvm.target.Target`.

Options (`[NAME.options]` in targets.toml), all optional:

    processor   LLVM's name of the processor that code is made for; "host": the one of this machine
    triple      system that code is made for, such as "aarch64-linux-gnu"; none: this machine's
    cores       threads that a kernel may be split over; none: the cores of this machine
    linker      C++ compiler that links for `triple`
    package     Debian package that has the linker
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.target import Target

OPTIONS = ("processor", "triple", "cores", "linker", "package")

CUDA_LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
"""What every NVIDIA GPU from compute capability 3.0 has; TVM would ask the GPU, and there may be none here."""


def device_target(target: Target) -> Any:
    """The `tvm.target.Target` of a target.

    Raises:
        UsageError: an option that this backend does not know, or a processor that LLVM does not know.
    """
    import tvm

    unknown = sorted(set(target.options) - set(OPTIONS))
    if unknown:
        raise UsageError(
            f"backend 'tvm' has no option {unknown[0]!r}", where=f"target {target.name!r}",
            hint=f"its options are {', '.join(OPTIONS)}",
        )  # fmt: skip
    host = _processor(target)
    if target.device != "gpu":
        return tvm.target.Target(host)
    return tvm.target.Target({"kind": "cuda", "arch": target.arch, **CUDA_LIMITS, "host": host})


def _processor(target: Target) -> dict[str, Any]:
    import tvm

    options = target.options
    made: dict[str, Any] = {"kind": "llvm", "num-cores": int(options.get("cores", os.cpu_count() or 1))}
    if "triple" in options:
        made["mtriple"] = options["triple"]
    processor = options.get("processor", "generic")
    if processor == "host":
        made |= host_processor()
    elif processor != "generic":
        made["mcpu"] = processor
        if not tvm.get_global_func("target.llvm_is_valid_cpu")(processor, made.get("mtriple", host_triple())):
            raise UsageError(
                f"LLVM knows no processor {processor!r}", where=f"target {target.name!r}", hint="correct the table"
            )
    return made


def host_processor() -> dict[str, Any]:
    """This machine's processor for LLVM, without the instructions that a virtual machine hides of it."""
    import tvm

    name = str(tvm.get_global_func("tvm.codegen.llvm.GetHostCPUName")())
    detected = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    hidden = {str(feature) for feature, present in detected.items() if not int(present)}
    described = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target({"kind": "llvm", "mcpu": name}))
    missing = sorted(hidden & {str(feature) for feature in described})
    return {"mcpu": name, **({"mattr": [f"-{feature}" for feature in missing]} if missing else {})}


def host_triple() -> str:
    """LLVM's name of this machine's system."""
    import tvm

    return str(tvm.get_global_func("tvm.codegen.llvm.GetDefaultTargetTriple")())


def linker(target: Target) -> str | None:
    """The compiler that links for a target, by path; None where it is not installed."""
    return shutil.which(str(target.options.get("linker", "g++")))
