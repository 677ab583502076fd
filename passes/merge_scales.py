"""merge-scales: factors that follow each other become one, and so do shifts.

    (x * a) * b = x * (a b)      (x * a) / b = x * (a / b)      (x / a) * b = x * (b / a)      (x / a) / b = x / (a b)
    (x + a) + b = x + (a + b)    and the same with differences x - a

a and b are constants that broadcast to no more elements than the larger of them has. Computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.activations import fused_pattern
from graphopt.rewriting.constants import Float64, constant, float64
from graphopt.rewriting.cuts import made_by, set_inputs
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label, mark_origin

_FACTORS = {"Mul": 1, "Div": -1}
_SHIFTS = {"Add": 1, "Sub": -1}
_FIRST_BROADCASTING = 7
_SMALL = 128
"""Bytes: what a node takes that goes, so that a table of this size may be stored again."""


@dataclass(frozen=True)
class MergeScales(Pass):
    """Make one Mul of factors that follow each other, and one Add of shifts, in float64.

    Algebra: see the head of the file. Does not fire: on a constant minus or divided by x, on factors that are zero or
    not finite (x * 0 is not 0), where the merged factor leaves the range of the type, on tables that others read or
    that the file holds twice, on parts of activations and normalisations that runtimes fuse.
    Preserves: NaN and infinities.
    """

    name: ClassVar[str] = "merge-scales"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge from the front."""
        result = PassResult(changed=False)
        editor = Editor(model)
        merged = 0
        for node, opset in editor.nodes():
            inner = _before(node) if opset >= _FIRST_BROADCASTING else None
            if inner is None:
                continue
            reason = _merge(node, inner, editor)
            if reason is None:
                merged += 1
            else:
                result.skipped.append(Skip(label(node), reason))
        editor.close()
        if merged:
            result.changed = True
            result.notes.append(f"{merged} factors and shifts merged with the ones before")
        return result


def _before(node: ir.Node) -> ir.Node | None:
    """The factor before a factor, or the shift before a shift."""
    for kind in (_FACTORS, _SHIFTS):
        if is_onnx(node, *kind) and (place := _place(node)) is not None:
            inner = made_by(node.inputs[1 - place], node, *kind)
            return inner if inner is not None and _place(inner) is not None else None
    return None


def _place(node: ir.Node) -> int | None:
    """Which operand is the constant; None where none is, both are, or x is what is subtracted or divided by."""
    places = [k for k in (0, 1) if constant(node.inputs[k]) is not None]
    return places[0] if len(places) == 1 and (places[0] == 1 or is_onnx(node, "Mul", "Add")) else None


def _merge(node: ir.Node, inner: ir.Node, editor: Editor) -> str | None:
    place, before = _place(node), _place(inner)
    if place is None or before is None or not sole_use(inner.outputs[0]):
        return "what is between it and the one before is also read elsewhere"
    pattern = fused_pattern(inner) or fused_pattern(node)
    if pattern is not None:
        return f"part of a {pattern} that runtimes fuse"
    values = (inner.inputs[before], node.inputs[place])
    a, b = (float64(value) for value in values)
    if a is None or b is None or not np.isfinite(a).all() or not np.isfinite(b).all():
        return "a constant of it is not finite or no float"
    if any(
        value is not None and data.size > 1 and not sole_use(value) for value, data in zip(values, (a, b), strict=True)
    ):
        return "a constant of it is also read elsewhere"
    if any(_stored_again(value) for value in values):
        return "its table is in the file a second time, and the two can become one instead"
    factors = is_onnx(node, *_FACTORS)
    if factors and not (a.all() and b.all()):
        return "a factor is zero, and x * 0 is not 0 for infinities"
    signs = _FACTORS if factors else _SHIFTS
    first, second = signs[inner.op_type], signs[node.op_type]
    if np.broadcast_shapes(a.shape, b.shape) not in (a.shape, b.shape):
        return "the merged constant would be larger"
    merged = a ** (first * first) * b ** (first * second) if factors else a + first * second * b
    tensor = constant(values[0])
    assert tensor is not None  # `_place` found it
    data = merged.astype(tensor.dtype.numpy())
    if factors and not _in_range(data):
        return "the merged factor leaves the range of its type"
    name = f"{values[1].name}_merged" if values[1] is not None else "merged"
    source = inner.inputs[1 - before]
    node.op_type = inner.op_type
    mark_origin(node, [label(inner)])
    set_inputs(node, [source, editor.constant(node, name, data)])
    return None


def _stored_again(value: ir.Value | None) -> bool:
    """True where another initializer holds the same table: read by both, it is stored once."""
    tensor, graph = constant(value), value.graph if value is not None else None
    if tensor is None or graph is None or tensor.nbytes <= _SMALL:
        return False
    same = (
        other.const_value
        for other in graph.initializers.values()
        if other is not value and other.const_value is not None and other.const_value.dtype == tensor.dtype
    )
    return any(
        list(other.shape) == list(tensor.shape) and np.array_equal(other.numpy(), tensor.numpy()) for other in same
    )


def _in_range(data: Float64) -> bool:
    size = np.abs(data.astype(np.float64))
    limits = np.finfo(data.dtype)
    return bool((size >= float(limits.tiny)).all() and (size <= float(limits.max)).all())
