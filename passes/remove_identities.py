"""remove-identities: nodes that give out what they read, and pairs of nodes that undo each other.

    f(x) = x            Identity, Dropout, Cast to the same type, Reshape to the same shape, x * 1, x + 0, ...
    g(f(x)) = x         Neg Neg, Not Not, Transpose and its inverse, Squeeze Unsqueeze, a lossless Cast and back
    f(f(x)) = f(x)      Relu, Abs, Ceil, Floor, Round, Sign
    g(f(x)) = h(x)      Transpose Transpose, a reshape of any kind and then Reshape: the first of the two goes

Each rule stands as one function in `graphopt.rewriting.identities`; this file only walks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.rewriting.edit import bypass
from graphopt.rewriting.identities import identity_of, merge_with_producer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import label, refers_to_caller
from graphopt.rewriting.scopes import scopes, settle_functions


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Remove nodes that give out what they read, and pairs that undo each other.

    Algebra: see the head of the file. x * 1, x / 1, x - 0, x ** 1 keep every bit, NaN and infinities too; x + 0.0 turns
    -0.0 into 0.0, which compares equal (`keep_signed_zero` leaves it). x * 0 is not 0 (NaN, infinities) and is no rule.

    Does not fire: where a neutral constant would broadcast x to a larger shape, where a shape is not known well enough,
    where a Dropout trains or its mask is used, between a graph input and a graph output. Preserves: graph outputs.
    """

    name: ClassVar[str] = "remove-identities"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_signed_zero: bool = option(False, "leave x + 0.0 alone, which turns -0.0 into 0.0")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Remove until nothing more is found; each node is visited once, its producers before it."""
        result = PassResult(changed=False)
        removed: Counter[str] = Counter()
        names = Names(model, later=True)
        merged = 0
        for graph, opset in scopes(model):
            for node in tuple(graph):
                # What a caller of the function gives is not known here.
                if node.graph is not graph or refers_to_caller(node):
                    continue
                found = identity_of(node, opset, keep_signed_zero=self.keep_signed_zero)
                if found is None:
                    merged += merge_with_producer(node, names)
                    continue
                if isinstance(found, ir.Value):
                    reason = bypass(node, found)
                    if reason is None:
                        removed[node.op_type] += 1
                        continue
                else:
                    reason = found
                result.skipped.append(Skip(label(node), reason))
        settle_functions(model)
        if removed:
            result.changed = True
            listing = ", ".join(f"{count} {op}" for op, count in sorted(removed.items()))
            result.notes.append(f"nodes that change nothing removed: {listing}")
        if merged:
            result.changed = True
            result.notes.append(f"{merged} pairs of Transpose or of reshapes made one")
        return result
