"""What `quantize` was asked and comes to nothing: globs that fit no node, and options of other schemes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import onnx_ir as ir

from graphopt.rewriting.nodes import label
from graphopt.rewriting.scopes import graphs

STATIC = ("int8", "auto")
WEIGHTS = ("int8-weights", "int4-weights", "auto")
HALF = ("fp16", "bf16")

SERVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ranges", "percentile", "sensitive", "sparse_outputs", "correct_bias"), STATIC),
    **dict.fromkeys(("block", "symmetric"), WEIGHTS),
    "samples": (*STATIC, *HALF),
    "prepare": (*STATIC, "int8-dynamic"),
    "rounding": (*STATIC, *WEIGHTS, "int8-dynamic"),
    "assignment": ("auto",),
}
"""Schemes that read an option; an option that is not here is checked elsewhere, or serves all."""


def without_effect(scheme: str, given: Iterable[str]) -> list[str]:
    """A warning for options that the scheme does not read.

    Args:
        scheme: the number format.
        given: options whose values are not the defaults.
    """
    idle = [name for name in given if scheme not in SERVES.get(name, (scheme,))]
    return [f"warning: {', '.join(idle)}: no effect with scheme={scheme}"] if idle else []


def unmatched(model: ir.Model, globs: Collection[str]) -> list[str]:
    """A warning for each glob that fits no node of a model, bodies of branches and loops included."""
    if not globs:
        return []
    labels = [label(node) for graph in graphs(model) for node in graph]
    notes = []
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in labels):
            near = difflib.get_close_matches(glob, labels, n=2)
            meant = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
            notes.append(f"warning: exclude: {glob!r} fits the name of no node, so that it keeps nothing{meant}")
    return notes
