"""recognise-norms: normalisations written out as arithmetic become the operators that they are.

d = x - mean(x),  y = d / sqrt(mean(d^2) + epsilon) gamma + beta

over the last axes            LayerNormalization       opset 17
behind the channels           InstanceNormalization
without the mean              RMSNormalization         opset 23

The formulas stand in `graphopt.rewriting.patterns.norms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.rewriting.patterns.norms import RULES
from graphopt.rewriting.recognise import recognise


@dataclass(frozen=True)
class RecogniseNorms(Pass):
    """Write normalisations that an exporter decomposed as LayerNormalization, InstanceNormalization, RMSNormalization.

    Algebra: see the head of the file. All spellings: squares as products or powers, divisions by a root or products
    with its inverse, scale and shift multiplied out (Keras), in float32 between Casts (16 bits, `stash_type`). NaN and
    infinities give what they gave.

    Does not fire: over other axes, with an unbiased variance, where epsilon stands outside of the root, where something
    else reads what is inside, where the opset lacks the operator, where a scale of ones would take more bytes than the
    nodes that go, where the target runs the operator slower than its parts (`slow_operators`; `slow` writes it all the
    same). Preserves: names of results, and scales and shifts where they have the shape that the operator takes.
    """

    name: ClassVar[str] = "recognise-norms"
    effect: ClassVar[Effect] = Effect.EXACT
    slow: bool = option(False, "also operators that the target runs slower than their parts")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Write the operators in all graphs, bodies and functions."""
        return recognise(model, RULES, ctx.target, slow=self.slow)
