"""Versions of graphopt and of what it stands on, for reports, recipes and bundles."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from functools import cache


@cache
def version() -> str:
    """The installed version of graphopt; "unknown" where it runs uninstalled."""
    return _version_of("graphopt") or "unknown"


def versions() -> dict[str, str]:
    """Versions that decide what a run computes: Python, machine, graphopt and its numeric packages."""
    found = {"graphopt": version(), "python": sys.version.split()[0], "machine": platform.machine()}
    for name in ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "scipy"):
        installed = _version_of(name)
        if installed is not None:
            found[name] = installed
    return found


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
