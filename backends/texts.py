"""Texts of bundles: scripts, sources and guides, which lie beside the backends."""

from __future__ import annotations

import importlib.resources
import re


def text(name: str) -> str:
    """The text of a file of a bundle.

    A runner's `from bundle_io import ...` becomes the text of `bundle_io.txt`: what all runners share stands there
    once, and `run.py` in a bundle is one file that can be read from top to bottom.
    """
    found = _read(name)
    return re.sub(r"^from bundle_io import .*\n", lambda _: _read("bundle_io.txt"), found, flags=re.MULTILINE)


def _read(name: str) -> str:
    return importlib.resources.files("graphopt.backends").joinpath(name).read_text("utf-8")
