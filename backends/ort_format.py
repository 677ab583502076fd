"""Files in ONNX Runtime's own format (.ort), which builds without an ONNX parser read, and what such a build must hold.

The conversion is that of `onnxruntime.tools.convert_onnx_models_to_ort`, within this process: the runtime optimises the
graph and saves it. Blocked layouts (NchwcTransformer) are left out, because they belong to one processor.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

MODEL, CONFIG = "model.ort", "required_operators.config"
ABOUT = {
    MODEL: "the model in ONNX Runtime's own format, optimised, for builds without an ONNX parser",
    CONFIG: "the operators that model.ort needs, for a minimal build of ONNX Runtime (--include_ops_by_config)",
}

LARGEST = (1 << 31) - (1 << 20)
"""Bytes of weights beyond which there is no such file: offsets in it are signed numbers of 32 bits."""


def write_ort(model: Path, folder: Path, *, arm: bool, runtime: bool = False) -> None:
    """Write `MODEL` and `CONFIG` into a folder.

    Args:
        model: an ONNX file.
        folder: exists.
        arm: the device multiplies signed bytes by signed bytes as fast as unsigned ones.
        runtime: carry out basic optimisations only and save the others beside the graph, to be applied to what no
            compiling provider (NNAPI, CoreML) takes; the session must say `session.enable_saved_runtime_optimizations`.

    Raises:
        ModelError, MissingBackendError: the runtime refuses the model; names the node.
    """
    import onnxruntime as ort

    from graphopt.executor import explain

    with _own_logging():
        from onnxruntime.tools.ort_format_model import create_config_from_models
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / MODEL)
    options.log_severity_level = 4
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1" if arm else "0")
    if runtime:
        options.add_session_config_entry("optimization.minimal_build_optimizations", "save")
    try:
        ort.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
        )
        reading = ort.SessionOptions()
        reading.log_severity_level = 4
        ort.InferenceSession(str(folder / MODEL), reading, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise explain(error, "the runtime cannot convert the model to its own format") from error
    create_config_from_models([folder / MODEL], folder / CONFIG, enable_type_reduction=False)
    lines = (folder / CONFIG).read_text(encoding="utf-8").splitlines(keepends=True)
    told = [f"# Generated from {MODEL}\n", *(line for line in lines if not line.startswith("#"))]
    (folder / CONFIG).write_text("".join(told), encoding="utf-8")


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
