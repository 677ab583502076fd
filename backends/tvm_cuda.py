"""The CUDA source of a compiled model, and whether nvcc takes it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ModelError

if TYPE_CHECKING:
    from tvm.relax import VMExecutable

    from graphopt.target import Target

NVCC_SECONDS = 600


def write_source(executable: VMExecutable, target: Target, folder: Path) -> dict[str, Any]:
    """Write kernels.cu, and compile it to a device binary where nvcc is installed.

    Returns:
        what the manifest says of it: number of kernels, and how they were checked.

    Raises:
        ModelError: nvcc refuses the source.
    """
    source = cuda_source(executable.mod)
    path = folder / "kernels.cu"
    path.write_text(source, encoding="utf-8")
    kernels = source.count('extern "C" __global__')
    return {"kernels": kernels, "arch": target.arch, "checked": _checked(path, target.arch)}


def cuda_source(module: Any) -> str:
    """CUDA C of all modules that a module imports."""
    own = str(module.inspect_source()) if module.kind == "cuda" else ""
    return "\n".join(filter(None, (own, *(cuda_source(imported) for imported in module.imports))))


def _checked(path: Path, arch: str) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "not compiled: nvcc is not installed here"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, f"-arch={arch}", "-cubin", "-o", str(Path(folder) / "kernels.cubin"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVCC_SECONDS, check=False)
    if done.returncode:
        line = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr.strip()[-300:])
        raise ModelError(f"nvcc refuses the generated kernels: {line}", where=arch, hint="use target jetson-orin")
    return f"compiled for {arch} with {_version(nvcc)}; not run"


def _version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    release = next((line for line in text.splitlines() if "release" in line), "nvcc")
    return "nvcc " + release.partition("release")[2].partition(",")[0].strip()
