"""Reshape, Flatten, Squeeze, Unsqueeze, Transpose, DepthToSpace, SpaceToDepth, Expand and Tile.

A reshape is cut into blocks of axes with equal products; only blocks that carry labels need known sizes, so symbolic
batch and sequence axes stay symbolic. Of a block with unknown sizes the leading axis can be followed: with C = q G,
row-major order puts position i of (C, ...) in row i // q of (G, ...), and row j of (G, ...) in positions q j up to
q j + q - 1 of (C, ...), whatever the other sizes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.grouped import written_norm
from graphopt.analysis.labels import Axes
from graphopt.analysis.movement import Array, Move, Movement, same
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, rule
from graphopt.analysis.size_vectors import set_sizes


def _shapes(node: ir.Node) -> tuple[tuple[shapes.Dim, ...], tuple[shapes.Dim, ...]] | str:
    source = node.inputs[0]
    before = shapes.dims(source) if source is not None else None
    after = shapes.dims(node.outputs[0])
    if before is None or after is None:
        return "a rank is unknown"
    return before, after


def _complete(sizes: Sequence[shapes.Dim], elements: int) -> list[int] | None:
    """Sizes of a block of known elements; one unknown size is what the others leave."""
    known = [d for d in sizes if isinstance(d, int)]
    rest, remainder = divmod(elements, math.prod(known)) if math.prod(known) else (0, 1)
    if remainder or len(sizes) - len(known) > 1 or (len(sizes) == len(known) and rest != 1):
        return None
    return [d if isinstance(d, int) else rest for d in sizes]


def _leading(axis: int, sources: range, results: range, size: shapes.Dim, outer: Sequence[shapes.Dim]) -> list[Move]:
    """The move of the leading axis of a block with unknown sizes; none where its sizes do not divide."""
    to = outer[0] if outer else None
    if axis != sources.start or not isinstance(size, int) or not isinstance(to, int) or not size or not to:
        return []
    if to % size == 0:
        return [Move(axis, (results.start,), lambda vector: np.repeat(vector, to // size))]
    if size % to == 0 and len(results) > 1:
        return [Move(axis, (results.start, results.start + 1), lambda v: v.reshape(to, -1), keep=results.start)]
    return []


@rule
class Reshape(Movement):
    """Reshape and Flatten: the same elements in row-major order under other axes."""

    ops = ("Reshape", "Flatten")

    def label(self, node: ir.Node, g: Labeller) -> None:
        norm = written_norm(node)
        if norm is None:
            super().label(node, g)
        else:
            norm.label(node, g)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        found = _shapes(node)
        if isinstance(found, str):
            return found
        before, after = found
        moves = []
        for sources, results in shapes.reshape_blocks(before, after):
            inner = [before[a] for a in sources]
            outer = [after[a] for a in results]
            for axis in axes:
                if axis not in sources:
                    continue
                if len(inner) == 1 and len(outer) == 1:
                    moves.append(Move(axis, tuple(results), same))
                    continue
                place = axis - sources.start
                full = [d for d in inner if isinstance(d, int)]
                target = _complete(outer, math.prod(full))
                if len(full) != len(inner) or target is None:
                    moves += _leading(axis, sources, results, inner[0], outer)
                    continue

                def spread(vector: Array, place: int = place, full: list[int] = full, to: list[int] = target) -> Array:
                    shape = [1] * len(full)
                    shape[place] = full[place]
                    return np.broadcast_to(vector.reshape(shape), full).reshape(to)

                moves.append(Move(axis, tuple(results), spread))
        return moves

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        norm = written_norm(node)
        if norm is not None and node is norm.enter:
            norm.rewrite(r)
        elif node.op_type == "Reshape":  # Flatten computes its sizes itself
            set_sizes(r, node, 1)


@rule
class Squeeze(Movement):
    """Squeeze and Unsqueeze: axes of size 1 go or come, the others keep their order."""

    ops = ("Squeeze", "Unsqueeze")

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        found = _shapes(node)
        if isinstance(found, str):
            return found
        before, after = found
        given = node.attributes.get_ints("axes", None)
        if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
            given = shapes.ints(node.inputs[1])
            if given is None:
                return "its axes are computed"
        longer = after if node.op_type == "Unsqueeze" else before
        if given is None:
            gone = {axis for axis, size in enumerate(before) if size == 1}
        else:
            gone = {axis % len(longer) for axis in given}
        kept = [axis for axis in range(len(longer)) if axis not in gone]
        if node.op_type == "Unsqueeze":
            return [Move(axis, (kept[axis],), same) for axis in axes]
        return [Move(axis, (kept.index(axis),), same) for axis in axes if axis in kept]


@rule
class Transpose(Movement):
    """Axes in another order."""

    ops = ("Transpose",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        if shape is None:
            return "the rank is unknown"
        order = list(node.attributes.get_ints("perm", ()) or range(len(shape))[::-1])
        return [Move(axis, (order.index(axis),), same) for axis in axes]


@rule
class DepthToSpace(Movement):
    """Channels (b, b, C') [DCR] or (C', b, b) [CRD] become C' channels of blocks of b x b positions."""

    ops = ("DepthToSpace",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        block = int(node.attributes.get_int("blocksize", 1) or 1)
        leading = node.attributes.get_string("mode", "DCR") == "DCR"

        def deal(vector: Array) -> Array:
            """Channel first, positions of the block second: only the channel axis is an axis of the output."""
            return vector.reshape(block * block, -1).T if leading else vector.reshape(-1, block * block)

        # The positions of a block become spatial positions: the result's second axis is the spatial one, kept whole.
        return [Move(a, (1, 2), deal, keep=1) if a == 1 else Move(a, (0,), same) for a in axes if a in {0, 1}]


@rule
class SpaceToDepth(Movement):
    """Blocks of b x b positions become channels (b, b, C)."""

    ops = ("SpaceToDepth",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        block = int(node.attributes.get_int("blocksize", 1) or 1)
        return [Move(a, (a,), _copies(block * block) if a == 1 else same) for a in axes if a in {0, 1}]


@rule
class Col2Im(Movement):
    """Columns of blocks, channel by channel, become an image: a channel is all positions of its blocks."""

    ops = ("Col2Im",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        block = shapes.ints(node.inputs[2])
        if block is None:
            return "its block is computed"
        size = math.prod(block)
        return [
            Move(a, (1, 2), lambda v: v.reshape(-1, size), keep=1) if a else Move(a, (0,), same) for a in axes if a < 2
        ]

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        """Blocks overlap: only zeros stay what they are."""
        super().dead(node, d)
        output = node.outputs[0]
        for axis in d.axes(output):
            values = d.of(output, axis)
            if values is not None:
                d.set(output, axis, np.where(values == 0, 0.0, np.nan))


def _copies(count: int) -> Callable[[Array], Array]:
    return lambda vector: np.tile(vector, count)


class _Copying(Movement):
    """What is repeated along an axis of size 1 is as long as the graph needs it: every copy is a label of its own."""

    def label(self, node: ir.Node, g: Labeller) -> None:
        super().label(node, g)
        output, labels = node.outputs[0], g.of(node.outputs[0])
        source, shape = node.inputs[0], shapes.dims(output)
        before = shapes.dims(source) if source is not None else None
        if before is None or shape is None:
            return
        copies: Axes = {}
        for axis, size in enumerate(shape):
            own = axis - len(shape) + len(before)
            if isinstance(size, int) and size > 1 and (own < 0 or before[own] == 1):
                copies[axis] = (g.table.axis(size, "copy"),)
        g.set(output, {**labels, **copies})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        super().dead(node, d)
        value, output = shapes.scalar(node.inputs[0]), node.outputs[0]
        if value is not None:  # copies of one number
            for axis in d.axes(output):
                d.set(output, axis, np.full(d.size(output, axis), value))


@rule
class Expand(_Copying):
    """Broadcast to a larger shape: axes that keep their size pass, along the others copies come and go."""

    ops = ("Expand",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        found = _shapes(node)
        if isinstance(found, str):
            return found
        before, after = found
        shift = len(after) - len(before)
        return [Move(a, (a + shift,), same) for a in axes if before[a] == after[a + shift]]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        set_sizes(r, node, 1)


@rule
class Tile(_Copying):
    """Whole copies, one behind the other: a position and its copies are one unit; of one position, copies go."""

    ops = ("Tile",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        repeats = shapes.ints(node.inputs[1]) if len(node.inputs) == 2 else None
        if repeats is None:
            return "its repeats are computed"
        return [Move(a, (a,), _copies(repeats[a])) for a in axes]

    def label(self, node: ir.Node, g: Labeller) -> None:
        if shapes.ints(node.inputs[1]) is None:  # its repeats cannot be rewritten
            Movement.label(self, node, g)
        else:
            super().label(node, g)

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        source, repeats = node.inputs[0], shapes.ints(node.inputs[1])
        before = shapes.dims(source) if source is not None else None
        if before is None or repeats is None:
            return
        left = [r.count(node.outputs[0], a, k) if before[a] == 1 else k for a, k in enumerate(repeats)]
        if left != repeats:
            r.set_input(node, 1, np.asarray(left, dtype=np.int64))
