"""Reproducer bundles: a folder from which the failure of a pass can be seen again by somebody else.

model.onnx       the model as the pass got it, where its weights fit into `LARGEST` bytes
model.onnxtext   else its structure alone; then the recipe starts from the user's own model
recipe.toml      the pass (or the whole pipeline up to it) with target and seed
README.txt       the command that shows the failure, versions, traceback
"""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.base import Context, Pass
from graphopt.pipeline.instruments import model_text
from graphopt.pipeline.recipe import Recipe
from graphopt.version import versions

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 256 << 20
"""Bytes of weights up to which the model itself goes into the bundle."""


@dataclass(frozen=True)
class Bundle:
    """What a bundle is made of.

    Attributes:
        failing: the pass that failed.
        done: the passes before it.
        model: what the failing pass was given.
        ctx: its context.
        error: what it raised.
        command: how the run was started; None from Python.
    """

    failing: Pass
    done: Sequence[Pass]
    model: ir.Model
    ctx: Context
    error: BaseException
    command: str | None = None


def write_bundle(bundle: Bundle, parent: Path | None = None) -> Path:
    """Write the bundle into a new folder below `parent` (default: the folder for temporary files); return the folder.

    Raises:
        OSError: it cannot be written.
        GraphoptError: the model cannot be saved.
    """
    from graphopt.model import save, weight_bytes

    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "_", bundle.failing.name)
    folder = Path(tempfile.mkdtemp(prefix=f"graphopt-{name}-", dir=parent))
    whole = weight_bytes(bundle.model) <= LARGEST
    if whole:
        save(bundle.model, folder / "model.onnx", external=False)
    else:
        (folder / "model.onnxtext").write_text(model_text(bundle.model), encoding="utf-8")
    passes = (bundle.failing,) if whole else (*bundle.done, bundle.failing)
    recipe = Recipe(passes=passes, target=bundle.ctx.target.name, seed=bundle.ctx.seed)
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    (folder / "README.txt").write_text(_readme(bundle, whole), encoding="utf-8")
    return folder


def _readme(bundle: Bundle, whole: bool) -> str:
    calibration = bundle.ctx.calibration
    data = f" --calib {calibration.name}" if calibration is not None else ""
    model = "model.onnx" if whole else "THE_ORIGINAL_MODEL.onnx"
    lines = [
        f"The pass {bundle.failing.name!r} failed. To see it again, in this folder:",
        "",
        f"    graphopt optimize {model} --recipe recipe.toml{data} --debug",
        "",
        f"Started as: {bundle.command or 'from Python'}",
        f"Passes before it: {', '.join(p.name for p in bundle.done) or 'none'}",
    ]
    if not whole:
        lines.append("The weights are too large for this folder: model.onnxtext holds the structure that the pass got.")
    if calibration is not None:
        lines.append(f"Calibration data: {calibration.name}, {calibration.samples} samples, not included.")
    lines += ["", *(f"{name}: {number}" for name, number in versions().items()), ""]
    lines += traceback.format_exception(bundle.error)
    return "\n".join(lines)
