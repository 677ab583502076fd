"""The pass of the sample plug-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphopt import Context, Effect, Pass, PassResult, option

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class SampleRename(Pass):
    """Put a prefix before the names of all nodes.

    Does not fire on nodes whose name has the prefix already. Preserves everything but node names.
    """

    name: ClassVar[str] = "sample-rename"
    effect: ClassVar[Effect] = Effect.EXACT
    prefix: str = option("sample_", "text put before each name")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        renamed = [node for node in model.graph if not (node.name or "").startswith(self.prefix)]
        for node in renamed:
            node.name = f"{self.prefix}{node.name or node.op_type}"
        return PassResult(changed=bool(renamed), notes=[f"{len(renamed)} nodes renamed"])
