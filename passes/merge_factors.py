"""merge-factors: W = A S B, the inverse of `armor{form=factors}`: one dense weight where core and wrappers stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult


@dataclass(frozen=True)
class MergeFactors(Pass):
    """Multiply factorised layers out again, for a target that skips no zeros: fewer nodes, dense weights.

    Nothing else merges factors: `fold` leaves them as they are unless it is asked to (`fold{merge_factors=true}`).
    Does not fire: on wrappers whose core is quantised already, or that another tool rewrote. Preserves: names, shapes
    and types of the layers' weights; not their zeros.
    Source: exact, linear algebra (graphopt.sparsity.merging).
    """

    name: ClassVar[str] = "merge-factors"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """See the class."""
        from graphopt.sparsity.merging import merge_factors

        merged, skipped = merge_factors(model)
        notes = [f"{len(merged)} factorised layers multiplied out: {', '.join(merged[:5])}"] if merged else []
        return PassResult(bool(merged), skipped, notes)
