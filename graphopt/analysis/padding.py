"""Norms over the dense width: what a removal leaves of an axis is padded with zeros, normalised, and cut again.

The dead positions were zero, so that mean and deviation stay what they were, to the last bit but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import Floats
from graphopt.analysis.remove import Removal

_FIRST_OPSET = 11
"""Before it, the pads of Pad were an attribute."""


def cannot_pad(node: ir.Node) -> str | None:
    """Why what a removal leaves of a node's input cannot be padded; None where it can."""
    imports = node.graph.opset_imports if node.graph is not None else {}
    if imports.get("", _FIRST_OPSET) >= _FIRST_OPSET:
        return None
    return f"what is left of it cannot be padded before opset {_FIRST_OPSET}"


def feeds_norm(pad: ir.Node) -> bool:
    """Whether a Pad brings what it pads to the width of the norms behind it, as `pad_to_dense` makes them."""
    readers = [use.node.op_type for use in pad.outputs[0].uses()]
    return bool(readers) and all(op_type in _NORMS for op_type in readers)


_NORMS = {"LayerNormalization", "SkipLayerNormalization", "GroupNormalization"}


def own_axis(node: ir.Node, index: int, axis: int, rank: int) -> int:
    """The axis of an operand that meets an axis of the result in broadcasting; negative where it has none."""
    value = node.inputs[index]
    return axis - rank + len(shapes.dims(value) or ()) if value is not None else -1


def spans(node: ir.Node, index: int, axis: int, rank: int) -> bool:
    """Whether an operand has a value of its own at each position of an axis of the result."""
    own, value = own_axis(node, index, axis, rank), node.inputs[index]
    return own >= 0 and value is not None and (shapes.dims(value) or ())[own] != 1


def shortened(node: ir.Node, axes: Iterable[int], r: Removal) -> dict[int, tuple[int, int]]:
    """Axes of the first result that become shorter -> positions before and after."""
    masks = {axis: r.mask(node.outputs[0], axis) for axis in axes}
    return {axis: (len(mask), int(mask.sum())) for axis, mask in masks.items() if mask is not None}


def pad_to_dense(
    node: ir.Node, axes: Iterable[int], operands: Iterable[int], r: Removal, results: Iterable[int] = (0,)
) -> None:
    """Let a node work on the dense sizes of some axes.

    Args:
        node: a norm.
        axes: of its first result.
        operands: what is padded, where it spans such an axis in broadcasting.
        r: the removal.
        results: what is cut.
    """
    left = shortened(node, axes, r)
    if not left:
        return
    rank = len(shapes.dims(node.outputs[0]) or ())
    for index in operands:
        missing = {
            own_axis(node, index, axis, rank): before - after
            for axis, (before, after) in left.items()
            if spans(node, index, axis, rank)
        }
        if missing:
            pad(node, index, missing, r)
    for index in results:
        r.cut_output(node, index, {axis: after for axis, (_, after) in left.items()})


def pad(node: ir.Node, index: int, missing: Mapping[int, int], r: Removal) -> None:
    """Put zeros behind what is left of an operand, so many by axis of its own."""
    if not r.change_operand(node, index, partial(_with_zeros, missing)):
        r.pad_operand(node, index, missing)


def _with_zeros(missing: Mapping[int, int], array: Floats) -> Floats:
    return np.pad(array, [(0, missing.get(axis, 0)) for axis in range(array.ndim)])
