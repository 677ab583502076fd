"""Where results may be written: decided before the work starts, so that hours of it are not lost to a wrong path.

- The input model is never overwritten, also not with `force`: it is what every result is judged against.
- A `.onnx` or `.safetensors` destination that exists is replaced, as a compiler replaces its output.
- A folder is used if it is new, empty, or holds what graphopt wrote there before (`report.json` or `manifest.json`);
  any other needs `force`. Files in it that graphopt does not write stay.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from graphopt import registry
from graphopt.errors import UsageError

MODEL_SUFFIXES = (".onnx", ".safetensors")
"""Destinations that are a model file; every other one is a folder."""

MODEL, PREPARED_FROM = "model.onnx", "optimized.onnx"
"""The model in a folder: by itself, and where the folder's bundle holds what its target made of it."""

OURS = ("report.json", "manifest.json")
"""Files that mark a folder as written by graphopt."""


def is_model_file(path: str | os.PathLike[str]) -> bool:
    """Whether a destination is named like a model file."""
    return Path(path).suffix in MODEL_SUFFIXES


def check_output(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), *, force: bool = False
) -> Path:
    """The destination, if it may be used; its parent folders are not made here.

    Args:
        out: a model file, or a folder.
        inputs: files that must stay.
        force: also a folder with other things in it.

    Raises:
        UsageError: it may not be used; names the reason.
    """
    path = Path(out)
    if is_model_file(path):
        if path.is_dir():
            raise UsageError("is a folder", where=str(path), hint=f"name a file, or a folder not named {path.suffix}")
        _check_parent(path)
        targets = [path]
    else:
        if path.exists() and not path.is_dir():
            raise UsageError(
                "exists and is neither a folder nor named .onnx or .safetensors",
                where=str(path),
                hint="choose another name",
            )
        targets = [path / MODEL, path / PREPARED_FROM]
    for given in inputs:
        for target in targets:
            if target.exists() and Path(given).exists() and target.samefile(given):
                raise UsageError(
                    "would overwrite the input model", where=str(target), hint="choose another destination"
                )
    if path.is_dir() and not force:
        _check_ours(path)
    _check_writable(path)
    return path


def check_folder(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), *, force: bool = False
) -> Path:
    """As `check_output`, for results that need a folder.

    Raises:
        UsageError: it may not be used; names the reason.
    """
    if is_model_file(out):
        raise UsageError("is named like a model, and this writes a folder", where=str(out), hint="name a folder")
    return check_output(out, inputs, force=force)


def check_bundle(
    out: str | os.PathLike[str],
    target: str | None,
    model: str | os.PathLike[str],
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """A folder gets the bundle of the target: told before the work where nothing can write that.

    Args:
        out: the destination.
        target: name, None for none.
        model: the input.
        dim, input_shape: sizes to fix in it.

    Raises:
        MissingBackendError: the target's backend is not installed, or a tool that its bundles need.
        ModelError: the target takes no open sizes, and the model has some; or it was compiled for a machine.
        UsageError: there is no such target.
    """
    from graphopt.given import opened
    from graphopt.lowering.portable import refuse_free_sizes, refuse_private
    from graphopt.lowering.steps import check_tools

    if target is not None and not is_model_file(out):
        found = registry.target(target)
        check_tools(registry.backend(found.backend), found)
        loaded = opened(model, dim, input_shape)
        refuse_private(loaded)
        refuse_free_sizes(loaded, found)


def check_file(file: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> Path:
    """A file that a result may be written to.

    Raises:
        UsageError: it is a folder, an input, or in a folder that cannot be written.
    """
    path = Path(file)
    if path.is_dir():
        raise UsageError("is a folder", where=str(path), hint="name a file")
    for given in inputs:
        if path.exists() and Path(given).exists() and path.samefile(given):
            raise UsageError("would overwrite an input", where=str(path), hint="choose another name")
    _check_parent(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError("exists and cannot be written", where=str(path), hint="choose another name")
    _check_writable(path)
    return path


def _check_parent(path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise UsageError(f"its folder {parent} {what}", where=str(path), hint="create it first, or choose another")


def _check_ours(path: Path) -> None:
    try:
        held = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path), hint="choose another folder") from error
    if held and not any(name in held for name in OURS):
        shown = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        raise UsageError(
            f"the folder holds other things ({shown})", where=str(path), hint="choose a new folder, or say --force"
        )


def _check_writable(path: Path) -> None:
    """The nearest folder that exists must take files; found out by making one, which leaves nothing behind.

    Rights alone do not tell: the superuser has them also where the file system takes no files.
    """
    parent = path if path.is_dir() else path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder", where=str(path), hint="choose another destination")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UsageError(
            f"nothing can be written in {parent}: {error.strerror or error}",
            where=str(path),
            hint="choose another destination",
        ) from error
