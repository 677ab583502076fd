"""ONNX Runtime's own file format (.ort), which its builds without an ONNX parser read, and what such a build must hold.

The conversion is that of `onnxruntime.tools.convert_onnx_models_to_ort`, within this process: the runtime optimises the
graph and saves it. Blocked layouts (NchwcTransformer) are left out, because they belong to one processor.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL, OPERATORS = "model.ort", "required_operators.config"
ABOUT = {
    MODEL: "the model in ONNX Runtime's own format, optimised, for builds without an ONNX parser",
    OPERATORS: f"operators and types that {MODEL} needs, for a minimal build of ONNX Runtime (--include_ops_by_config)",
}

DIFFERS = "ONNX Runtime's .ort files are not the same bytes each time they are made."
"""What the reader of a bundle with such a file must know."""

LARGEST = (1 << 31) - (1 << 20)
"""Bytes of weights beyond which there is no such file: offsets in it are signed numbers of 32 bits."""


def write_ort(
    model: ir.Model | Path, path: Path, *, style: Literal["fixed", "runtime"] = "fixed", arm: bool = True
) -> None:
    """Write a model as .ort, and `OPERATORS` beside it.

    Args:
        model: a model, or its ONNX file; not changed.
        path: the file, ending in .ort.
        style: "fixed": all optimisations for the processor are done now. "runtime": only those that every execution
            provider can live with are, and the others are kept for nodes that stay on the processor; sessions then say
            `session.enable_saved_runtime_optimizations`.
        arm: the device multiplies signed bytes by signed ones as fast as unsigned ones.

    Raises:
        ModelError, MissingBackendError: ONNX Runtime refuses the model; names the node.
    """
    if isinstance(model, Path):
        _convert(model, path, style, arm)
        return
    from graphopt.model import save

    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        save(model, Path(folder) / "model.onnx")
        _convert(Path(folder) / "model.onnx", path, style, arm)


def _convert(source: Path, path: Path, style: Literal["fixed", "runtime"], arm: bool) -> None:
    import onnxruntime as ort

    from graphopt.executor import explain

    with _own_logging():
        from onnxruntime.tools.ort_format_model import create_config_from_models
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    options, reading = ort.SessionOptions(), ort.SessionOptions()
    options.log_severity_level = reading.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1" if arm else "0")
    if style == "runtime":
        options.add_session_config_entry("optimization.minimal_build_optimizations", "save")
    processor = ["CPUExecutionProvider"]
    try:
        ort.InferenceSession(str(source), options, providers=processor, disabled_optimizers=["NchwcTransformer"])
        ort.InferenceSession(str(path), reading, providers=processor)
    except Exception as error:
        raise explain(error, "the runtime cannot convert the model to its own format") from error
    config = path.with_name(OPERATORS)
    create_config_from_models([path], config, enable_type_reduction=True)
    # It names the file by its path, which may be a temporary one: equal models give equal bundles.
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    config.write_text("\n".join([f"# Generated from {path.name}", *lines]) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """Importing the runtime's tools sets up logging for the whole process: set it back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
