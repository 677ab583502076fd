"""How passes that change weights begin and end: what a caller could override becomes constant, functions stay valid."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.base import PassResult
from graphopt.rewriting.constants import allow_private_initializers, freeze_note, freeze_overridable
from graphopt.rewriting.scopes import settle_functions


def begun(model: ir.Model, *, keep_overridable: bool) -> PassResult:
    """A result to go on with, once initializers that are also graph inputs are constants (unless they are kept)."""
    result = PassResult(changed=False)
    if not keep_overridable and (frozen := freeze_overridable(model)):
        result.changed = True
        result.notes.append(freeze_note(frozen))
    return result


def finish(model: ir.Model, result: PassResult, note: str) -> None:
    """Tell what was changed, and leave no initializers where none can be: in functions, and in old files."""
    result.changed = True
    result.notes.append(note)
    settle_functions(model)
    if raised := allow_private_initializers(model):
        result.notes.append(raised)
