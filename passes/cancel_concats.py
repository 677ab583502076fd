"""cancel-concats: what is put together and taken apart again.

Concat(Split(x)) = x                        the outputs in order, along the same axis
Concat(x[a:b], x[b:c]) = x[a:c]             the whole x where a = 0 and c is its size
Concat(Concat(u, v), w) = Concat(u, v, w)   along the same axis
Concat(u, empty) = u
Split(Concat(u, v)) = u, v                  where the sizes are those of the operands
Concat(u, v)[a:b] = v[a - |u| : b - |u|]    where it takes nothing of u
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.cuts import (
    FIRST_WITH_OPERANDS,
    TO_THE_END,
    Cut,
    axis_of,
    cuts_of,
    lengths_along,
    made_by,
    rank_of,
    recut,
    remove_unread,
    set_inputs,
    sizes,
    slice_attributes,
    slice_inputs,
    split_sizes,
)
from graphopt.rewriting.edit import bypass, cannot_replace, remove_node, replace_value, sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label, mark_origin


@dataclass(frozen=True)
class CancelConcats(Pass):
    """Take out Concat, Split and Slice that undo each other, and make one Concat of nested ones.

    Algebra: see the head of the file. Does not fire: where sizes along the axis are not known, where the parts are out
    of order, where something else reads a nested Concat or a Slice that would be merged, where a Concat would stay
    beside what replaces a Slice of it. Preserves: graph outputs. Bits are only moved.
    """

    name: ClassVar[str] = "cancel-concats"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Cancel in the order of the graph."""
        result = PassResult(changed=False)
        editor = Editor(model)
        done: Counter[str] = Counter()
        for node, opset in editor.nodes():
            if is_onnx(node, "Concat"):
                done["Concats flattened"] += _flatten(node, result)
                done["empty operands of Concat dropped"] += _drop_empty(node)
                done["runs of adjacent parts made one"] += _join(node, opset, editor, result)
            elif is_onnx(node, "Split"):
                done["Splits of a Concat undone"] += _unsplit(node, result)
            elif is_onnx(node, "Slice"):
                done["Slices of a Concat moved to its operand"] += _into_operand(node, opset, editor, result)
        editor.close()
        result.changed = any(done.values())
        result.notes.extend(f"{count} {what}" for what, count in done.items() if count)
        return result


def _rank(node: ir.Node) -> int | None:
    return rank_of(*node.inputs, *(v for v in node.outputs if not v.is_graph_output()))


def _flatten(node: ir.Node, result: PassResult) -> int:
    axis = axis_of(node, _rank(node))
    inputs: list[ir.Value | None] = []
    nested = []
    for value in node.inputs:
        inner = made_by(value, node, "Concat")
        if inner is None or axis is None or axis_of(inner, _rank(inner)) != axis:
            inputs.append(value)
        elif sole_use(inner.outputs[0]) is None:
            inputs.append(value)
            result.skipped.append(Skip(label(inner), "its result is also read beside the Concat that could take it in"))
        else:
            inputs.extend(inner.inputs)
            nested.append(inner)
    if nested:
        set_inputs(node, inputs)
        mark_origin(node, [label(inner) for inner in nested])
    return len(nested)


def _drop_empty(node: ir.Node) -> int:
    axis = axis_of(node, _rank(node))
    if axis is None or len(node.inputs) < 2:
        return 0
    lengths = lengths_along(node.inputs, axis)
    kept = [v for v, length in zip(node.inputs, lengths, strict=True) if length != 0] or list(node.inputs[:1])
    dropped = len(node.inputs) - len(kept)
    if dropped:
        set_inputs(node, kept)
    return dropped


# Parts of one tensor beside each other ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Positions `start` to `end` of `source` along the axis, as a Slice or an output of a Split takes them."""

    source: ir.Value
    start: int
    end: int
    node: ir.Node


def _part(value: ir.Value | None, node: ir.Node, axis: int) -> _Part | None:
    maker = made_by(value, node, "Slice", "Split")
    source = maker.inputs[0] if maker is not None else None
    if maker is None or source is None or value is None:
        return None
    if is_onnx(maker, "Split"):
        lengths = split_sizes(maker, axis) if axis_of(maker, _rank(maker)) == axis else None
        if lengths is None:
            return None
        start = sum(lengths[: value.index() or 0])
        end = start + lengths[value.index() or 0]
        return _Part(source, start, TO_THE_END if end == sum(lengths) else end, maker)
    cuts = cuts_of(maker)
    if cuts is None or list(cuts) != [axis] or cuts[axis][2] != 1:
        return None
    if not 0 <= cuts[axis][0] <= cuts[axis][1]:
        return None
    return _Part(source, cuts[axis][0], cuts[axis][1], maker)


def _join(node: ir.Node, opset: int, editor: Editor, result: PassResult) -> int:
    """Runs of adjacent parts become the part from the first to the last of them."""
    axis = axis_of(node, _rank(node))
    if axis is None:
        return 0
    parts = [_part(value, node, axis) for value in node.inputs]
    inputs: list[ir.Value | None] = []
    makers: dict[ir.Node, None] = {}
    joined = place = 0
    while place < len(parts):
        stop = _end_of_run(parts, place)
        first, last = parts[place], parts[stop - 1]
        value = node.inputs[place]
        if first is not None and last is not None and (stop - place > 1 or _whole(first, last, axis)):
            run = [part for part in parts[place:stop] if part is not None]
            found = _joined(run, node, axis, opset, editor)
            if isinstance(found, str):
                result.skipped.append(Skip(label(node), found))
                inputs.extend(node.inputs[place:stop])
            else:
                makers.update(dict.fromkeys(part.node for part in run))
                inputs.append(found)
                joined += 1
        else:
            inputs.append(value)
        place = stop
    if not joined:
        return 0
    if len(inputs) == 1 and inputs[0] is not None and cannot_replace(node.outputs[0], inputs[0]) is None:
        replace_value(node.outputs[0], inputs[0])
        remove_node(node)
    else:
        set_inputs(node, inputs)
        mark_origin(node, [label(maker) for maker in makers])
    for maker in makers:
        remove_unread(maker.outputs[0])
    return joined


def _end_of_run(parts: Sequence[_Part | None], start: int) -> int:
    stop = start + 1
    while stop < len(parts):
        before, part = parts[stop - 1], parts[stop]
        if before is None or part is None or part.source is not before.source or part.start != before.end:
            break
        stop += 1
    return stop


def _whole(first: _Part, last: _Part, axis: int) -> bool:
    dims = sizes(first.source)
    length = dims[axis] if dims is not None and axis < len(dims) else None
    return first.start == 0 and (last.end >= TO_THE_END or (isinstance(length, int) and last.end >= length))


def _joined(run: list[_Part], node: ir.Node, axis: int, opset: int, editor: Editor) -> ir.Value | str:
    first, last = run[0], run[-1]
    if _whole(first, last, axis):
        return first.source
    if any(is_onnx(part.node, "Split") for part in run):
        return "it joins some outputs of a Split and not all of them"
    if any(sole_use(part.node.outputs[0]) is None for part in run):
        return "the adjacent Slices that it joins are also read elsewhere"
    cuts: dict[int, Cut] = {axis: (first.start, last.end, 1)}
    name = str(first.node.outputs[0].name)
    shape = sizes(first.source)
    if shape is not None:
        length = shape[axis]
        shape[axis] = min(last.end, length) - first.start if isinstance(length, int) else None
    if opset < FIRST_WITH_OPERANDS:
        return editor.insert(node, "Slice", [first.source], slice_attributes(cuts) or {}, name, shape)
    return editor.insert(node, "Slice", slice_inputs(cuts, first.source, node, editor, name), {}, name, shape)


# Split and Slice of a Concat ----------------------------------------------------------------------------------------


def _unsplit(node: ir.Node, result: PassResult) -> int:
    inner = made_by(node.inputs[0], node, "Concat")
    if inner is None:
        return 0
    axis = axis_of(node, _rank(node))
    if axis is None or axis_of(inner, _rank(inner)) != axis:
        return 0
    lengths = lengths_along(inner.inputs, axis)
    if split_sizes(node, axis) != lengths:
        result.skipped.append(Skip(label(node), "it splits a Concat at other places than between its operands"))
        return 0
    pairs = [(o, v) for o, v in zip(node.outputs, inner.inputs, strict=True) if v is not None]
    reason = next(filter(None, (cannot_replace(output, value) for output, value in pairs)), None)
    if reason is None and len({v for _, v in pairs}) < len(pairs) and any(o.is_graph_output() for o, _ in pairs):
        reason = "an operand that the Concat has twice is a graph output"
    if reason is not None:
        result.skipped.append(Skip(label(node), reason))
        return 0
    for output, value in pairs:
        replace_value(output, value)
    remove_node(node)
    remove_unread(inner.outputs[0])
    return 1


def _into_operand(node: ir.Node, opset: int, editor: Editor, result: PassResult) -> int:
    inner = made_by(node.inputs[0], node, "Concat")
    if inner is None:
        return 0
    place = _operand_of(node, inner)
    if place is None:
        if axis_of(inner, _rank(inner)) in (cuts_of(node) or {}):
            several = "it takes of several operands of a Concat, or their sizes are unknown"
            result.skipped.append(Skip(label(node), several))
        return 0
    operand, axis, cut, whole = place
    alone = whole and len(cuts_of(node) or {}) == 1
    # A Slice for a Slice gains nothing as long as the Concat must be made for others.
    if not alone and any(_operand_of(use.node, inner) is None for use in inner.outputs[0].uses()):
        result.skipped.append(Skip(label(node), "the Concat that it takes one operand of is also read by others"))
        return 0
    if alone:
        reason = bypass(node, operand)
        if reason is not None:
            result.skipped.append(Skip(label(node), reason))
            return 0
    else:
        cuts = {k: c for k, c in {**(cuts_of(node) or {}), axis: cut}.items() if not (whole and k == axis)}
        if not recut(node, operand, cuts, opset, editor):
            result.skipped.append(Skip(label(node), f"opset {opset} has no Slice with steps"))
            return 0
        mark_origin(node, [label(inner)])
    remove_unread(inner.outputs[0])
    return 1


def _operand_of(node: ir.Node, inner: ir.Node) -> tuple[ir.Value, int, Cut, bool] | None:
    """(operand, axis, the cut of the operand, whether it is all of it) of a Slice that takes of one operand only."""
    if not is_onnx(node, "Slice") or node.inputs[0] is not inner.outputs[0] or inner.outputs[0].is_graph_output():
        return None
    axis = axis_of(inner, _rank(inner))
    cuts = cuts_of(node)
    if axis is None or cuts is None or axis not in cuts or cuts[axis][2] < 1 or min(cuts[axis][:2]) < 0:
        return None
    start, end, step = cuts[axis]
    offset = 0
    lengths = lengths_along(inner.inputs, axis)
    for place, (operand, length) in enumerate(zip(inner.inputs, lengths, strict=True)):
        last = place == len(lengths) - 1
        beyond = end >= TO_THE_END and last if length is None else end <= offset + length or last
        if start >= offset and beyond and (length is None or start < offset + length) and operand is not None:
            stop = TO_THE_END if end >= TO_THE_END else end - offset
            whole = start == offset and step == 1 and (stop >= TO_THE_END or (length is not None and stop >= length))
            return operand, axis, (start - offset, stop, step), whole
        if length is None:
            return None
        offset += length
    return None
