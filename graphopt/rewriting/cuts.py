"""What Slice, Split and Concat take and put where: positions along axes as numbers, merged and compared.

A cut is (start, end, step) along one axis. Ends of `TO_THE_END` and above mean "to the last position", as exporters
write it: no axis is that long. Only cuts forwards (step > 0) are compared without the size of the axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import drop_if_unused
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies

TO_THE_END = 2**31 - 1
_FRONT = -(2**63)
"""The end of a cut backwards that takes position 0 too."""

FIRST_WITH_OPERANDS = 10
"""Before this opset the bounds of a Slice are attributes."""

Cut = tuple[int, int, int]


def sizes(value: ir.Value | None) -> list[int | str | None] | None:
    """Dimensions that can be relied upon; None where the rank is unknown, or a file only declares them (outputs)."""
    if value is None or value.shape is None or value.is_graph_output():
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def numbers(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Integers given as an attribute (older opsets) or a constant operand; None where they are neither."""
    if name in node.attributes:
        return [int(k) for k in node.attributes[name].as_ints()]
    data = array(node.inputs[index]) if index < len(node.inputs) else None
    return None if data is None or data.dtype.kind not in "iu" else [int(k) for k in data.reshape(-1)]


def given(node: ir.Node, index: int) -> bool:
    """True if `node` has an operand at this place."""
    return index < len(node.inputs) and node.inputs[index] is not None


def cuts_of(node: ir.Node) -> dict[int, Cut] | None:
    """Axis -> cut of a Slice with constant bounds; None where they are computed or an axis cannot be told."""
    starts, ends = numbers(node, "starts", 1), numbers(node, "ends", 2)
    axes, steps = numbers(node, "axes", 3), numbers(node, "steps", 4)
    if starts is None or ends is None or (axes is None and given(node, 3)) or (steps is None and given(node, 4)):
        return None
    if steps is not None and 0 in steps:
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    dims = sizes(node.inputs[0])
    found: dict[int, Cut] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if axis < 0 and dims is None:
            return None
        place = axis + len(dims or ()) if axis < 0 else axis
        length = dims[place] if dims is not None and place < len(dims) else None
        found[place] = _plain((start, end, step), length)
    return found


def _plain(cut: Cut, length: int | str | None) -> Cut:
    """Positions counted from the front, where the length is known."""
    if not isinstance(length, int):
        return cut
    start, end, step = cut
    if _disputed(cut, length):
        return cut
    # numpy would read an end before the front as one counted from the back.
    first, last, step = slice(start, None if step < 0 and end < -length else end, step).indices(length)
    if step > 0:
        return (first, max(first, last), step) if last < length else (first, TO_THE_END, step)
    return first, _FRONT if last < 0 else last, step


def _disputed(cut: Cut, length: int) -> bool:
    """Whether standard and runtimes disagree on what a cut takes: backwards from before the front, or to the end."""
    start, end, step = cut
    return step < 0 and (start < -length or end >= TO_THE_END)


def chained(inner: Cut, outer: Cut, length: int | str | None) -> Cut | None:
    """The one cut that does what `outer` does after `inner`; None where the length would have to be known."""
    (a, b, s), (c, d, t) = inner, outer
    if isinstance(length, int):
        if _disputed(inner, length):
            return None
        taken = range(length)[slice(a, None if s < 0 and b < -length else b, s)]
        if _disputed(outer, len(taken)):
            return None
        both = taken[slice(c, None if t < 0 and d < -len(taken) else d, t)]
        if len(both) == 0:
            return 0, 0, 1
        if both.step > 0:
            return both.start, both[-1] + 1 if both[-1] + 1 < length else TO_THE_END, both.step
        return both.start, both[-1] - 1 if both[-1] else _FRONT, both.step
    if min(a, b, c, d) < 0 or min(s, t) < 1:
        return None
    end = TO_THE_END if d >= TO_THE_END else a + d * s
    if a + c * s >= TO_THE_END:
        return 0, 0, 1
    return a + c * s, min(b, end), min(s * t, TO_THE_END)


def set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Let `node` read these; what nobody reads any more goes."""
    old = tuple(node.inputs)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    for value in old:
        remove_unread(value)


def remove_unread(value: ir.Value | None) -> None:
    """Remove a constant that nobody reads, or the node that makes a value nobody reads and what only it read."""
    pending = [value]
    while pending:
        found = pending.pop()
        node = found.producer() if found is not None else None
        if node is None or is_onnx(node, "Constant"):
            drop_if_unused(found)
        elif node.graph is not None and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            inputs = tuple(node.inputs)
            if any(True for _ in bodies(node)):
                continue  # what bodies capture is for remove-dead-code to find
            node.graph.remove(node, safe=True)
            pending.extend(inputs)


def slice_inputs(
    cuts: Mapping[int, Cut], source: ir.Value, before: ir.Node, editor: Editor, name: str
) -> list[ir.Value | None]:
    """The operands of a Slice (opset 10 on) of `source` that makes these cuts."""
    axes = sorted(cuts)
    columns: list[Sequence[int]] = [[cuts[axis][k] for axis in axes] for k in range(3)]
    starts, ends, steps = columns
    inputs: list[ir.Value | None] = [
        source,
        editor.sizes(before, f"{name}_starts", starts),
        editor.sizes(before, f"{name}_ends", ends),
        editor.sizes(before, f"{name}_axes", axes),
    ]
    if any(step != 1 for step in steps):
        inputs.append(editor.sizes(before, f"{name}_steps", steps))
    return inputs


def slice_attributes(cuts: Mapping[int, Cut]) -> dict[str, list[int]] | None:
    """The attributes of a Slice (up to opset 9) that makes these cuts; None where one takes steps."""
    axes = sorted(cuts)
    if any(cuts[axis][2] != 1 for axis in axes):
        return None
    return {"axes": axes, "starts": [cuts[axis][0] for axis in axes], "ends": [cuts[axis][1] for axis in axes]}


def recut(node: ir.Node, source: ir.Value, cuts: Mapping[int, Cut], opset: int, editor: Editor) -> bool:
    """Let a Slice make other cuts, of another tensor; False where its opset cannot say them, and nothing changes."""
    if opset >= FIRST_WITH_OPERANDS:
        set_inputs(node, slice_inputs(cuts, source, node, editor, str(node.outputs[0].name)))
        return True
    attributes = slice_attributes(cuts)
    if attributes is None:
        return False
    for name, numbers_given in attributes.items():
        node.attributes[name] = ir.AttrInt64s(name, numbers_given)
    set_inputs(node, [source])
    return True


def axis_of(node: ir.Node, rank: int | None, default: int = 0) -> int | None:
    """The axis of a Concat or Split, counted from the front; None where that needs a rank that is unknown."""
    axis = node.attributes.get_int("axis", default)
    if axis is None or (axis < 0 and rank is None):
        return None
    return axis + rank if axis < 0 and rank is not None else axis


def rank_of(*values: ir.Value | None) -> int | None:
    """The rank of tensors that have the same, from the first for which it is known."""
    return next((len(v.shape) for v in values if v is not None and v.shape is not None), None)


def split_sizes(node: ir.Node, axis: int) -> list[int] | None:
    """How many positions each output of a Split takes; None where that is computed or depends on an unknown size."""
    found = numbers(node, "split", 1)
    if found is not None or given(node, 1):
        return found
    lengths = sizes(node.inputs[0])
    length = lengths[axis] if lengths is not None and axis < len(lengths) else None
    if not isinstance(length, int):
        return None
    count = len(node.outputs)
    each = -(-length // count)
    return [max(0, min(each, length - k * each)) for k in range(count)]


def lengths_along(values: Sequence[ir.Value | None], axis: int) -> list[int | None]:
    """The sizes of tensors along an axis, None for those that are no numbers."""
    found = []
    for value in values:
        dims = sizes(value)
        length = dims[axis] if dims is not None and axis < len(dims) else None
        found.append(length if isinstance(length, int) else None)
    return found


def made_by(value: ir.Value | None, node: ir.Node, *op_types: str) -> ir.Node | None:
    """The node of one of these types that makes `value` in the graph of `node`, with no attribute from a caller."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.graph is not node.graph or not is_onnx(producer, *op_types):
        return None
    return None if any(a.is_ref() for a in producer.attributes.values()) else producer
