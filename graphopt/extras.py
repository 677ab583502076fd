"""Optional packages: what graphopt's extras bring, and how to install them."""

from __future__ import annotations

import importlib.metadata
import re
import shlex


def how_to_install(extra: str) -> str:
    """The command for the packages of an extra, by their own names: right from a checkout and from an index alike."""
    marker = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    wanted = [r.partition(";")[0].strip() for r in importlib.metadata.requires("graphopt") or () if marker.search(r)]
    return f"pip install {shlex.join(wanted)} (graphopt's extra {extra!r})"
