"""fold-carried-affine: an affine map per channel goes into linear operators that data movement keeps from it.

    a M(W x + b) + c = M((a' W) x + (a' b + c'))        M: Reshape, Transpose, Flatten, Squeeze, Unsqueeze, averages
    W M(a x + c) + b = W' M(x) + b'

M moves channels and computes nothing per channel, so that the numbers a and c can be followed to the weight that
they belong to (`graphopt.rewriting.carried`). Unpadded averages have weights that add up to one. An affine map that
several linear operators read goes into all of them, or stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import ModelError
from graphopt.rewriting.activations import fused_pattern
from graphopt.rewriting.affine import arithmetic_affine, inference_affine
from graphopt.rewriting.carried import AVERAGES, MOVES, carry, carry_along, path_from_linear
from graphopt.rewriting.constants import Float64, constant, float64
from graphopt.rewriting.edit import bypass, cannot_replace, sole_use
from graphopt.rewriting.growth import grows
from graphopt.rewriting.linear import LINEAR_OPS, Linear, linear_giving, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import begun, finish

_AFFINE = ("Mul", "Div", "Add", "Sub", "BatchNormalization")


@dataclass(frozen=True)
class FoldCarriedAffine(Pass):
    """Fold constants per channel and BatchNormalization into linear operators that data movement keeps from them.

    Algebra: a M(W x + b) + c = M((a' W) x + a' b + c') and W M(a x + c) + b = W' M(x) + b', where M moves elements or
    averages them. In float64, rounded once.

    Does not fire: where the channels cannot be followed (a Reshape that mixes them with positions), where the constant
    varies within a channel or would broadcast the tensor to a larger one, where one reader is no linear operator with a
    weight of its own, for a shift before zero padding, and where the factor ends an activation or normalisation that
    runtimes fuse. Preserves: names of nodes and parameters.
    """

    name: ClassVar[str] = "fold-carried-affine"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold every affine node of `model` whose linear operators are found."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model, later=True)
        count = 0
        for graph, opset in scopes(model):
            reasons: dict[ir.Node, str] = {}
            # Chains fold link by link: forwards into what is before them, backwards into what is behind.
            for node in (*graph, *reversed(graph)):
                if node.graph is not graph or not is_onnx(node, *_AFFINE):
                    continue
                reasons.pop(node, None)
                outcome = _fold(node, opset, names)
                if outcome == "":
                    count += 1
                elif outcome is not None:
                    reasons[node] = outcome
            result.skipped.extend(Skip(label(node), reason) for node, reason in reasons.items())
        if count:
            finish(model, result, f"{count} affine maps folded into linear operators across data movement")
        return result


@dataclass(frozen=True)
class _Affine:
    """y = scale x + shift; both broadcast against x as they are."""

    node: ir.Node
    source: ir.Value
    scale: Float64
    shift: Float64


def _fold(node: ir.Node, opset: int, names: Names) -> str | None:
    """Fold `node`: "" where that was done, None where no linear operator can be reached, else the reason."""
    source = _source(node)
    if source is None:
        return None
    start, path = path_from_linear(source, (*MOVES, *AVERAGES))
    before = linear_giving(start, opset=opset) if path else None
    readers = list(_readers(node.outputs[0]))
    direct = len(readers) == 1 and readers[0][0] is not None and not readers[0][1]
    after = bool(readers) and not direct and all(found is not None for found, _ in readers)
    if before is None and not after:
        return None
    if (pattern := fused_pattern(node)) is not None:
        return f"part of a {pattern} that runtimes fuse"
    affine = _affine(node, source, opset)
    if isinstance(affine, str):
        return affine
    reasons = []
    if before is not None:
        reason = before if isinstance(before, str) else _into_writer(affine, before, start, path, names)
        if reason is None:
            return ""
        reasons.append(f"before it: {reason}")
    if after:
        reason = _into_readers(affine, readers, opset, names)
        if reason is None:
            return ""
        reasons.append(f"after it: {reason}")
    return "; ".join(reasons)


def _source(node: ir.Node) -> ir.Value | None:
    """The tensor of an affine node; None where it is no tensor and a constant."""
    if is_onnx(node, "BatchNormalization"):
        return node.inputs[0]
    computed = [v for v in node.inputs if v is not None and constant(v) is None]
    return computed[0] if len(node.inputs) == 2 and len(computed) == 1 else None


def _affine(node: ir.Node, source: ir.Value, opset: int) -> _Affine | str:
    if is_onnx(node, "BatchNormalization"):
        found = inference_affine(node, opset)
        if isinstance(found, str):
            return found
        if source.shape is None:
            return "the rank of what it reads is not known"
        tail = (1,) * (len(source.shape) - 2)
        return _Affine(node, source, *(a.reshape(-1, *tail) for a in found))
    first = constant(node.inputs[0]) is not None
    factor = float64(node.inputs[0 if first else 1])
    if factor is None:
        return "its constant is not floating-point"
    found = arithmetic_affine(node, factor, constant_first=first)
    return found if isinstance(found, str) else _Affine(node, source, *found)


def _into_writer(affine: _Affine, linear: Linear, start: ir.Value, path: list[ir.Node], names: Names) -> str | None:
    node, source = affine.node, affine.source
    if linear.node.graph is not node.graph:
        return f"{label(linear.node)} is outside this body"
    if not sole_use(start) or not sole_use(source):
        return "a tensor between is read by others or given out"
    rank = _rank(linear, start)
    if rank is None:
        return "the rank of the MatMul's tensor is unknown"
    shape = [1] * rank
    shape[linear.channel_axis(rank)] = linear.outputs
    channels = carry_along(np.arange(linear.outputs).reshape(shape), path)
    if channels is None:
        return "its channels cannot be followed through the operators between"
    scale, shift = (_by_channel(a, channels) for a in (affine.scale, affine.shift))
    if scale is None or shift is None:
        return f"its constant of shape {affine.scale.shape} is not one number per channel there"
    reason = cannot_replace(node.outputs[0], source) or grows([(linear, shift)], node)
    return reason or linear.fold_after(scale, shift, names, [label(node)]) or bypass(node, source)


def _by_channel(numbers: Float64, channels: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Float64 | None:
    """`numbers`, broadcast against a tensor whose elements belong to `channels`, in order of channels."""
    if numbers.ndim > channels.ndim:
        return None
    full = (1,) * (channels.ndim - numbers.ndim) + numbers.shape
    if any(n not in (1, c) for n, c in zip(full, channels.shape, strict=True)):
        return None
    ordered = np.empty(int(channels.max()) + 1)
    spread = np.broadcast_to(numbers, channels.shape)
    ordered[channels] = spread
    # A channel that covers several elements must have the same number for all of them.
    return ordered if np.array_equal(ordered[channels], spread) else None


def _rank(linear: Linear, value: ir.Value) -> int | None:
    if is_onnx(linear.node, "MatMul"):
        return None if value.shape is None else len(value.shape)
    return 2 + len(linear.kernel)


def _readers(value: ir.Value, path: tuple[ir.Node, ...] = ()) -> Iterator[tuple[ir.Node | None, tuple[ir.Node, ...]]]:
    """Linear operators that read `value`, with the movement before each; None for any other reader."""
    uses = tuple(value.uses())
    if value.is_graph_output() or not uses:
        yield None, path
        return
    for use in uses:
        node = use.node
        if use.idx == 0 and is_onnx(node, *LINEAR_OPS) and constant(node.inputs[1]) is not None:
            yield node, path
        elif use.idx == 0 and is_onnx(node, *MOVES, *AVERAGES) and len(path) < 16:
            yield from _readers(node.outputs[0], (*path, node))
        else:
            yield None, path


def _into_readers(
    affine: _Affine, readers: list[tuple[ir.Node | None, tuple[ir.Node, ...]]], opset: int, names: Names
) -> str | None:
    node, source = affine.node, affine.source
    if source.shape is None:
        return "the shape of what it reads is unknown"
    sizes = tuple(source.shape)
    parts = []
    for numbers in (affine.scale, affine.shift):
        full = (1,) * (len(sizes) - numbers.ndim) + numbers.shape
        if len(full) != len(sizes) or any(n not in (1, size) for n, size in zip(full, sizes, strict=True)):
            return "its constant may broadcast the tensor to a larger one"
        parts.append(numbers.reshape(full))
    views: list[tuple[Linear, Float64, Float64]] = []
    for reader, path in readers:
        assert reader is not None  # the caller checked it
        if reader.graph is not node.graph or any(n.graph is not node.graph for n in path):
            return f"{label(reader)} is inside a body"
        linear = linear_view(reader, opset=opset)
        if isinstance(linear, str):
            return f"{label(reader)} reads it: {linear}"
        scale, shift = (_at(linear, part, path) for part in parts)
        if scale is None or shift is None:
            return f"its constant is not one number per input channel of {label(reader)}"
        if reason := linear.before_blocked(scale, shift):
            return f"{label(reader)} reads it: {reason}"
        views.append((linear, scale, shift))
    if reason := cannot_replace(node.outputs[0], source) or grows([(view, shift) for view, _, shift in views], node):
        return reason
    for linear, scale, shift in views:
        if reason := linear.fold_before(scale, shift, names, [label(node)]):
            raise ModelError(reason, where=label(linear.node), hint="report this: before_blocked allowed it")
    return bypass(node, source)


def _at(linear: Linear, numbers: Float64, path: tuple[ir.Node, ...]) -> Float64 | None:
    """`numbers` per input channel of `linear` behind `path`."""
    found = numbers
    for move in path:
        carried = carry(found, move)
        if carried is None:
            return None
        found = carried
    axis = linear.channel_axis(found.ndim)
    if found.size == 1:
        return found.reshape(1)
    if axis >= found.ndim or found.shape[axis] != linear.inputs or found.size != linear.inputs:
        return None
    return found.reshape(-1)
