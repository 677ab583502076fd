"""merge-bounds: operators that hold a tensor within bounds become one Clip.

    Relu(x) = Clip(x, 0, inf)      Max(x, c) = Clip(x, c, inf)      Min(x, c) = Clip(x, -inf, c)
    Clip(Clip(x, a, b), c, d) = Clip(x, min(max(a, c), d), min(max(b, c), d))

c is one number, and NaN passes through all of them: bounds that are NaN are left alone. What holds x between 0 and
infinity is written as Relu, which more runtimes fuse into the layer before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.constants import array
from graphopt.rewriting.cuts import made_by, set_inputs
from graphopt.rewriting.edit import bypass, sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label, mark_origin

_FIRST_WITH_OPERANDS = 11
Bounds = tuple[float, float]


@dataclass(frozen=True)
class MergeBounds(Pass):
    """Make one Clip or Relu of Relu, Clip, and Max or Min with a number that follow each other.

    Algebra: see the head of the file. Does not fire: where bounds are computed or NaN, where something else reads the
    tensor between, on integers. Preserves: NaN, infinities and the place of the last of them.
    """

    name: ClassVar[str] = "merge-bounds"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge from the front."""
        result = PassResult(changed=False)
        editor = Editor(model)
        merged = 0
        for node, opset in editor.nodes():
            if not is_onnx(node, "Relu", "Clip", "Max", "Min") or not node.inputs:
                continue
            found = bounds_of(node)
            inner = None if found is None else made_by(found[0], node, "Relu", "Clip", "Max", "Min")
            before = bounds_of(inner) if inner is not None else None
            if found is None or inner is None or before is None:
                continue
            reason = _merge(node, found[1], inner, before, opset, editor)
            if reason is None:
                merged += 1
            else:
                result.skipped.append(Skip(label(node), reason))
        editor.close()
        if merged:
            result.changed = True
            result.notes.append(f"{merged} bounds merged with the ones before")
        return result


def bounds_of(node: ir.Node) -> tuple[ir.Value, Bounds] | None:
    """What a node holds within which bounds; None where it does something else, or they are not known numbers."""
    source = node.inputs[0]
    if is_onnx(node, "Max", "Min"):
        return _extreme(node)
    if source is None or source.dtype is None or not source.dtype.is_floating_point():
        return None
    low, high = -np.inf, np.inf
    if is_onnx(node, "Relu"):
        return source, (0.0, high)
    for place, name in enumerate(("min", "max"), 1):
        given = node.inputs[place] if place < len(node.inputs) else None
        data = array(given)
        if name in node.attributes:
            number = node.attributes[name].as_float()
        elif given is None:
            continue
        elif data is None or data.size != 1:
            return None
        else:
            number = float(data.reshape(()))
        low, high = (number, high) if name == "min" else (low, number)
    return None if np.isnan([low, high]).any() else (source, (low, high))


def _extreme(node: ir.Node) -> tuple[ir.Value, Bounds] | None:
    if len(node.inputs) != 2:
        return None
    for source, other in (node.inputs, reversed(node.inputs)):
        data = array(other)
        if source is None or source.dtype is None or not source.dtype.is_floating_point() or array(source) is not None:
            continue
        # A number of more dimensions than x would give it a new shape.
        fits = data is not None and data.size == 1 and (data.ndim == 0 or data.ndim <= len(source.shape or ()))
        if data is None or not fits or np.isnan(data).any():
            return None
        number = float(data.reshape(()))
        return source, (number, np.inf) if is_onnx(node, "Max") else (-np.inf, number)
    return None


def _merge(
    node: ir.Node, outer: Bounds, inner: ir.Node, before: tuple[ir.Value, Bounds], opset: int, editor: Editor
) -> str | None:
    source, (a, b) = before
    c, d = outer
    # A Clip with min above max gives max everywhere, which min(max(x, c), d) says too.
    bounds = (min(max(a, c), d), min(max(b, c), d)) if a <= b else (min(max(b, c), d),) * 2
    if c > d:
        bounds = (d, d)
    if bounds == (min(a, b), b):
        return bypass(node, inner.outputs[0], origin_of=inner)
    if sole_use(inner.outputs[0]) is None:
        return "what it holds within bounds is also read before"
    _write(node, source, bounds, opset, editor)
    mark_origin(node, [label(inner)])
    return None


def _write(node: ir.Node, source: ir.Value, bounds: Bounds, opset: int, editor: Editor) -> None:
    relu = bounds == (0.0, np.inf)
    node.op_type = "Relu" if relu else "Clip"
    node.attributes.clear()
    inputs: list[ir.Value | None] = [source]
    assert source.dtype is not None  # `bounds_of` asked for its kind
    if not relu and opset < _FIRST_WITH_OPERANDS:
        for name, number in zip(("min", "max"), bounds, strict=True):
            if np.isfinite(number):
                node.attributes[name] = ir.AttrFloat32(name, number)
    elif not relu:
        for name, number in zip(("min", "max"), bounds, strict=True):
            data = np.array(number, dtype=source.dtype.numpy())
            none = number == (-np.inf if name == "min" else np.inf)
            inputs.append(None if none else editor.constant(node, f"{node.outputs[0].name}_{name}", data))
        while inputs[-1] is None:
            inputs.pop()
    set_inputs(node, inputs)
