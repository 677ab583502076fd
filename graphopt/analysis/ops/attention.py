"""Attention as one operator: softmax(q k' / sqrt(d)) v, head by head.

Queries, keys and values come as [B, S, heads x size] or [B, heads, S, size], out of projections or out of weights that
the operator itself multiplies with. Heads, and positions within a head, are the two axes of every one of them, and both
are units: where an operand holds them in one axis, its labels are products (`graphopt.analysis.labels`).

    heads      of keys and values, with all queries that read them; of queries, the same one for each head of keys
    positions  in a head: those of q and k together, those of v with the result, the same in all heads

A head whose values are zero is zero in the result, whatever its queries and keys are; a position of q and k that is
zero adds nothing to the scores. A head of queries that is zero still averages the values. The factor 1 / sqrt(d) keeps
its dense value.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Axes, Factors, Vector
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import CostView, Labeller, OpRule, Product, Role, where

Kind = Literal["q", "k", "v"]
HEADS, POSITIONS = 0, 1


@dataclass(frozen=True)
class Part:
    """Where an operand holds queries, keys or values (or a bias of them).

    Attributes:
        kind: which of them.
        operand: index of the operand.
        axis: the axis of heads, or of heads and positions together.
        position: the axis of the positions in a head; None where `axis` holds both.
        start: where on such an axis they begin.
    """

    kind: Kind
    operand: int
    axis: int
    position: int | None = None
    start: int = 0


@dataclass(frozen=True)
class Layout:
    """What an attention operator reads and writes.

    Attributes:
        heads: number of heads of queries.
        shared: number of heads of keys and values.
        size: positions in a head of queries and keys.
        values: positions in a head of values.
        parts: what operands hold.
        masks: operand -> its axis of heads of queries, where that has more than one position.
        positions: positions in a head may go.
        split: the result is [B, heads, S, size].
        present: outputs that are [B, heads, S, size] of keys or values.
    """

    heads: int
    shared: int
    size: int
    values: int
    parts: Sequence[Part]
    masks: dict[int, int] = field(default_factory=dict)
    positions: bool = True
    split: bool = False
    present: dict[int, Kind] = field(default_factory=dict)

    def shape(self, kind: Kind) -> tuple[int, int]:
        """Heads and positions of one kind."""
        return (self.heads if kind == "q" else self.shared, self.values if kind == "v" else self.size)

    def cut(self, part: Part) -> slice:
        """The part of a shared axis."""
        heads, size = self.shape(part.kind)
        return slice(part.start, part.start + heads * size)


class Attention(OpRule):
    """Heads and positions of queries, keys, values and the result; see the module's docstring."""

    @abstractmethod
    def layout(self, node: ir.Node) -> Layout | str:
        """What the node reads and writes, or why that is not known."""

    @abstractmethod
    def resize(self, node: ir.Node, heads: int, shared: int, size: int, values: int) -> None:
        """Write new numbers into the attributes that hold them."""

    def inner(self, node: ir.Node) -> tuple[int, int] | None:
        """(input, weight) operands that the operator multiplies before; None if it has no weight."""
        return None

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, layout = where(node), self.layout(node)
        if isinstance(layout, str):
            g.freeze_node(node, f"{name}: {layout}")
            return
        output = node.outputs[0]
        operands = self._operands(node, g, layout)
        found = [_labels(g, name, layout, part, operands[part.operand]) for part in layout.parts]
        shared = [one[HEADS] for part, one in zip(layout.parts, found, strict=True) if part.kind != "q"]
        heads = _tied(g, name, shared)
        queries = [one[HEADS] for part, one in zip(layout.parts, found, strict=True) if part.kind == "q"]
        per_query = _tied(g, name, [_copied(g, layout, heads), *queries])
        size = _tied(
            g, name, [one[POSITIONS] for part, one in zip(layout.parts, found, strict=True) if part.kind != "v"]
        )
        values = _tied(
            g, name, [one[POSITIONS] for part, one in zip(layout.parts, found, strict=True) if part.kind == "v"]
        )
        for part, (own, inside) in zip(layout.parts, found, strict=True):
            if part.kind != "v":
                self._ends(node, g, layout, part, own, inside)
        for operand, axis in layout.masks.items():
            _tied(g, name, [per_query, operands[operand].get(axis, ())])
        g.heads(per_query)
        # Of what the operator reads side by side no part may vanish: as axes of a tensor of its own none does.
        g.labels[f"{output.name}, inside"] = {0: heads, 1: size, 2: values}
        for index, kind in layout.present.items():
            g.set(node.outputs[index], {1: heads, 3: values if kind == "v" else size})
        if layout.split:
            g.set(output, {1: per_query, 3: values})
            return
        flat_heads = tuple(np.repeat(vector, layout.values) for vector in per_query)
        g.set(output, {2: (*flat_heads, *(np.tile(vector, layout.heads) for vector in values))})

    def _operands(self, node: ir.Node, g: Labeller, layout: Layout) -> dict[int, Axes]:
        """Labels of all operands; axes that hold neither heads nor positions are frozen."""
        name, inner = where(node), self.inner(node)
        operands = {}
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            own = {a for p in layout.parts if p.operand == index for a in (p.axis, p.position) if a is not None}
            roles: dict[int, Role] = dict.fromkeys(own, "producer")
            if index in layout.masks:
                own.add(layout.masks[index])
            if inner is not None and index in inner:
                contracted = 2 if index == inner[0] else 0
                own.add(contracted)
                roles[contracted] = "consumer"
            operands[index] = g.operand(node, index, roles)
            g.freeze(operands[index], f"{name}: the axis holds no heads", but=own)
        if inner is not None:
            x, weight = operands[inner[0]], operands[inner[1]]
            if x.get(2) or weight.get(0):
                g.equate(x.get(2, ()), weight.get(0, ()), f"{name}: its inner axis is never removed")
            if 2 in x:
                g.sink(node, inner[0], 2, "zero", f"{name}: reads a value that is not zero")
        return operands

    @staticmethod
    def _ends(node: ir.Node, g: Labeller, layout: Layout, part: Part, heads: Factors, inside: Factors) -> None:
        """Queries and keys end in the scores: a head goes with its values, a position has to be zero."""
        reason = f"{where(node)}: scores a live position"
        if part.position is not None:
            if heads:
                g.sink(node, part.operand, part.axis, "anything", reason)
            if inside:
                g.sink(node, part.operand, part.position, "zero", reason)
            return
        count, size = layout.shape(part.kind)
        value = node.inputs[part.operand]
        known = shapes.dims(value) if value is not None else None
        length = known[part.axis] if known is not None else None
        if inside and isinstance(length, int):
            behind = length - part.start - count * size
            flat = tuple(np.pad(np.tile(vector, count), (part.start, behind)) for vector in inside)
            g.sink(node, part.operand, part.axis, "zero", reason, flat)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output, layout = node.outputs[0], self.layout(node)
        if isinstance(layout, str):
            return
        quiet = np.ones((layout.shared, layout.values), dtype=bool)
        for part in (p for p in layout.parts if p.kind == "v"):
            quiet &= _zero(node, d, layout, part)
        quiet = np.repeat(quiet, layout.heads // layout.shared, axis=0)
        found = {1: quiet.all(axis=1), 3: quiet.all(axis=0)} if layout.split else {2: quiet.ravel()}
        for axis, zero in found.items():
            if axis in d.axes(output):
                d.set(output, axis, np.where(zero, 0.0, np.nan))

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        layout, out = self.layout(node), shapes.static_dims(node.outputs[0])
        if isinstance(layout, str) or out is None:
            return []
        parts = {part.kind: part for part in reversed(layout.parts)}
        lengths = {kind: _length(node, part) for kind, part in parts.items()}
        if None in lengths.values():
            return []
        pairs = float(out[0] * (lengths["q"] or 0) * (lengths["k"] or 0))
        products = []
        for kind in ("q", "v"):
            coefficient, axes = _count(node, c, layout, parts[kind])
            repeated = layout.heads // layout.shared if kind == "v" else 1
            products.append((pairs * repeated * coefficient, axes))
        inner = self.inner(node)
        if inner is not None:
            weight = node.inputs[inner[1]]
            sizes = shapes.static_dims(weight) if weight is not None else None
            if sizes is None:
                return []
            rows, one = c.axis(node, inner[1], 0, sizes[0])
            columns, two = c.axis(node, inner[1], 1, sizes[1])
            products.append((float(out[0] * (lengths["q"] or 0)) * rows * columns, (*one, *two)))
        return products

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        layout = self.layout(node)
        if isinstance(layout, str):
            return
        left: dict[Kind, tuple[int, int]] = {}
        for part in layout.parts:
            alive = _alive(node, r, layout, part)
            left.setdefault(part.kind, (int(alive.any(axis=1).sum()), int(alive.any(axis=0).sum())))
        (heads, size), shared, values = left["q"], left["k"][0], left["v"][1]
        if (heads, shared, size, values) == (layout.heads, layout.shared, layout.size, layout.values):
            return
        if size != layout.size and not node.attributes.get_float("scale", 0.0):
            node.attributes.add(ir.AttrFloat32("scale", 1 / math.sqrt(layout.size)))
        self.resize(node, heads, shared, size, values)


def _tied(g: Labeller, name: str, several: Sequence[Factors]) -> Factors:
    """The same axis in several operands."""
    if not any(several):
        return ()
    factors = several[0]
    for other in several[1:]:
        factors = g.equate(factors, other, f"{name}: an operand is never shortened")
    return factors


def _labels(g: Labeller, name: str, layout: Layout, part: Part, labels: Axes) -> tuple[Factors, Factors]:
    """Labels of the heads and of the positions in a head."""
    if part.position is not None:
        return labels.get(part.axis, ()), labels.get(part.position, ())
    if part.axis not in labels:
        return (), ()
    grid = g.table.product(labels[part.axis])[layout.cut(part)].reshape(layout.shape(part.kind))
    found = g.table.box(grid, name, None if layout.positions else HEADS)
    return found.get(HEADS, ()), found.get(POSITIONS, ())


def _copied(g: Labeller, layout: Layout, heads: Factors) -> Factors:
    """Labels of the heads of queries: each head of keys and values is read by as many of them."""
    times = layout.heads // layout.shared
    if times == 1 or not heads:
        return heads
    copies = g.table.axis(times, "copy")
    return (*(np.repeat(vector, times) for vector in heads), np.tile(copies, layout.shared))


def _zero(node: ir.Node, d: DeadValues, layout: Layout, part: Part) -> npt.NDArray[np.bool_]:
    """Where a part is zero, by head and position."""
    heads, size = layout.shape(part.kind)
    values = d.operand(node, part.operand, part.axis)
    if part.position is None:
        flat = np.zeros(heads * size, dtype=bool) if values is None else values[layout.cut(part)] == 0
        return flat.reshape(heads, size)
    inner = d.operand(node, part.operand, part.position)
    rows = np.zeros(heads, dtype=bool) if values is None else values == 0
    columns = np.zeros(size, dtype=bool) if inner is None else inner == 0
    zero: npt.NDArray[np.bool_] = rows[:, None] | columns
    return zero


def _alive(node: ir.Node, r: Removal, layout: Layout, part: Part) -> npt.NDArray[np.bool_]:
    """What stays of a part, by head and position."""
    heads, size = layout.shape(part.kind)
    mask = r.operand_mask(node, part.operand, part.axis)
    if part.position is None:
        flat = np.ones(heads * size, dtype=bool) if mask is None else mask[layout.cut(part)]
        return flat.reshape(heads, size)
    inner = r.operand_mask(node, part.operand, part.position)
    rows = np.ones(heads, dtype=bool) if mask is None else mask
    columns = np.ones(size, dtype=bool) if inner is None else inner
    alive: npt.NDArray[np.bool_] = rows[:, None] & columns
    return alive


def _count(node: ir.Node, c: CostView, layout: Layout, part: Part) -> Product:
    """Live elements of a part in one place of the sequence."""
    heads, size = layout.shape(part.kind)
    if part.position is not None:
        one, axes = c.axis(node, part.operand, part.axis, heads)
        other, more = c.axis(node, part.operand, part.position, size)
        return one * other, (*axes, *more)
    factors: tuple[Vector, ...] = c.of_operand(node, part.operand, part.axis)
    cut = layout.cut(part)
    return (1.0, (np.stack([vector[cut] for vector in factors]),)) if factors else (float(heads * size), ())


def _length(node: ir.Node, part: Part) -> int | None:
    """Length of the sequence that a part's operand has; None where it is unknown. A weight has that of the input."""
    value = node.inputs[part.operand]
    if value is not None and shapes.constant_tensor(value) is not None:
        value = node.inputs[0]
    sizes = shapes.static_dims(value) if value is not None else None
    if sizes is None or len(sizes) < 3:
        return None
    return sizes[2] if len(sizes) == 4 else sizes[1]
