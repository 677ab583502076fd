"""Which tensors can be made free of their mean: the residual streams that layer normalisations read.

A layer norm sees only x - mean(x). So every writer of its input x may be *centred*, w <- w (I - 11^T / n) along the
axis of the n channels, provided that whatever else reads x is blind to the mean as well. `streams` follows both demands
from each norm to a closure:

    backwards   a member's producer must be linear in operands that can be centred in their turn: a sum of members, a
                member moved, cut or averaged along other axes, a product that brings the axis in with its weight. The
                ends are constants: weights, biases, tables of embeddings.
    forwards    a reader must be blind to the mean (a norm over the axis, a softmax over it), or linear along other
                axes, and then its result is a member too.

Where a demand fails the whole stream stays, and says where and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.centred import centred, mean_axis, reduced_axes, uncast
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx, label

Place = tuple[ir.Value, int]
"""A tensor and the axis of its channels."""

_SAME = ("Identity", "Cast", "Neg", "Dropout")
_SUMS = ("Add", "Sub", "Sum")
_BLIND = ("Softmax", "LogSoftmax")
_AVERAGES = ("ReduceMean", "ReduceSum")
_POOLS = ("AveragePool", "GlobalAveragePool")


@dataclass
class Stream:
    """Tensors that can only be centred together.

    Attributes:
        members: the tensors, constants among them; axis -1 for a constant that adds one number to all channels.
        norms: the (Skip)LayerNormalization nodes that read members, and the Sub nodes of written-out ones.
        readers: for each constant member the (node, operand) pairs through which it enters the stream.
        blocked: node -> why the stream cannot be centred; empty where it can.
    """

    members: dict[Place, None] = field(default_factory=dict)
    norms: dict[ir.Node, None] = field(default_factory=dict)
    readers: dict[Place, dict[tuple[ir.Node, int], None]] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)

    def block(self, node: ir.Node, reason: str) -> None:
        """Record the first reason of a node."""
        self.blocked.setdefault(label(node), reason)


def norm_input(node: ir.Node) -> Place | None:
    """What a node subtracts the mean of, if it is a layer norm or the Sub of a written-out one."""
    if is_layer_norm(node):
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        if source is None or not shape:
            return None
        first = int(node.attributes.get_int("axis", -1) or 0) % len(shape)
        return (source, len(shape) - 1) if first == len(shape) - 1 else None
    found = centred(node.outputs[0]) if is_onnx(node, "Sub") else None
    return (found.source, found.axis) if found is not None else None


def is_layer_norm(node: ir.Node) -> bool:
    """LayerNormalization, also with the residual sum before it."""
    return is_onnx(node, "LayerNormalization") or is_skip_norm(node)


def is_skip_norm(node: ir.Node) -> bool:
    """ONNX Runtime's residual sum and LayerNormalization in one."""
    return node.domain == "com.microsoft" and node.op_type == "SkipLayerNormalization"


def streams(graph: ir.Graph) -> list[Stream]:
    """All streams of a graph, in its order; a tensor belongs to one of them at most."""
    found: list[Stream] = []
    seen: set[Place] = set()
    for node in graph:
        start = norm_input(node)
        if start is None or start in seen:
            continue
        stream = Stream()
        _close(stream, start, graph)
        seen.update(stream.members)
        found.append(stream)
    return found


def _close(stream: Stream, start: Place, graph: ir.Graph) -> None:
    pending = [start]
    while pending:
        place = pending.pop()
        if place in stream.members:
            continue
        stream.members[place] = None
        value, axis = place
        if constant(value) is not None:
            continue  # other readers of it keep what they have: the stream gets a copy
        producer = value.producer()
        if producer is None or producer.graph is not graph:
            stream.blocked.setdefault(
                str(value.name), "it is an input of the graph, so nothing can be centred before it"
            )
            continue
        pending += _backwards(stream, producer, value, axis)
        if value.is_graph_output():
            stream.block(producer, f"its result '{value.name}' is an output of the graph, mean and all")
        for use in value.uses():
            pending += _forwards(stream, use.node, use.idx, place, graph)


def _backwards(stream: Stream, node: ir.Node, value: ir.Value, axis: int) -> Iterator[Place]:
    found = sources(node, value, axis)
    if isinstance(found, str):
        stream.block(node, found)
        return
    for index, own in found:
        operand = node.inputs[index]
        assert operand is not None
        if constant(operand) is not None:
            stream.readers.setdefault((operand, own), {})[node, index] = None
        yield operand, own
    if is_layer_norm(node):
        stream.norms[node] = None


def _forwards(stream: Stream, node: ir.Node, index: int, place: Place, graph: ir.Graph) -> Iterator[Place]:
    value, axis = place
    if node.graph is not graph:
        stream.block(node, f"it reads '{value.name}' inside the body of an If, Loop or Scan")
        return
    if is_onnx(node, "Shape", "Size") or (is_onnx(node, *_BLIND) and _softmax_axis(node) == axis):
        return
    start = norm_input(node)
    if start is not None and axis == start[1] and (index == 0 or is_skip_norm(node)):
        stream.norms[node] = None
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:3]):
            stream.block(node, "its mean and deviation are read")
        if is_skip_norm(node):  # all that is summed is centred together
            yield from _backwards(stream, node, node.outputs[0], axis)
            if len(node.outputs) > 3 and node.outputs[3].name:
                yield node.outputs[3], axis
        return
    if mean_axis(node) == axis:
        if not _only_subtracted(node):
            stream.block(node, f"the mean of '{value.name}' is used for more than being subtracted from it")
        return
    reached = False
    for output in node.outputs:
        for own in range(len(shapes.dims(output) or ())):
            found = sources(node, output, own)
            if not isinstance(found, str) and (index, axis) in found:
                reached = True
                yield output, own
    if not reached:
        stream.block(node, f"it reads '{value.name}', mean and all")


def _only_subtracted(mean: ir.Node) -> bool:
    """Whether a mean is read by nothing but the Sub nodes that subtract it from the tensor it is the mean of."""
    pending, source = [mean.outputs[0]], uncast(mean.inputs[0])
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return False
        for use in value.uses():
            if is_onnx(use.node, "Cast", "Identity"):
                pending.append(use.node.outputs[0])
            elif not (is_onnx(use.node, "Sub") and use.idx == 1 and uncast(use.node.inputs[0]) is source):
                return False
    return True


def _softmax_axis(node: ir.Node) -> int | None:
    shape = shapes.dims(node.outputs[0])
    if shape is None or shapes.opset(node) < 13:
        return None
    return int(node.attributes.get_int("axis", -1) or 0) % len(shape)


def sources(node: ir.Node, value: ir.Value, axis: int) -> list[tuple[int, int]] | str:
    """Operands (index, axis) whose mean along an axis is that of a result: centring them centres it; or why none are.

    Args:
        node: any node.
        value: one of its results.
        axis: of the result.
    """
    shape = shapes.dims(value)
    if shape is None or any(v is not None and shapes.dims(v) is None for v in node.inputs):
        return "a rank is not known"
    if is_skip_norm(node):
        wanted = [i for i in (0, 1, 4) if i < len(node.inputs) and node.inputs[i] is not None]
        return _terms(node, wanted, axis, len(shape))
    if node.domain not in {"", "ai.onnx"}:
        return _not_linear(node)
    if node.op_type in _SUMS:
        return _terms(node, range(len(node.inputs)), axis, len(shape))
    if node.op_type in {"Mul", "Div", "Where"}:
        return _scaled(node, axis, len(shape))
    if node.op_type in {"MatMul", "Gemm", "Conv", "ConvTranspose"}:
        return _product(node, axis, len(shape))
    return _moved(node, axis, len(shape))


def _spans(node: ir.Node, index: int, axis: int, rank: int) -> int | None:
    """The axis of an operand along which it varies with an axis of the broadcast result; None where it does not."""
    value = node.inputs[index]
    assert value is not None
    shape = shapes.dims(value) or ()
    own = axis - rank + len(shape)
    return own if own >= 0 and shape[own] != 1 else None


def _terms(node: ir.Node, indices: range | list[int], axis: int, rank: int) -> list[tuple[int, int]] | str:
    found = []
    for index in indices:
        own, value = _spans(node, index, axis, rank), node.inputs[index]
        if own is not None:
            found.append((index, own))
        elif constant(value) is not None:
            found.append((index, -1))
        else:
            return f"it adds the same number '{value.name if value else ''}' to every channel"
    return found


def _scaled(node: ir.Node, axis: int, rank: int) -> list[tuple[int, int]] | str:
    where = is_onnx(node, "Where")
    spanning = {i: own for i in range(len(node.inputs)) if (own := _spans(node, i, axis, rank)) is not None}
    if where and 0 not in spanning and len(spanning) == 2:
        return list(spanning.items())
    if not where and len(spanning) == 1 and (is_onnx(node, "Mul") or 0 in spanning):
        return list(spanning.items())
    if where:
        return "it chooses channel by channel"
    if any(constant(node.inputs[i]) is not None for i in spanning):
        return "it scales channel by channel (fold-conv-affine folds that into the layer before it, where there is one)"
    return "it scales channel by channel with computed numbers, whose mean no weight can take away"


def _product(node: ir.Node, axis: int, rank: int) -> list[tuple[int, int]] | str:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None
    assert right is not None
    a, b = len(shapes.dims(left) or ()), len(shapes.dims(right) or ())
    if is_onnx(node, "MatMul"):
        if b > 1 and axis == rank - 1:
            return [(1, b - 1)]
        if a > 1 and axis == rank - 1 - (b > 1):
            return [(0, a - 2)]
        return "a leading axis of a product is no axis of channels"
    bias = (
        [(2, len(shapes.dims(node.inputs[2]) or ()) - 1)] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    )
    if axis != 1:
        return "the axis is not that of its channels"
    if is_onnx(node, "Gemm"):
        return [(1, 0 if node.attributes.get_int("transB", 0) else 1), *bias]
    if int(node.attributes.get_int("group", 1) or 1) != 1:
        return "it is a grouped convolution, and the mean is over all groups"
    return [(1, 0 if is_onnx(node, "Conv") else 1), *bias]


def _moved(node: ir.Node, axis: int, rank: int) -> list[tuple[int, int]] | str:
    """Operators that keep the channels as they are and work along other axes, linearly."""
    source = node.inputs[0] if node.inputs else None
    before = shapes.dims(source) if source is not None else None
    if before is None:
        return _not_linear(node)
    keeps: int | None = None
    match node.op_type:
        case op if op in _SAME:
            keeps = axis
        case "Transpose":
            keeps = list(node.attributes.get_ints("perm", ()) or range(rank)[::-1])[axis]
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            keeps = _reshaped(before, shapes.dims(node.outputs[0]) or (), axis)
        case "Concat":
            if int(node.attributes.get_int("axis", 0) or 0) % rank != axis:
                return [(i, axis) for i in range(len(node.inputs))]
            return "it joins channels of several tensors, and their mean is one"
        case "Expand":
            own = axis - rank + len(before)
            keeps = own if own >= 0 and before[own] == (shapes.dims(node.outputs[0]) or ())[axis] else None
        case "Gather":
            keeps = _gathered(node, axis, len(before))
        case op if op in _AVERAGES:
            found = reduced_axes(node)
            if found is not None and found[1] and axis not in found[0]:
                keeps = axis
            elif found is not None and not found[1]:
                left = [a for a in range(len(before)) if a not in found[0]]
                keeps = left[axis]
        case op if op in _POOLS:
            keeps = 1 if axis == 1 else None
        case "Slice" | "Split" | "Tile" | "Resize" | "Pad":
            keeps = axis if _along_others(node, axis, before) else None
    return [(0, keeps)] if keeps is not None else _not_linear(node)


def _not_linear(node: ir.Node) -> str:
    if norm_input(node) is not None:
        return "a norm gives what the next norm reads (post-norm), and its mean is in no weight"
    return f"{node.op_type} gives what a norm reads, and its mean is in no weight"


def _reshaped(before: tuple[shapes.Dim, ...], after: tuple[shapes.Dim, ...], axis: int) -> int | None:
    for sources_, results in shapes.reshape_blocks(before, after):
        if axis in results and len(sources_) == 1 and [after[a] for a in results if after[a] != 1] == [after[axis]]:
            return sources_[0]
        if axis in results and len(results) == 1 and [before[a] for a in sources_ if before[a] != 1] == [after[axis]]:
            return next(a for a in sources_ if before[a] != 1)
    return None


def _gathered(node: ir.Node, axis: int, rank: int) -> int | None:
    taken = int(node.attributes.get_int("axis", 0) or 0) % rank
    added = len(shapes.dims(node.inputs[1]) or ()) if node.inputs[1] is not None else 0
    if taken <= axis < taken + added:
        return None
    return axis if axis < taken else axis - added + 1


def _along_others(node: ir.Node, axis: int, before: tuple[shapes.Dim, ...]) -> bool:
    """Whether an operator that cuts, repeats, pads or resamples leaves an axis alone and brings in only zeros."""
    after = (shapes.dims(node.outputs[0]) or ())[axis]
    whole = isinstance(after, int) and before[axis] == after
    if is_onnx(node, "Slice"):
        given = shapes.ints(node.inputs[3]) if len(node.inputs) > 3 else node.attributes.get_ints("axes", None)
        if given is not None:
            return all(other % len(before) != axis for other in given)
        return whole and len(node.inputs) < 5  # a whole axis backwards is another order of channels
    if not whole:
        return False
    if is_onnx(node, "Resize"):
        return node.attributes.get_string("mode", "nearest") in {"nearest", "linear", "cubic"}
    if is_onnx(node, "Split"):
        return int(node.attributes.get_int("axis", 0) or 0) % len(before) != axis
    if is_onnx(node, "Pad"):
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        fills = node.attributes.get_string("mode", "constant") == "constant"
        given_fill = shapes.scalar(fill) if fill is not None else node.attributes.get_float("value", 0.0)
        return not fills or given_fill == 0
    return True
