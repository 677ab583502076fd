"""fold: the clean-up passes to a fixpoint.

The members are found by name, so that a further fold is one new file and one name here. Each member is judged by its
cost: where the model has more nodes or more bytes afterwards than before, its work is undone and the report says so.
Bytes that `max_growth` allows are no such cost.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.collector import seldom_collected
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.shape_nodes import computed_sizes
from graphopt.rewriting.size import Size, size

MEMBERS = (
    "compute-weights",
    "fold-constants",
    "simplify-bodies",
    "narrow-scans",
    "remove-identities",
    "recognise-pixel-moves",
    "merge-reshapes",
    "cut-assignments",
    "narrow-splits",
    "merge-slices",
    "cancel-concats",
    "move-transposes",
    "absorb-transposes",
    "merge-bounds",
    "recognise-norms",
    "recognise-softmax",
    "recognise-activations",
    "fold-pad",
    "fold-batchnorm",
    "fold-conv-affine",
    "fold-carried-affine",
    "fold-uniform",
    "merge-linear",
    "unstack-means",
    "merge-branches",
    "merge-scales",
    "recognise-gemm",
    "fold-wrappers",
    "merge-common-subexpressions",
    "dedupe-initializers",
    "remove-dead-code",
    "strip-metadata",
)
"""In the order of a round: constants first, because the other members need them."""

_NODE = 128
"""Bytes that may be paid for every node that goes: a Reshape that stands for several needs sizes of its own."""


@dataclass(frozen=True)
class Fold(Pass):
    """Fold constants, identities, BatchNormalization, affine chains, duplicates and dead code, to a fixpoint.

    Runs its members (`graphopt passes fold-constants` and so on) round after round until none changes the model. A
    member that leaves more nodes or bytes than it found is undone (bytes that `max_growth` allows apart). EXACT: equal
    up to rounding of the folded weights. Does not fire: what a member leaves and why is listed node by node. Preserves:
    the interface of the model except initializers that are also graph inputs, which become constants
    (`keep_overridable`).
    """

    name: ClassVar[str] = "fold"
    effect: ClassVar[Effect] = Effect.EXACT
    rounds: int = option(10, "rounds after which it stops even where there still is work", low=1)
    max_growth: int = option(0, "bytes by which folding one constant subgraph may grow the file", low=0)
    max_bytes: int = option(1 << 24, "bytes of the largest tensor that constant folding reads or makes", low=0)
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")
    keep_signed_zero: bool = option(False, "leave x + 0.0 alone, which turns -0.0 into 0.0")
    static: bool = option(False, "compute all sizes ahead, whatever tables grow, and tell which are left and why")
    dequantize: bool = option(False, "write integer weights behind DequantizeLinear as floats: a larger file")
    keep_metadata: bool = option(False, "leave stack traces and other notes of the exporter in the file")
    merge_factors: bool = option(False, "multiply factorised layers (armor) out again: dense weights, fewer nodes")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Run the members until none of them changes the model."""
        with seldom_collected:
            return self._run(model, ctx)

    def _run(self, model: ir.Model, ctx: Context) -> PassResult:
        result = PassResult(changed=False)
        skipped: dict[str, list[Skip]] = {}
        undone: dict[str, str] = {}
        asked = {"merge-factors": self.merge_factors, "dequantize-constants": self.dequantize}
        unwanted = {"strip-metadata"} if self.keep_metadata else set()
        members_left = (name for name in MEMBERS if name not in unwanted)
        chosen = (*(name for name, wanted in asked.items() if wanted), *members_left)
        members = [self._member(name, ctx) for name in chosen]
        rows = []
        # A member whose work is undone is rare, a clone of a large graph slow: one is made, and the members since then
        # run again on it. They are deterministic.
        backup = model.clone()
        since: list[Pass] = []
        changes = 0
        settled: dict[str, int] = {}
        before = size(model)
        for round_number in range(1, self.rounds + 1):
            changed = False
            for member in members:
                # Nothing has changed since it last found nothing, or was undone.
                if settled.get(member.name) == changes:
                    continue
                outcome = member.run(model, ctx)
                skipped[member.name] = outcome.skipped
                if member.name == "fold-constants":
                    # It infers shapes, and by these the others may see more.
                    settled.clear()
                if not outcome.changed:
                    settled[member.name] = changes
                    continue
                after = size(model)
                excess = self._excess(member, before, after)
                if excess:
                    _restore(model, backup)
                    for earlier in since:
                        earlier.run(model, ctx)
                    backup, since = model.clone(), []
                    settled[member.name] = changes
                    undone[member.name] = excess
                    continue
                changed = result.changed = True
                result.notes.extend(note for note in outcome.notes if note not in result.notes)
                rows.append(
                    {
                        "round": round_number,
                        "pass": member.name,
                        "nodes": after.nodes - before.nodes,
                        "bytes": after.bytes - before.bytes,
                    }
                )
                since.append(member)
                changes += 1
                before = after
            if not changed:
                break
        else:
            result.notes.append(
                f"warning: stopped after {self.rounds} rounds although the last one still changed the model "
                "(rounds=N allows more)"
            )
        for name, excess in undone.items():
            result.notes.append(f"{name} undone: it made the model larger ({excess})")
        if rows:
            result.details["what each member changed"] = rows
        result.skipped = [skip for skips in skipped.values() for skip in skips]
        if self.static:
            infer_shapes(model)
            left = computed_sizes(model)
            result.skipped += left
            result.notes.append(f"warning: {_still(len(left))} at run time" if left else "all sizes are fixed")
        return result

    def _member(self, name: str, ctx: Context) -> Pass:
        found = ctx.resolve(name)
        takes = {f.name for f in fields(found)} & {f.name for f in fields(self)}
        return found(**{option_name: getattr(self, option_name) for option_name in sorted(takes)})

    def _excess(self, member: Pass, before: Size, after: Size) -> str:
        """What a member cost; one that takes `max_growth` keeps to it itself, subgraph by subgraph."""
        may_grow = (self.max_growth > 0 or self.static) and any(f.name == "max_growth" for f in fields(member))
        may_grow = may_grow or member.name == "dequantize-constants"
        parts = []
        if after.nodes > before.nodes:
            parts.append(f"{before.nodes} -> {after.nodes} nodes")
        if after.bytes > before.bytes + _NODE * (before.nodes - after.nodes) and not may_grow:
            parts.append(f"{before.bytes} -> {after.bytes} bytes")
        return ", ".join(parts)


def _still(nodes: int) -> str:
    return "1 node still computes or reads sizes" if nodes == 1 else f"{nodes} nodes still compute or read sizes"


def _restore(model: ir.Model, backup: ir.Model) -> None:
    """Put the graph, functions and versions of `backup` back into `model`."""
    model.graph = backup.graph
    model.ir_version = backup.ir_version
    model.functions.clear()
    model.functions.update(backup.functions)
