"""recognise-pixel-moves: three nodes that move pixels into channels or back become DepthToSpace and SpaceToDepth.

(n, r r c, h, w) -> (n, r, r, c, h, w) -> (n, c, h, r, w, r) -> (n, c, h r, w r)      DepthToSpace, DCR or CRD
(n, c, h r, w r) -> (n, c, h, r, w, r) -> (n, r, r, c, h, w) -> (n, r r c, h, w)      SpaceToDepth
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.pixels import write_moves
from graphopt.rewriting.recognise import know_shapes
from graphopt.rewriting.scopes import scopes


@dataclass(frozen=True)
class RecognisePixelMoves(Pass):
    """Write Reshape, Transpose, Reshape that move pixels into channels or back as DepthToSpace or SpaceToDepth.

    Algebra: see the head of the file. Does not fire: on other permutations (channel shuffles, windows of attention),
    where a size other than the number of images is not known, where anything else reads what stands between the three
    nodes, on types that runtimes have no kernel for. Preserves: every value, bit by bit; names of results.
    """

    name: ClassVar[str] = "recognise-pixel-moves"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Write the operators in all graphs, bodies and functions."""
        result = PassResult(changed=False)
        perms = [node for graph, _ in scopes(model) for node in graph if is_onnx(node, "Transpose")]
        if not any(len(node.attributes.get_ints("perm", ())) == 6 for node in perms):
            return result
        know_shapes(model)
        done, result.skipped = write_moves(model)
        if done:
            result.changed = True
            result.notes.append(f"{len(done)} moves of pixels are one DepthToSpace or SpaceToDepth each now")
        return result
