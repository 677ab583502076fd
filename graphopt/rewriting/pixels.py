"""Pixels moved into channels and back by Reshape, Transpose, Reshape: DepthToSpace and SpaceToDepth.

(n, r r c, h, w) -> (n, r, r, c, h, w) -> (n, c, h, r, w, r) -> (n, c, h r, w r)      DepthToSpace, DCR
(n, c r r, h, w) -> (n, c, r, r, h, w) -> (n, c, h, r, w, r) -> (n, c, h r, w r)      DepthToSpace, CRD
(n, c, h r, w r) -> (n, c, h, r, w, r) -> (n, r, r, c, h, w) -> (n, r r c, h, w)      SpaceToDepth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.rewriting.cuts import made_by
from graphopt.rewriting.edit import drop_if_unused, remove_node, sole_use
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import scopes


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


def write_moves(model: ir.Model) -> tuple[list[str], list[Skip]]:
    """Write the operators for the three nodes each, in place, in all bodies and functions.

    Shapes must be inferred.

    Returns:
        The names of the nodes, and the Transposes that move pixels and stay.
    """
    done, skipped = [], []
    for graph, opset in scopes(model):
        for node in tuple(graph):
            found = _found(node, opset) if is_onnx(node, "Reshape") else None
            if found is None or isinstance(found, Skip):
                skipped += [found] if found is not None else []
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
    return done, skipped


def _found(last: ir.Node, opset: int) -> tuple[Move, int, ir.Node, ir.Node] | Skip | None:
    """The move that ends with `last`; None where the permutation is another one, or why three nodes are no move."""
    middle = made_by(last.inputs[0], last, "Transpose")
    first = made_by(middle.inputs[0], middle, "Reshape") if middle is not None else None
    perm = tuple(middle.attributes.get_ints("perm", ())) if middle is not None else ()
    moves = [move for move in MOVES if opset >= move.since and perm == move.perm]
    if middle is None or first is None or not moves:
        return None
    if sole_use(middle.outputs[0]) is None or sole_use(first.outputs[0]) is None:
        return Skip(label(middle), "it may move pixels, but what stands between its reshapes is also read elsewhere")
    if last.outputs[0].dtype not in _TYPES:
        return Skip(label(middle), "it may move pixels, of a type that runtimes have no kernel for")
    before, split, after = (_sizes(value) for value in (first.inputs[0], first.outputs[0], last.outputs[0]))
    if before is None or split is None or after is None:
        return Skip(label(middle), "it may move pixels, but sizes are unknown")
    if (len(before), len(split), len(after)) != (4, 6, 4):
        return None
    for move in moves:
        size = split[move.split.index("r")]
        if isinstance(size, int) and size > 1 and _is(move, before, split, after):
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


def _sizes(value: ir.Value | None) -> list[int | str] | None:
    """Sizes, or names of sizes; None where one has neither."""
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else [size for size in sizes if size is not None]
