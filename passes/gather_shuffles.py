"""gather-shuffles: channel shuffles of three nodes become one Gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.rewriting.shuffles import gather_shuffles


@dataclass(frozen=True)
class GatherShuffles(Pass):
    """Write Reshape, Transpose, Reshape that only permute the positions of one axis as one Gather.

    What for: channels on both sides of a shuffle can go one by one. Through the reshapes the same channels must go in
    every group; grouped convolutions next to a shuffle still ask for that. `prune` does it itself where it harms less.

    Algebra: (.., g n, ..) -> (.., g, n, ..) -> (.., n, g, ..) -> (.., n g, ..) is y[i] = x[(i mod g) n + i div g].

    Does not fire: where a size of the axis is not known, where anything else reads what stands between the three
    nodes, where the result has another shape than the input. Preserves: every value, bit by bit; graph outputs.
    """

    name: ClassVar[str] = "gather-shuffles"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Replace them in the main graph and in all bodies."""
        done = gather_shuffles(model)
        result = PassResult(changed=bool(done))
        if done:
            result.notes.append(f"{len(done)} shuffles of channels are one Gather each now")
        return result
