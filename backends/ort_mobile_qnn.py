"""Hexagon code made here: whether Qualcomm's compiler takes a model is better known by asking it than by a table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import MissingBackendError, ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

SECONDS = 900
"""Time after which the compiler is stopped; large models take minutes."""

ABSENT = 3
HOW = "pip install onnxruntime-qnn (x86-64 Linux or Windows), or name a Python that has it with --set qnn_python=PATH"


@dataclass(frozen=True)
class Compiled:
    """What became of a model.

    Attributes:
        checked: False where the compiler is not installed.
        message: one line for people.
        found: what the compiler says: versions, nodes taken and left, parts.
        files: what was copied into the bundle.
    """

    checked: bool
    message: str
    found: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def compile_context(
    model: ir.Model, *, soc: int, arch: int, python: str | None = None, keep: Path | None = None
) -> Compiled:
    """Compile a model to a Hexagon context, in a process of its own.

    Args:
        model: with static shapes.
        soc: Qualcomm's number of the chip.
        arch: version of its Hexagon.
        python: interpreter that has onnxruntime and onnxruntime-qnn; None: this one.
        keep: folder that gets the context; None: it is thrown away.

    Raises:
        MissingBackendError: an interpreter was named and does not have the compiler, or the context is wanted and there
            is none.
        ModelError: the compiler refuses the model, or dies of it.
    """
    from graphopt.model import save

    with tempfile.TemporaryDirectory(prefix="graphopt-qnn-") as name:
        folder = Path(name)
        save(model, folder / "model.onnx")
        command = [python or sys.executable, str(Path(__file__).with_name("qnn_compile.py"))]
        command += [str(folder / "model.onnx"), str(folder / "context.onnx"), "--soc", str(soc), "--arch", str(arch)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=folder, check=False)
        except FileNotFoundError as error:
            raise MissingBackendError(f"there is no {python}", where="qnn_python", hint="name a Python") from error
        except subprocess.TimeoutExpired as error:
            raise ModelError(
                f"Qualcomm's compiler did not finish within {SECONDS} s", hint="lower a part of the model"
            ) from error
        if done.returncode == ABSENT:
            if python is not None or keep is not None:
                raise MissingBackendError(f"Qualcomm's compiler is not installed: {done.stderr.strip()}", hint=HOW)
            return Compiled(False, f"Not compiled for Hexagon here: onnxruntime-qnn is not installed ({HOW}).")
        if done.returncode != 0:
            raise ModelError(
                f"Qualcomm's compiler refuses it: {_reason(done)}",
                where=f"Hexagon v{arch} (soc {soc})",
                hint="see delegates.txt for the nodes; fix their shapes, or quantise with --target android-qnn",
            )
        found = json.loads(done.stdout.strip().splitlines()[-1])
        files = _kept(folder, keep) if keep is not None else ()
    left = f", {len(found['left'])} stay on the CPU" if found["left"] else ""
    message = f"Compiled for Hexagon v{arch} (soc {soc}): {found['taken']} nodes in {found['parts']} parts{left}."
    return Compiled(True, message, found, files)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it died of signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip() and "LIBNATIVE" not in line]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _kept(folder: Path, keep: Path) -> tuple[str, ...]:
    names = [path.name for path in sorted(folder.iterdir()) if path.name.startswith("context")]
    for name in names:
        shutil.copyfile(folder / name, keep / name)
    return tuple(names)
