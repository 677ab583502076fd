"""fold-wrappers: wrappers of factorised layers W ~ A S B into what stands next to them.

V z + c, then B        V' = B V, c' = B c               a dense layer in front
A z, then B            A' = B A                         another wrapper in front
A s, then V y          V' = V A                         a dense layer behind
scale n + shift, B     B' = B diag(scale)               constants, norms; the shift goes through S into the bias
A or B diagonal        rows or columns of S             zeros stay zeros
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.marks import is_wrapper


@dataclass(frozen=True)
class FoldWrappers(Pass):
    """Fold the wrappers that `armor` wrote into neighbouring linear layers, other wrappers, scales and cores.

    Between wrapper and neighbour channels may be moved (reshapes, splits, slices, transposes) and positions may be
    mixed: attention multiplies the values of a head by P, and P (V B^T) = (P V) B^T as long as B stays within the head.
    A sparse neighbour takes no wrapper: its zeros would be filled. With its wrapper gone a core runs alone, at full
    speed.

    Does not fire: across activations, norms and sums; where something else reads the same channels; where heads, groups
    or copies of grouped queries would have to be mixed differently; on what is no wrapper of `armor`. Preserves: the
    pattern of every core; names of layers and weights.
    Source: exact, linear algebra (graphopt.sparsity.folding).
    """

    name: ClassVar[str] = "fold-wrappers"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        result = PassResult(changed=False)
        if not any(is_wrapper(node) for graph in graphs(model) for node in graph):
            return result
        from graphopt.files.shape_inference import infer_shapes
        from graphopt.sparsity.folding import Folding

        infer_shapes(model)
        folding = Folding(model)
        folding.run()
        result.changed, result.skipped = bool(folding.rows), folding.skipped
        if folding.rows:
            result.details["folded wrappers"] = list(folding.rows)
        return result
