"""raise-opset: the model in a newer version of the standard operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.files.opset import raise_opset


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Convert the model to a newer version of the default operator set, for runtimes that read no older ones.

    Does not fire: where the opset is high enough. Preserves: names of nodes, values and parameters.
    Source: onnx's version converter (`graphopt.files.opset`).
    """

    name: ClassVar[str] = "raise-opset"
    effect: ClassVar[Effect] = Effect.EXACT
    version: int = option(13, "lowest opset that will do", low=1)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Convert, or leave the model as it is."""
        note = raise_opset(model, self.version, f"target {ctx.target.name}")
        return PassResult(note is not None, notes=[] if note is None else [note])
