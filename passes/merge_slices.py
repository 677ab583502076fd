"""merge-slices: a Slice of a Slice is one Slice.

    x[a:b:s][c:d:t] = x[a + c s : min(b, a + d s) : s t]        on one axis, all bounds counted from the front
    x[..., a:b][c:d, ...] = x[c:d, ..., a:b]                    on different axes, whatever their sizes are

Where the size of an axis is known the bounds may also be counted from the back, and steps may be negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.cuts import Cut, chained, cuts_of, made_by, recut, remove_unread, sizes
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label, mark_origin


@dataclass(frozen=True)
class MergeSlices(Pass):
    """Make one Slice of a Slice and the Slice before it, along one axis or several.

    Algebra: see the head of the file. Does not fire: where something else reads the tensor between (both would still be
    made), where bounds are computed, where an axis has an unknown size and its bounds count from the back.
    Preserves: the name and the place of the last Slice. Bits are only moved.
    """

    name: ClassVar[str] = "merge-slices"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge chains of Slice from the front."""
        result = PassResult(changed=False)
        editor = Editor(model)
        merged = 0
        for node, opset in editor.nodes():
            inner = made_by(node.inputs[0], node, "Slice") if is_onnx(node, "Slice") else None
            if inner is None:
                continue
            found = _both(inner, node)
            if isinstance(found, str):
                result.skipped.append(Skip(label(node), found))
                continue
            _write(node, inner, found, opset, editor)
            merged += 1
        editor.close()
        if merged:
            result.changed = True
            result.notes.append(f"{merged} Slices merged with the one before")
        return result


def _both(inner: ir.Node, outer: ir.Node) -> dict[int, Cut] | str:
    """The cuts of both Slices, or why they stay two."""
    if not sole_use(inner.outputs[0]):
        return "what the Slice before it makes is also read elsewhere"
    first, second = cuts_of(inner), cuts_of(outer)
    if first is None or second is None:
        return "bounds or axes of it or of the Slice before it are computed"
    dims = sizes(inner.inputs[0])
    found = {**first, **second}
    for axis in first.keys() & second.keys():
        length = dims[axis] if dims is not None and axis < len(dims) else None
        cut = chained(first[axis], second[axis], length)
        if cut is None:
            return "both cut an axis of unknown size, and not from the front"
        found[axis] = cut
    return found


def _write(node: ir.Node, inner: ir.Node, cuts: dict[int, Cut], opset: int, editor: Editor) -> None:
    source = inner.inputs[0]
    assert source is not None  # a Slice has a first input
    recut(node, source, cuts, opset, editor)
    mark_origin(node, [label(inner)])
    remove_unread(inner.outputs[0])
