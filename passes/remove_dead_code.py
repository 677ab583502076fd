"""remove-dead-code: nodes, initializers, functions and operator-set imports that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.rewriting.dead_code import remove_dead


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove nodes and initializers that no graph output depends on, in bodies too, and unused functions and imports.

    Algebra: none; what is removed is never read. Does not fire: on nodes without outputs, whose effect is unknown.
    Preserves: every graph input and output, also inputs that nothing reads.
    """

    name: ClassVar[str] = "remove-dead-code"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Sweep `model`."""
        from onnx_ir.passes import common

        nodes, initializers = remove_dead(model)
        functions = common.RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]
        imports = common.RemoveUnusedOpsetsPass()(model).modified
        notes = []
        if nodes or initializers:
            notes.append(f"{nodes} dead nodes and {initializers} dead initializers removed")
        if functions:
            notes.append("unused functions removed")
        if imports:
            notes.append("unused operator-set imports removed")
        return PassResult(changed=bool(notes), notes=notes)
