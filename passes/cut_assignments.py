"""cut-assignments: what is written over a contiguous part of a tensor is put between the parts beside it.

    ScatterND(x, I, u) with I = all positions of x[..., a:b, ...]     Concat(x[..., :a, ...], u, x[..., b:, ...])

Exporters write `x[:, :, a:b] = u` as such a ScatterND, with a table of every position: Expand, Unsqueeze and Concat of
constants that are larger than the tensor. The table is followed back to constants (integers are never materialised:
what one column of it says of one axis is enough), and is only read where it has at most `TABLE` entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.constants import array
from graphopt.rewriting.cuts import TO_THE_END, made_by, numbers, remove_unread, sizes, slice_inputs
from graphopt.rewriting.edit import cannot_replace, replace_value
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label, mark_origin

TABLE = 1 << 20
"""Entries of a table of positions that is read."""
_FIRST = 11
_TABLE_OPERATORS = ("Expand", "Unsqueeze", "Reshape", "Concat", "Range", "Add", "Transpose")


@dataclass(frozen=True)
class CutAssignments(Pass):
    """Write a ScatterND that overwrites a contiguous part along one axis as a Concat of what is before, it, and behind.

    Algebra: see the head of the file. Does not fire: where positions are computed, out of order or in several axes, on
    sizes that are unknown, with a reduction, on large tables. Preserves: bits; every element is still written once.
    """

    name: ClassVar[str] = "cut-assignments"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite every ScatterND whose positions are constant and contiguous."""
        result = PassResult(changed=False)
        editor = Editor(model)
        count = 0
        for node, opset in editor.nodes():
            if not is_onnx(node, "ScatterND") or opset < _FIRST:
                continue
            found = _assigned(node)
            if isinstance(found, str):
                result.skipped.append(Skip(label(node), found))
            elif (reason := _write(node, *found, editor)) is not None:
                result.skipped.append(Skip(label(node), reason))
            else:
                count += 1
        editor.close()
        if count:
            result.changed = True
            result.notes.append(f"{count} assignments to a part of a tensor written as Concat")
        return result


def _assigned(node: ir.Node) -> tuple[int, int, int] | str:
    """(axis, first, behind the last) of what a ScatterND overwrites."""
    dims, updates = sizes(node.inputs[0]), sizes(node.inputs[2])
    if node.attributes.get_string("reduction", "none") != "none":
        return "it adds up what it writes"
    if dims is None or updates is None or not all(isinstance(d, int) for d in (*dims, *updates)):
        return "the sizes of what it writes are not known"
    lengths = [int(d) for d in dims if isinstance(d, int)]
    positions = _table(node.inputs[1], node)
    if positions is None:
        return "the positions that it writes to are computed"
    if positions.ndim < 1 or positions.size == 0 or positions.shape[-1] > len(lengths):
        return "its positions have another form than the tensor"
    depth = positions.shape[-1]
    if len(updates) != len(lengths) or positions.ndim - 1 != depth:
        return "its positions are not laid out like the tensor"
    cut: tuple[int, int, int] | None = None
    for axis in range(depth):
        column = positions[..., axis]
        line = np.moveaxis(column, axis, 0).reshape(column.shape[axis], -1)
        first = int(line[0, 0])
        if not (line == first + np.arange(len(line))[:, None]).all() or first < 0:
            return "the positions that it writes to are not contiguous and in order"
        if len(line) != lengths[axis]:
            if cut is not None:
                return "it writes to a part of several axes"
            cut = (axis, first, first + len(line))
    return cut or (0, 0, lengths[0])


def _table(value: ir.Value | None, node: ir.Node) -> npt.NDArray[np.int64] | None:
    """A constant table of positions, also one that Expand, Unsqueeze, Reshape and Concat make of constants."""
    return _value(value, node, {})


def _value(
    value: ir.Value | None, node: ir.Node, known: dict[ir.Value, npt.NDArray[np.int64] | None]
) -> npt.NDArray[np.int64] | None:
    if value is None:
        return None
    data = array(value)
    if data is not None:
        return np.asarray(data, dtype=np.int64) if data.dtype.kind in "iu" and data.size <= TABLE else None
    if value not in known:
        known[value] = _made(value, node, known)
    return known[value]


def _made(
    value: ir.Value, node: ir.Node, known: dict[ir.Value, npt.NDArray[np.int64] | None]
) -> npt.NDArray[np.int64] | None:
    maker = made_by(value, node, *_TABLE_OPERATORS)
    operands = [_value(v, node, known) for v in maker.inputs] if maker is not None else [None]
    given = [operand for operand in operands if operand is not None]
    if maker is None or len(given) != len(operands):
        return None
    first = given[0]
    if is_onnx(maker, "Expand"):
        shape = np.broadcast_shapes(first.shape, tuple(int(d) for d in given[1]))
        return np.broadcast_to(first, shape) if int(np.prod(shape)) <= TABLE else None
    if is_onnx(maker, "Unsqueeze"):
        axes = numbers(maker, "axes", 1)
        return None if axes is None else np.expand_dims(first, tuple(axes))
    if is_onnx(maker, "Reshape"):
        return first.reshape([int(d) for d in given[1]]) if 0 not in given[1] else None
    if is_onnx(maker, "Add"):
        both = np.broadcast_shapes(first.shape, given[1].shape)
        return first + given[1] if int(np.prod(both)) <= TABLE else None
    if is_onnx(maker, "Range"):
        start, limit, step = (int(k) for k in given)
        return np.arange(start, limit, step) if step and abs((limit - start) // step) <= TABLE else None
    if is_onnx(maker, "Transpose"):
        return np.transpose(first, maker.attributes.get_ints("perm", None))
    axis = maker.attributes.get_int("axis", 0)
    return np.concatenate(given, axis=axis or 0)


def _write(node: ir.Node, axis: int, first: int, stop: int, editor: Editor) -> str | None:
    source, _, updates = node.inputs
    output = node.outputs[0]
    if source is None or updates is None:
        return "an operand of it is missing"
    dims = [d for d in sizes(source) or [] if isinstance(d, int)]
    written = [d for d in sizes(updates) or [] if isinstance(d, int)]
    wanted = [stop - first if k == axis else d for k, d in enumerate(dims)]
    if written != wanted:
        return "what it writes has another shape than where it is written to"
    added = 0 if wanted == dims else 1 + (first > 0) + (stop < dims[axis])
    if added > 1 + _serving(node.inputs[1], node):
        return "its table of positions is constant: cutting would take more operators"
    parts: list[ir.Value | None] = [updates]
    if first > 0:
        parts.insert(0, _part(node, source, axis, 0, first, dims, editor))
    if stop < dims[axis]:
        parts.append(_part(node, source, axis, stop, TO_THE_END, dims, editor))
    if len(parts) == 1:
        reason = cannot_replace(output, updates)
        if reason is not None:
            return reason
        replace_value(output, updates)
    else:
        joined = editor.insert(node, "Concat", parts, {"axis": axis}, f"{output.name}_parts", dims)
        replace_value(output, joined)
        if (maker := joined.producer()) is not None:
            mark_origin(maker, [label(node)])
    remove_unread(output)
    return None


def _serving(value: ir.Value | None, node: ir.Node) -> int:
    """How many operators make the table and nothing else."""
    count, pending, readers = 0, [value], {node}
    while pending:
        found = pending.pop()
        maker = made_by(found, node, *_TABLE_OPERATORS)
        if maker is None or maker in readers or any(use.node not in readers for use in maker.outputs[0].uses()):
            continue
        count += 1
        readers.add(maker)
        pending.extend(maker.inputs)
    return count


def _part(
    node: ir.Node, source: ir.Value, axis: int, start: int, stop: int, dims: list[int], editor: Editor
) -> ir.Value:
    name = f"{node.outputs[0].name}_{'before' if start == 0 else 'behind'}"
    shape = [min(stop, d) - start if k == axis else d for k, d in enumerate(dims)]
    return editor.insert(
        node, "Slice", slice_inputs({axis: (start, stop, 1)}, source, node, editor, name), {}, name, shape
    )
