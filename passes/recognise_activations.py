"""recognise-activations: activations written out as arithmetic become the operators that they are.

x (1 + erf(x / sqrt 2)) / 2                                  Gelu              opset 20
x (1 + tanh(sqrt(2 / pi) (x + .044715 x^3))) / 2             Gelu, tanh        opset 20
x min(max(x + 3, 0), 6) / 6                                  HardSwish         opset 14
min(max(a x + b, 0), c) / c                                  HardSigmoid
x tanh(log(1 + e^x))                                         Mish              opset 18
x / (1 + e^-x)                                               Swish             opset 24
1 / (1 + e^-x)                                               Sigmoid
max(x, a x), x > 0 ? x : a x, relu(x) - a relu(-x)           LeakyRelu, PRelu
x > 0 ? x : a (e^x - 1)                                      Elu, Selu
min(max(x, a), b)                                            Clip, Relu
log(1 + e^x)                                                 Softplus          fast_math

The formulas stand in `graphopt.rewriting.patterns.activations`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.rewriting.patterns.activations import RULES
from graphopt.rewriting.recognise import recognise


@dataclass(frozen=True)
class RecogniseActivations(Pass):
    """Write activations that an exporter decomposed as Gelu, HardSwish, LeakyRelu, Clip and so on: one node for 2 to 9.

    Algebra: see the head of the file. Formulas are matched and not their spellings: factors and addends in any order
    and grouping, divisions as products, powers as products, numbers to 4 units in the last place of their type. NaN and
    infinities give what they gave.

    Does not fire: where something else reads what is inside, where the opset lacks the operator (it is not raised),
    where the target runs the operator slower than its parts (`slow_operators` of the target; `slow` writes it all the
    same), and, without `fast_math`, where a step of the formula overflows and the operator does not. Preserves: names
    of results.
    """

    name: ClassVar[str] = "recognise-activations"
    effect: ClassVar[Effect] = Effect.EXACT
    fast_math: bool = option(False, "also where the operator stays finite and a step of the formula does not")
    slow: bool = option(False, "also operators that the target runs slower than their parts")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Write the operators in all graphs, bodies and functions."""
        return recognise(model, RULES, ctx.target, fast_math=self.fast_math, slow=self.slow)
