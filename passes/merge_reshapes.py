"""merge-reshapes: chains of reshapes become one, and computed targets constant.

    Reshape, Flatten, Squeeze, Unsqueeze after each other     one Reshape to the last shape, or none
    Transpose that moves only axes of size 1                  a reshape, where it stands beside one
    Transpose, then a reshape that moves only ones            one Transpose, and the same the other way round
    Reshape(x, Concat(Shape(x)[0], -1, 64))                   Reshape(x, [0, -1, 64])

A target says 0 for a dimension that is copied from the same axis and -1 for one that nothing else tells. Shapes are
those that inference finds; symbolic dimensions stay symbolic, and a batch of any size passes as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.files.integers import entries
from graphopt.files.reshape_targets import result_dims
from graphopt.rewriting.constants import array
from graphopt.rewriting.cuts import remove_unread, set_inputs, sizes
from graphopt.rewriting.edit import bypass, sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.layout import RESHAPES, Dims, before, carried, keeps_order, permutation, target_of
from graphopt.rewriting.nodes import is_onnx, label, mark_origin

_FIRST_WITH_TARGET = 5


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Make one Reshape or Transpose of chains of them, and constant targets of computed ones.

    Algebra: see the head of the file. Does not fire: where two sizes of the result are unknown, where something else
    reads a tensor on the way, on tensors with an axis of size 0. Preserves: graph outputs, symbolic dimensions, bits.
    """

    name: ClassVar[str] = "merge-reshapes"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Work from the front: what was merged is the start of the next chain."""
        result = PassResult(changed=False)
        editor = Editor(model)
        fixed = merged = 0
        for node, opset in editor.nodes():
            if opset < _FIRST_WITH_TARGET or not is_onnx(node, "Transpose", *RESHAPES):
                continue
            fixed += _fix_target(node, editor, result)
            while node.graph is not None and _merge(node, editor, result):
                merged += 1
        editor.close()
        result.changed = bool(fixed or merged)
        if fixed:
            result.notes.append(f"{fixed} computed targets of Reshape are constants")
        if merged:
            result.notes.append(f"{merged} reshapes and Transposes merged with the one before")
        return result


def _fix_target(node: ir.Node, editor: Editor, result: PassResult) -> bool:
    if not is_onnx(node, "Reshape") or array(node.inputs[1]) is not None:
        return False
    if node.attributes.get_int("allowzero", 0) != 0:
        return False
    told = entries(node.inputs[1])
    if told is None or told.ndim != 1:
        return False
    wanted = [e if isinstance(e, int | str) else None for e in told]
    # -1 and 0 are said by the model itself, and mean here what they mean there.
    if any(e == -1 for e in wanted) and any(e is None for e in wanted):
        target = None
    else:
        target = _literal(sizes(node.inputs[0]), wanted)
    if target is None:
        result.skipped.append(Skip(label(node), "two or more sizes of its computed target are unknown"))
        return False
    inputs = [node.inputs[0], editor.sizes(node, f"{node.outputs[0].name}_shape", target)]
    set_inputs(node, inputs)
    return True


def _literal(source: Dims | None, wanted: Dims) -> list[int] | None:
    """The target with numbers as they are, names copied from the same axis, and one unknown left open."""
    target = []
    for place, entry in enumerate(wanted):
        if isinstance(entry, int):
            target.append(entry)
        else:
            copied = entry is not None and source is not None and place < len(source) and source[place] == entry
            target.append(0 if copied else -1)
    # Beside a size of 0 an open one is ambiguous.
    ambiguous = -1 in target and 0 in [e for e in wanted if isinstance(e, int)]
    return None if target.count(-1) > 1 or ambiguous else target


def _merge(node: ir.Node, editor: Editor, result: PassResult) -> bool:
    inner = before(node)
    if inner is None or inner.inputs[0] is None:
        return False
    source, middle, wanted = inner.inputs[0], sizes(inner.outputs[0]), _result(node)
    dims = sizes(source)
    if dims is None or middle is None or wanted is None:
        return False
    flat = keeps_order(inner) and keeps_order(node)
    perm = None if flat else _one_permutation(inner, node, dims, middle, wanted)
    if not flat and perm is None:
        return False
    target = target_of(dims, wanted) if flat else None
    if flat and list(dims) == list(wanted) and None not in dims:
        return _undo(node, inner, source, result)
    if flat and target is None:
        result.skipped.append(Skip(label(node), "the shape of the merged Reshape has two unknown sizes or a size of 0"))
        return False
    if sole_use(inner.outputs[0]) is None:
        result.skipped.append(Skip(label(node), f"what the {inner.op_type} before it makes is also read elsewhere"))
        return False
    if perm is not None:
        if perm == sorted(perm):
            return _undo(node, inner, source, result)
        _become(node, "Transpose", [source], ir.AttrInt64s("perm", perm))
    else:
        assert target is not None  # flat, and refused above where there is none
        name = f"{node.outputs[0].name}_shape"
        _become(node, "Reshape", [source, editor.sizes(node, name, target)])
    mark_origin(node, [label(inner)])
    return True


def _result(node: ir.Node) -> Dims | None:
    """The shape of what `node` makes; of a graph output, whose declared shape proves nothing, the one that follows."""
    found, dims = sizes(node.outputs[0]), sizes(node.inputs[0])
    if found is not None or dims is None:
        return found
    if is_onnx(node, "Transpose") and (perm := permutation(node)) is not None:
        return [dims[axis] for axis in perm]
    told = result_dims(node) if is_onnx(node, "Reshape") else None
    return None if told is None else [d if isinstance(d, int | str) else None for d in told]


def _one_permutation(inner: ir.Node, node: ir.Node, dims: Dims, middle: Dims, wanted: Dims) -> list[int] | None:
    """The permutation that does both, where one of the two is a Transpose and the other moves only ones."""
    if is_onnx(inner, "Transpose") and is_onnx(node, *RESHAPES):
        perm = permutation(inner)
        return None if perm is None else carried(dims, perm, wanted)
    if is_onnx(inner, *RESHAPES) and is_onnx(node, "Transpose"):
        first, perm = carried(dims, range(len(dims)), middle), permutation(node)
        return None if perm is None or first is None else [first[axis] for axis in perm]
    return None


def _become(node: ir.Node, op_type: str, inputs: list[ir.Value | None], *attributes: ir.Attr) -> None:
    node.op_type = op_type
    node.attributes.clear()
    for attribute in attributes:
        node.attributes[attribute.name] = attribute
    set_inputs(node, inputs)


def _undo(node: ir.Node, inner: ir.Node, source: ir.Value, result: PassResult) -> bool:
    """Both together change nothing."""
    reason = bypass(node, source)
    if reason is not None:
        result.skipped.append(Skip(label(node), reason))
        return False
    remove_unread(inner.outputs[0])
    return True
