"""What operators do to scales of channels: the rules behind `graphopt.quantization.scales.groups`.

A rule gives the results of a node labels, or none: then they keep their scale. It returns False where the scales of
what the node reads cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.numerics.equalization import Classes
from graphopt.quantization.scales import rules
from graphopt.quantization.scales.homogeneity import contracted_axis, weight_of
from graphopt.quantization.scales.walk import ScaledOperand, ScaleWalk, on_axis, present, unscaled
from graphopt.rewriting.constants import array, float64
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.sparsity.moves import RULES as MOVES
from graphopt.sparsity.moves import Channels, Shape

Rule = Callable[[ScaleWalk, ir.Node, Sequence[int]], bool]
"""(walk, node, its inputs that carry labels) -> whether it could follow them."""


def _layer(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    weight = node.inputs[1]
    if is_onnx(node, "MatMul") and weight_of(node) is None:
        return _matmul(w, node, reads)
    if weight_of(node) is None or reads not in ([], [0]):
        return False
    shape, after = w.shape(weight), w.shape(node.outputs[0])
    multiply = unscaled(len(shape))
    if reads:
        axis = contracted_axis(node, len(w.shape(node.inputs[0])))
        multiply = _on_weight(w, node, w.line(node, node.inputs[0], axis), shape)
    channels = 1 if not is_onnx(node, "MatMul") else len(after) - 1
    divide = unscaled(len(shape))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if len(shape) > 1 and (bias is None or _bias_fits(w, bias, after[channels])):
        fresh = w.table.fresh(after[channels])
        divide = _off_weight(w, node, fresh, shape)
        if bias is not None:
            rank = len(w.shape(bias))
            zero = unscaled(rank)
            w.operands.append(ScaledOperand(node, 2, on_axis(fresh, rank, rank - 1), zero, weight=False))
        w.write(node, fresh, len(after), channels)
    w.operands.append(ScaledOperand(node, 1, divide, multiply))
    return True


def _on_weight(w: ScaleWalk, node: ir.Node, line: Classes, shape: Shape) -> Classes:
    """Labels of the input channels, placed on the weight."""
    if is_onnx(node, "ConvTranspose"):
        return on_axis(line, len(shape), 0)
    if is_onnx(node, "Conv"):
        return _by_group(node, line, shape)
    if is_onnx(node, "Gemm"):
        return on_axis(line, 2, 1 if node.attributes.get_int("transB", 0) else 0)
    return on_axis(line, len(shape), max(len(shape) - 2, 0))


def _off_weight(w: ScaleWalk, node: ir.Node, line: Classes, shape: Shape) -> Classes:
    """Labels of the output channels, placed on the weight."""
    if is_onnx(node, "Conv"):
        return on_axis(line, len(shape), 0)
    if is_onnx(node, "ConvTranspose"):
        return _by_group(node, line, shape)
    if is_onnx(node, "Gemm"):
        return on_axis(line, 2, 0 if node.attributes.get_int("transB", 0) else 1)
    return on_axis(line, len(shape), len(shape) - 1)


def _by_group(node: ir.Node, line: Classes, shape: Shape) -> Classes:
    """Labels of channels on a weight whose axis 0 runs over all groups, and axis 1 over the channels of one."""
    groups = int(node.attributes.get_int("group", 1) or 1)
    rows = line.reshape(groups, -1).repeat(shape[0] // groups if groups > 1 else 1, axis=0)
    return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))


def _bias_fits(w: ScaleWalk, bias: ir.Value, channels: int) -> bool:
    shape = w.sizes.of(bias)
    return float64(bias) is not None and bool(shape) and shape is not None and shape[-1] == channels


def _matmul(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    """P V: positions are contracted, the channels of V go through; the other operand keeps its scale."""
    if not reads:
        return True
    kept = reads[0]
    for other in reads[1:]:
        w.freeze(node.inputs[other], f"MatMul '{label(node)}' multiplies it with other channels")
    value = node.inputs[kept]
    before, after = w.shape(value), w.shape(node.outputs[0])
    if node.inputs[0] is node.inputs[1] or len(before) < 2 or len(w.shape(node.inputs[1 - kept])) < 2:
        return False
    contracted = len(before) - (1 if kept == 0 else 2)
    found = w.tied(node, w.labels[present(value)], [a for a in range(len(before)) if a != contracted])
    w.labels[node.outputs[0]] = found.reshape((1,) * (len(after) - found.ndim) + found.shape)
    return True


def norm(w: ScaleWalk, node: ir.Node, scale: int, shift: int | None, axis: int) -> None:
    """The scale and the shift of a norm (operands, see `scale_rules.NORMS`) write channels of new scales."""
    after = w.sizes.of(node.outputs[0])
    operands = [(scale, True), *([(shift, False)] if shift is not None else [])]
    values = [(i, node.inputs[i], weight) for i, weight in operands if i < len(node.inputs)]
    if after is None or (axis == -1 and int(node.attributes.get_int("axis", -1) or 0) % len(after) != len(after) - 1):
        return
    present = [(i, v, weight) for i, v, weight in values if v is not None]
    if not present or any(float64(v) is None or w.sizes.of(v) != (after[axis],) for _, v, _ in present):
        return
    fresh, zero = w.table.fresh(after[axis]), unscaled(1)
    w.operands += [ScaledOperand(node, i, fresh, zero, weight=weight) for i, _, weight in present]
    w.write(node, fresh, len(after), axis % len(after))


def _batch_norm(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    """g (x - m) / sqrt(v) + b: m follows the scale in front of it, b the one behind it, and g both."""
    after = w.shape(node.outputs[0])
    if any(float64(v) is None for v in node.inputs[1:4]) or any(v.uses() for v in node.outputs[1:]) or len(after) < 2:
        return False
    fresh, zero = w.table.fresh(after[1]), unscaled(1)
    line = w.line(node, node.inputs[0], 1) if reads else zero
    w.operands.append(ScaledOperand(node, 1, fresh, line))
    w.operands.append(ScaledOperand(node, 2, fresh, zero, weight=False))
    w.operands.append(ScaledOperand(node, 3, line, zero, weight=False))
    w.write(node, fresh, len(after), 1)
    return True


def _same(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    if reads != [0] or any(v.uses() for v in node.outputs[1:]):
        return False
    w.labels[node.outputs[0]] = w.labels[present(node.inputs[0])]
    return True


def _sum(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    which = rules.SUMS[node.op_type]
    indices = list(which) if which is not None else list(range(len(node.inputs)))
    if not set(reads) <= set(indices):
        return False
    rank = len(w.shape(node.outputs[0]))
    result = _joined(w, node, reads, rank)
    for index in indices:
        value = present(node.inputs[index])
        if index in reads:
            continue
        addend = float64(value)
        if addend is None:
            w.freeze_inputs(node, f"{node.op_type} '{label(node)}' adds '{value.name}', whose scale is fixed")
            return True
        if addend.any():
            _add_constant(w, node, index, result, addend.shape)
    w.labels[node.outputs[0]] = result
    return True


def _add_constant(w: ScaleWalk, node: ir.Node, index: int, result: Classes, shape: Shape) -> None:
    """A constant is divided like what it is added to; along axes that it does not have all scales are one."""
    rank = result.ndim
    spans = [a for a in range(rank) if a - rank + len(shape) >= 0 and shape[a - rank + len(shape)] != 1]
    own = w.tied(node, result, spans)
    own = own.reshape(own.shape[rank - len(shape) :])
    w.operands.append(ScaledOperand(node, index, own, unscaled(len(shape)), weight=False))


def _joined(w: ScaleWalk, node: ir.Node, reads: Sequence[int], rank: int) -> Classes:
    """The labels of several operands, which become one."""
    first, *others = [_padded(w.labels[present(node.inputs[i])], rank) for i in reads]
    for other in others:
        w.table.equate(first, other, f"{node.op_type} '{label(node)}' adds a channel whose scale is fixed")
        first = np.broadcast_to(first, np.broadcast_shapes(first.shape, other.shape))
    return first


def _product(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    """x c with a constant c of one number a channel takes scales in and gives others out; else x y keeps y's."""
    left, right = (present(v) for v in node.inputs)
    if left is right or (is_onnx(node, "Div") and 1 in reads):
        return False
    for other in reads[1:]:
        w.freeze(node.inputs[other], f"Mul '{label(node)}' multiplies it with other channels")
    after = w.shape(node.outputs[0])
    factor = next((i for i in (0, 1) if i not in reads and is_onnx(node, "Mul") and _channels(w, node, i)), None)
    before = _padded(w.labels[present(node.inputs[reads[0]])], len(after)) if reads else None
    if factor is None:
        if before is None:
            return True
        w.labels[node.outputs[0]] = before
        return True
    shape = w.shape(node.inputs[factor])
    own = next(a for a, size in enumerate(shape) if size > 1)
    axis = own - len(shape) + len(after)
    zero = unscaled(len(shape))
    taken = zero
    if before is not None:
        taken = on_axis(w.tied(node, before, [axis]).ravel(), len(shape), own)
    fresh = w.table.fresh(after[axis])
    w.operands.append(ScaledOperand(node, factor, on_axis(fresh, len(shape), own), taken))
    w.write(node, fresh, len(after), axis)
    return True


def _channels(w: ScaleWalk, node: ir.Node, index: int) -> bool:
    """Whether an operand is a constant with one number, none of them zero, for each position of one axis."""
    found = float64(node.inputs[index])
    return found is not None and sum(size > 1 for size in found.shape) == 1 and bool(found.all())


def _moved(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    if is_onnx(node, "Gather") and float64(node.inputs[0]) is not None:
        return _embedding(w, node)
    if reads != [0]:
        return not reads
    value = present(node.inputs[0])
    found, before = w.labels[value], w.shape(value)
    if is_onnx(node, "Gather"):
        axis = int(node.attributes.get_int("axis", 0) or 0) % len(before)
        if found.shape[axis] == 1:
            rank = len(w.shape(node.inputs[1]))
            w.labels[node.outputs[0]] = found.reshape(*found.shape[:axis], *(1,) * rank, *found.shape[axis + 1 :])
            return True
    moved = MOVES[node.op_type][0](node, 0, Channels(found, unscaled(found.ndim)), before, w.sizes)
    if moved is None:
        return False
    for output, channels in moved:
        w.labels[output] = channels.labels
    return True


def _embedding(w: ScaleWalk, node: ir.Node) -> bool:
    """A table of vectors writes their channels."""
    shape, after = w.shape(node.inputs[0]), w.shape(node.outputs[0])
    if int(node.attributes.get_int("axis", 0) or 0) != 0 or len(shape) != 2:
        return True
    fresh = w.table.fresh(shape[1])
    w.operands.append(ScaledOperand(node, 0, fresh[None, :], np.zeros((1, 1), np.int64)))
    w.write(node, fresh, len(after), len(after) - 1)
    return True


def _joined_along(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    shapes = [w.shape(v) for v in node.inputs]
    axis = int(node.attributes.get_int("axis", 0) or 0) % len(shapes[0])
    if all(w.labels[present(node.inputs[i])].shape[axis] == 1 for i in reads) and len(reads) == len(shapes):
        w.labels[node.outputs[0]] = _joined(w, node, reads, len(shapes[0]))
        return True
    parts = [w.labels.get(present(v), unscaled(len(shapes[0]))) for v in node.inputs]
    across = np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts))
    whole = [(*across[:axis], shape[axis], *across[axis + 1 :]) for shape in shapes]
    w.labels[node.outputs[0]] = np.concatenate([np.broadcast_to(p, w) for p, w in zip(parts, whole, strict=True)], axis)
    return True


def _spatial(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    if reads != [0] or any(v.uses() for v in node.outputs[1:]):
        return False
    value = present(node.inputs[0])
    before, after = w.shape(value), w.shape(node.outputs[0])
    if len(before) != len(after):
        return False
    kept = [a for a in range(len(before)) if before[a] == after[a] and (a < 2 or is_onnx(node, "Resize", "Upsample"))]
    w.labels[node.outputs[0]] = w.tied(node, w.labels[value], kept)
    return True


def _padded_with_zeros(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    """Channels of zeros have any scale."""
    found = w.labels[present(node.inputs[0])]
    pads = array(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes.get_ints("pads", ()))
    axes = array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(found.ndim)
    if reads != [0] or pads is None or axes is None:
        return False
    for axis, front, back in zip(axes.tolist(), *pads.reshape(2, -1).tolist(), strict=True):
        if found.shape[axis] == 1 or not (front or back):
            continue
        if node.attributes.get_string("mode", "constant") != "constant":
            return False
        kept = found.take(range(max(0, -front), found.shape[axis] - max(0, -back)), axis)
        wide = [(max(0, front), max(0, back)) if a == axis % found.ndim else (0, 0) for a in range(found.ndim)]
        new = np.pad(np.zeros(kept.shape, bool), wide, constant_values=True)
        found = np.pad(kept, wide)
        found[new] = w.table.fresh(int(new.sum()))
    w.labels[node.outputs[0]] = found
    return True


def _reduced(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    value = present(node.inputs[0])
    rank = len(w.shape(value))
    given = array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    axes = given.tolist() if given is not None else node.attributes.get_ints("axes", None)
    if reads != [0] or not axes:
        return False
    gone = {int(a) % rank for a in axes}
    found = w.tied(node, w.labels[value], [a for a in range(rank) if a not in gone])
    keep = node.attributes.get_int("keepdims", 1)
    w.labels[node.outputs[0]] = found if keep else found.squeeze(tuple(gone))
    return True


def _nothing(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    return True


def _tiled(w: ScaleWalk, node: ir.Node, reads: Sequence[int]) -> bool:
    repeats = array(node.inputs[1]) if len(node.inputs) == 2 else None
    if repeats is None:
        return False
    found = w.labels[present(node.inputs[0])]
    w.labels[node.outputs[0]] = np.tile(
        found, [int(r) if size != 1 else 1 for r, size in zip(repeats, found.shape, strict=True)]
    )
    return True


def _padded(found: Classes, rank: int) -> Classes:
    return found.reshape((1,) * (rank - found.ndim) + found.shape)


WRITERS = rules.LAYERS | {"BatchNormalization", "Mul", "Gather"}
"""Operators whose constants give channels scales, also where what they read has none."""

HANDLERS: dict[str, Rule] = {
    **dict.fromkeys(rules.ELEMENTWISE, _same),
    **dict.fromkeys(rules.SUMS, _sum),
    **dict.fromkeys(rules.PRODUCTS, _product),
    **dict.fromkeys(rules.LAYERS, _layer),
    **dict.fromkeys(rules.MOVEMENT, _moved),
    **dict.fromkeys(rules.SPATIAL, _spatial),
    **dict.fromkeys(rules.REDUCTIONS, _reduced),
    **dict.fromkeys(rules.SCALE_FREE, _nothing),
    "Concat": _joined_along,
    "Pad": _padded_with_zeros,
    "Tile": _tiled,
    "BatchNormalization": _batch_norm,
}
"""Rules by operator of the default domain; one that is missing freezes what it reads."""
