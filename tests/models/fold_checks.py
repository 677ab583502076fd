"""What must hold of a folded model."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.base import Context, Pass
from graphopt.model import check
from graphopt.progress import Silent
from graphopt.registry import pass_class, target
from graphopt.rewriting.size import size
from graphopt.verify import compare, random_feeds

SIZES = 32
"""Bytes that a model may have more for a node less: a Reshape that stands for two may need sizes of its own."""


def context() -> Context:
    return Context(target("cpu"), None, None, seed=0, jobs=1, progress=Silent(), resolve=pass_class)


def problem(model: ir.Model, chosen: Pass, seed: int) -> str | None:
    """What is wrong with what a pass makes of a model; None where nothing is."""
    folded = model.clone()
    chosen.run(folded, context())
    check(folded)
    before, after = size(model), size(folded)
    found = compare(model, folded, random_feeds(model, seed, samples=2))
    if not found.equal:
        return f"the outputs differ by {found.worst_relative:.2g}"
    if after.nodes > before.nodes or after.bytes > before.bytes + SIZES * (before.nodes - after.nodes):
        return f"it grew: {before} to {after}"
    if chosen.name == "fold" and chosen.run(folded, context()).changed:
        return f"folding it again changes it: {after} to {size(folded)}"
    return None
