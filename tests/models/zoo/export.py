"""From a network of the zoo to an ONNX file, by either of torch's exporters, cached by the sources it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from zoo import architecture as shared
from zoo import blocks
from zoo.architecture import Architecture

EXPORTERS = ("dynamo", "torchscript")


def exported(architecture: Architecture, exporter: str, folder: Path) -> Path:
    """The ONNX file of an architecture; exported if `folder` does not hold it yet.

    Args:
        architecture: which network.
        exporter: one of EXPORTERS.
        folder: of the cache; processes may share it.
    """
    path = folder / f"{architecture.name}-{exporter}-{_fingerprint(architecture)}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "model.onnx"
            export(architecture, exporter, fresh)
            fresh.replace(path)
    return path


def export(architecture: Architecture, exporter: str, path: Path) -> None:
    """Write the ONNX file of an architecture, weights included."""
    module, example = architecture.module(), architecture.example()
    names = [entry.name for entry in architecture.inputs]
    named = [
        {axis: size for axis, size in enumerate(entry.shape) if size in architecture.dynamic}
        for entry in architecture.inputs
    ]
    with _quiet():
        if exporter == "dynamo":
            dims = {name: torch.export.Dim(name, min=1, max=64) for name in architecture.dynamic}
            shapes = [{axis: dims[size] for axis, size in axes.items()} for axes in named]
            torch.onnx.export(
                module,
                example,
                path,
                input_names=names,
                dynamic_shapes=tuple(shapes) if architecture.dynamic else None,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        else:
            axes = {name: entry for name, entry in zip(names, named, strict=True) if entry}
            torch.onnx.export(module, example, path, input_names=names, dynamic_axes=axes or None, dynamo=False)


@cache
def _fingerprint(architecture: Architecture) -> str:
    """Hash of the sources an export depends on."""
    family = sys.modules[architecture.build.__module__]
    text = "".join(inspect.getsource(module) for module in (family, shared, blocks, sys.modules[__name__]))
    return hashlib.sha256(f"{torch.__version__}{text}".encode()).hexdigest()[:12]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report progress and deprecations of their own code."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
