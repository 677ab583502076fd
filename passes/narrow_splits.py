"""narrow-splits: a Split of which one part is read is a Slice.

    Split(x)[k] = x[a : a + n]        n the size of part k, a the sizes of those before it

The other parts are not copied (ONNX Runtime, three parts of 64 x 384 numbers and more: .57 to .84 of the time).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.body_edit import drop_output
from graphopt.rewriting.constants import constant
from graphopt.rewriting.cuts import axis_of, rank_of, recut, split_sizes
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.size import initializer_bytes, node_bytes

_BOUNDS = ("starts", "ends", "axes")
_OPERAND = 26
"""Bytes of a bound besides its name, twice: as an initializer of one integer, and where it is read."""


@dataclass(frozen=True)
class NarrowSplits(Pass):
    """Make a Slice of a Split of which only one part is read.

    Algebra: see the head of the file. Does not fire: where several parts are read, where the sizes before the part are
    unknown, where the bounds of the Slice take more room than the Split. Preserves: names. Bits are only moved.
    """

    name: ClassVar[str] = "narrow-splits"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Look at every Split."""
        result = PassResult(changed=False)
        editor = Editor(model)
        count = 0
        for node, opset in editor.nodes():
            if not is_onnx(node, "Split") or len(node.outputs) < 2:
                continue
            read = [k for k, output in enumerate(node.outputs) if output.uses() or output.is_graph_output()]
            if len(read) != 1:
                continue
            reason = _narrow(node, read[0], opset, editor)
            if reason is None:
                count += 1
            else:
                result.skipped.append(Skip(label(node), reason))
        editor.close()
        if count:
            result.changed = True
            result.notes.append(f"{count} Splits with one part that is read became Slices")
        return result


def _narrow(node: ir.Node, part: int, opset: int, editor: Editor) -> str | None:
    source = node.inputs[0]
    axis = axis_of(node, rank_of(source, *(v for v in node.outputs if not v.is_graph_output())))
    lengths = split_sizes(node, axis) if axis is not None else None
    if source is None or axis is None or lengths is None:
        return "one part of it is read, but the sizes of the parts are unknown"
    growth = _slice_bytes(node, node.outputs[part]) - _split_bytes(node)
    if growth > 0:
        return f"one part of it is read, but the bounds of a Slice would take {growth} bytes more"
    start, end = sum(lengths[:part]), sum(lengths[: part + 1])
    for index in reversed(range(len(node.outputs))):
        if index != part:
            drop_output(node, index)
    node.op_type = "Slice"
    node.attributes.clear()
    recut(node, source, {axis: (start, end, 1)}, opset, editor)
    return None


def _split_bytes(node: ir.Node) -> int:
    """What goes with a Split: its outputs and attributes, and the sizes that only it reads."""
    own = [v for v in node.inputs[1:] if v is not None and constant(v) is not None and sole_use(v)]
    return node_bytes(node) + sum(initializer_bytes(v) for v in own)


def _slice_bytes(node: ir.Node, output: ir.Value) -> int:
    """About what a Slice takes that makes `output`, with bounds of its own."""
    names = [f"{output.name}_{bound}" for bound in _BOUNDS]
    source = node.inputs[0]
    ends = len((source.name if source is not None else "") or "") + 2 * len(output.name or "")
    return 8 + len(node.name or "") + len("Slice") + 20 + ends + sum(_OPERAND + 2 * len(name) for name in names)
