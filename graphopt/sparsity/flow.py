"""Where the channels of a tensor go while they are only moved, or mixed over positions and not among each other.

Movement (Reshape, Transpose, Split, Slice, ...) is carried out on numbered channels (`moves`), so that heads, fused
projections and copies for grouped queries need no cases of their own. With P = softmax(q k) of one head h and a mixing
B of the channels within that head,

    P_h (V_h B^T) = (P_h V_h) B^T,

so channels may be mixed on either side of attention, but only among those that met the same P.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.nodes import is_onnx
from graphopt.sparsity.marks import is_wrapper
from graphopt.sparsity.moves import RULES, Channels, Moved, Sizes


@dataclass(frozen=True)
class Leaf:
    """A place where the movement ends.

    Attributes:
        value: the tensor that is read.
        node, index: who reads it; None: the caller of the graph.
        channels: what it holds.
    """

    value: ir.Value
    node: ir.Node | None
    index: int
    channels: Channels


def follow(start: ir.Value, axis: int, sizes: Sizes) -> list[Leaf] | str:
    """Everything that reads the channels of a tensor, movement apart.

    Args:
        start: the tensor.
        axis: along which its channels run.
        sizes: kept over calls for one model.

    Returns:
        The leaves, or why the channels cannot be told apart.
    """
    shape = sizes.of(start)
    if shape is None:
        return f"the shape of {start.name} is not known"
    labels = np.arange(shape[axis], dtype=np.int64).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    first = Channels(labels, np.zeros((1,) * len(shape), np.int64))
    leaves: list[Leaf] = []
    entered: dict[ir.Node, tuple[int, bool]] = {}
    waiting = [(start, first)]
    while waiting:
        value, channels = waiting.pop()
        if value.is_graph_output():
            leaves.append(Leaf(value, None, 0, channels))
        for use in value.uses():
            node, index = use.node, use.idx
            if is_onnx(node, "Shape", "Size"):
                continue  # what channels hold does not matter there
            moved = None if is_wrapper(node) else _moved(node, index, channels, sizes)
            earlier = entered.setdefault(node, (index, moved is not None))
            if earlier[0] != index and (moved is not None or earlier[1]) and not is_onnx(node, "Concat"):
                # A product of the channels with themselves moves nothing.
                return f"{node.op_type} {node.name or ''} reads it twice".replace("  ", " ")
            if moved is None:
                leaves.append(Leaf(value, node, index, channels))
            else:
                waiting.extend(moved)
    return leaves


def origins(value: ir.Value) -> Iterator[ir.Value]:
    """Tensors whose channels a tensor may hold: those in front of its movement, the nearest first."""
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        found = waiting.pop(0)
        if found in seen:
            continue
        seen.add(found)
        yield found
        node = found.producer()
        if node is None or is_wrapper(node) or not is_onnx(node, *RULES):
            continue
        carried = RULES[node.op_type][1]
        waiting.extend(v for i, v in enumerate(node.inputs) if v is not None and (carried is None or i in carried))


def _moved(node: ir.Node, index: int, c: Channels, sizes: Sizes) -> Moved | None:
    """What a node makes of the channels in its input; None where it does more than move them."""
    if not is_onnx(node, *RULES):
        return None
    rule, carried = RULES[node.op_type]
    if carried is not None and index not in carried:
        return None
    before = sizes.of(node.inputs[index])
    if before is None:
        return None
    return rule(node, index, c, before, sizes)
