"""Versions of TensorRT: which operators and operator sets came with which, from versions.toml."""

from __future__ import annotations

import importlib.resources
import tomllib
from functools import cache

from graphopt.errors import UsageError

Version = tuple[int, int]


def version_of(text: str) -> Version:
    """Major and minor number of "10.3" or "10.3.0".

    Raises:
        UsageError: it is no version.
    """
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        raise UsageError(f"{text!r} is no version of TensorRT", hint="write it as in 10.3")
    return int(parts[0]), int(parts[1])


@cache
def _table() -> dict[str, dict[str, str | int]]:
    text = importlib.resources.files("graphopt.tensorrt").joinpath("versions.toml").read_text("utf-8")
    return tomllib.loads(text)


def operator_since(op: str) -> str | None:
    """The first version with an importer for an operator; None where every version that is used has it."""
    found = _table()["operators"].get(op)
    return None if found is None else str(found)


def feature_since(name: str) -> Version:
    """The first version with a feature of versions.toml."""
    return version_of(str(_table()["features"][name]))


def newest_opset(version: Version) -> int:
    """The newest operator set that a version was made for."""
    known = {version_of(text): int(opset) for text, opset in _table()["opsets"].items()}
    return max((opset for since, opset in known.items() if since <= version), default=min(known.values()))
