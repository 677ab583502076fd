"""recognise-softmax: exponentials that are divided by their sum become Softmax and LogSoftmax.

e = exp(x - max(x)),  e / sum(e)                             Softmax
x - max(x) - log(sum(e))                                     LogSoftmax
exp(x) / sum(exp(x)),  x - log(sum(exp(x)))                  the same, with fast_math
log(softmax(x))                                              LogSoftmax, with fast_math

The formulas stand in `graphopt.rewriting.patterns.softmax`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.rewriting.patterns.softmax import RULES
from graphopt.rewriting.recognise import recognise


@dataclass(frozen=True)
class RecogniseSoftmax(Pass):
    """Write exponentials that are divided by their sum as Softmax, and its logarithm as LogSoftmax.

    Algebra: see the head of the file. NaN and infinities give what they gave.

    Does not fire: over several axes, where something else reads what is inside, before opset 13 over another axis than
    the last, and, without `fast_math`, where the formula overflows and the operator does not: exp without the maximum
    taken off, log of a Softmax that was rounded to 0. Preserves: names of results.
    """

    name: ClassVar[str] = "recognise-softmax"
    effect: ClassVar[Effect] = Effect.EXACT
    fast_math: bool = option(False, "also where the operator stays finite and a step of the formula does not")
    slow: bool = option(False, "also operators that the target runs slower than their parts")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Write the operators in all graphs, bodies and functions."""
        return recognise(model, RULES, ctx.target, fast_math=self.fast_math, slow=self.slow)
