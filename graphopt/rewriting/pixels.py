"""Pixels moved into channels and back by Reshape, Transpose, Reshape: DepthToSpace and SpaceToDepth.

(n, r r c, h, w) -> (n, r, r, c, h, w) -> (n, c, h, r, w, r) -> (n, c, h r, w r)      DepthToSpace, DCR
(n, c r r, h, w) -> (n, c, r, r, h, w) -> (n, c, h, r, w, r) -> (n, c, h r, w r)      DepthToSpace, CRD
(n, c, h r, w r) -> (n, c, h, r, w, r) -> (n, r, r, c, h, w) -> (n, r r c, h, w)      SpaceToDepth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.rewriting.edit import drop_if_unused, is_onnx, label, mark_origin, remove_node, scopes, sole_use


@dataclass(frozen=True)
class Move:
    """One of the operators, as three nodes do it.

    Attributes:
        operator: its name.
        since: opset that has it in this mode.
        split: what the sizes between the nodes are called, in the order of the first Reshape.
        perm: of the Transpose.
        mode: attribute of DepthToSpace.
    """

    operator: str
    since: int
    split: str
    perm: tuple[int, ...]
    mode: str = ""


MOVES = (
    Move("DepthToSpace", 11, "nrrchw", (0, 3, 4, 1, 5, 2), "DCR"),
    Move("DepthToSpace", 11, "ncrrhw", (0, 1, 4, 2, 5, 3), "CRD"),
    Move("SpaceToDepth", 1, "nchrwr", (0, 3, 5, 1, 2, 4)),
)
_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""What ONNX Runtime has kernels for."""


def write_moves(model: ir.Model) -> list[str]:
    """Write the operators for the three nodes each, in place, in all bodies and functions; the names of the nodes.

    Shapes must be inferred.
    """
    done = []
    for graph, opset in scopes(model):
        for node in tuple(graph):
            found = _found(node, opset) if is_onnx(node, "Reshape") else None
            if found is None:
                continue
            move, size, middle, first = found
            mark_origin(node, [label(first), label(middle)])
            source = first.inputs[0]
            node.op_type = move.operator
            node.attributes.clear()
            node.attributes["blocksize"] = ir.AttrInt64("blocksize", size)
            if move.mode:
                node.attributes["mode"] = ir.AttrString("mode", move.mode)
            target = node.inputs[1]
            node.resize_inputs(1)
            node.replace_input_with(0, source)
            drop_if_unused(target)
            remove_node(middle)
            remove_node(first)
            done.append(label(node))
    return done


def _found(last: ir.Node, opset: int) -> tuple[Move, int, ir.Node, ir.Node] | None:
    middle = _only_for(last, "Transpose")
    first = _only_for(middle, "Reshape") if middle is not None else None
    if middle is None or first is None or last.outputs[0].dtype not in _TYPES:
        return None
    shapes = [_sizes(value) for value in (first.inputs[0], first.outputs[0], last.outputs[0])]
    perm = tuple(middle.attributes.get_ints("perm", ()))
    before, split, after = shapes
    if before is None or split is None or after is None or (len(before), len(split), len(after)) != (4, 6, 4):
        return None
    for move in MOVES:
        if opset >= move.since and perm == move.perm and _is(move, before, split, after):
            size = split[move.split.index("r")]
            if isinstance(size, int) and size > 1:
                return move, size, middle, first
    return None


def _is(move: Move, before: Sequence[int | str], split: Sequence[int | str], after: Sequence[int | str]) -> bool:
    """Whether the sizes are those of the move; only the number of images may be a name."""
    if any(not isinstance(size, int) for size in (*before[1:], *split[1:], *after[1:])):
        return False
    n, c, h, w = (split[move.split.index(name)] for name in "nchw")
    r, other = (size for name, size in zip(move.split, split, strict=True) if name == "r")
    if r != other or not all(isinstance(size, int) for size in (c, h, w, r)):
        return False
    deep = (n, int(c) * int(r) * int(r), h, w)
    wide = (n, c, int(h) * int(r), int(w) * int(r))
    given, made = (deep, wide) if move.operator == "DepthToSpace" else (wide, deep)
    return tuple(before) == given and tuple(after) == made


def _only_for(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node that makes the first input of `node`, for it alone and in the same graph."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.graph is not node.graph or not is_onnx(producer, op_type):
        return None
    return producer if sole_use(value) else None


def _sizes(value: ir.Value | None) -> list[int | str] | None:
    """Sizes, or names of sizes; None where one has neither."""
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else [size for size in sizes if size is not None]
