"""center-norms: layer norms become RMS norms, by centring whatever writes their input.

With C = I - 11^T / n and x = sum of writers w, LayerNorm(x) = RMSNorm(C x) + beta, and C x = sum of C w: the mean is
taken away once, in the weights (`graphopt.rewriting.centring`; `graphopt.rewriting.streams` decides where that can be).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.rewriting.centring import centre, copied_bytes
from graphopt.rewriting.constants import freeze_note, freeze_overridable
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import label
from graphopt.rewriting.size import size
from graphopt.rewriting.streams import streams


@dataclass(frozen=True)
class CenterNorms(Pass):
    """Turn LayerNormalization into RMS normalisation by centring the weights that write its input.

    What for: channels of a residual stream between RMS norms can be removed without a trace. `prune` asks for this pass
    by itself where it removes such channels.

    Algebra: LayerNorm(x) = RMSNorm(x - mean x) + beta, and x - mean x is what the writers of x give once each weight,
    bias and embedding is centred along its output channels, w <- w - mean w. In float64, rounded once.

    Does not fire: where a writer is not linear in weights (an activation, a gate of computed numbers, a grouped
    convolution, the norm before it in post-norm networks), where something reads the stream that is not blind to its
    mean (an output of the graph, a layer without a norm before it), and where a table that others read too is so
    large that its copy adds more than `copies` to the model. One such place keeps the whole stream, and is listed.

    Preserves: the function, names of nodes and parameters that stay. Writes RMSNormalization from opset 23 on, before
    it the operators that ONNX Runtime fuses into one.

    Source: Ashkboos et al., SliceGPT, arXiv:2401.15024, section 3.2, for transformers.
    """

    name: ClassVar[str] = "center-norms"
    effect: ClassVar[Effect] = Effect.EXACT
    copies: float = option(0.25, "bytes that copies of shared tables may add, as a fraction of the model", low=0)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Centre every stream of the main graph that can be."""
        result = PassResult(changed=False)
        if not streams(model.graph):
            return result
        if frozen := freeze_overridable(model):
            result.changed = True
            result.notes.append(freeze_note(frozen))
        if any("fold-conv-affine" in reason for s in streams(model.graph) for reason in s.blocked.values()):
            result.changed |= ctx.resolve("fold-conv-affine")().run(model, ctx).changed
        names, budget = Names(model), self.copies * size(model).bytes
        norms = 0
        for stream in streams(model.graph):
            copied = copied_bytes(stream)
            reasons = stream.blocked or self._too_large(copied, budget)
            reason = None if reasons else centre(stream, names)
            if reason:
                reasons = {label(next(iter(stream.norms))): reason}
            result.skipped += [Skip(node, why) for node, why in reasons.items()]
            if reasons:
                continue
            norms += len(stream.norms)
            budget -= sum(copied.values())
            result.notes += [
                f"{name} is read by others too: the stream has a centred copy of its own (+{count} bytes)"
                for name, count in copied.items()
            ]
        if norms:
            result.changed = True
            result.notes.append(f"{norms} layer norms are RMS norms now; what writes their input is centred")
        return result

    def _too_large(self, copied: dict[str, int], budget: float) -> dict[str, str]:
        if sum(copied.values()) <= budget:
            return {}
        why = f"others read it too, and a copy would add more than copies={self.copies:g} of the model"
        return dict.fromkeys(copied, why)
