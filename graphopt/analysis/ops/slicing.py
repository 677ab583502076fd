"""Slice, Gather by constants, and Pad: some positions are taken, some are added.

After a removal a slice takes what is left of its positions; where these are not evenly spaced it becomes a Gather.
Positions that a constant Pad adds are fresh units: they join whatever they are added to later, and a padding that is
no longer needed shrinks. That is how an option-A shortcut of a residual network is pruned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Axes
from graphopt.analysis.movement import Array, Move, Movement, same, taking
from graphopt.analysis.padding import feeds_norm
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where
from graphopt.analysis.size_vectors import set_entries
from graphopt.files.slices import slices

_END = np.iinfo(np.int64).max


def _rank(node: ir.Node) -> int:
    return len(shapes.dims(node.inputs[0]) or ()) if node.inputs[0] is not None else 0


@rule
class Slice(Movement):
    """Evenly spaced positions of some axes."""

    ops = ("Slice",)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        found = slices(node)
        if found is None:
            return "its axes are computed"
        moves = [Move(axis, (axis,), same) for axis in axes if axis not in found]
        cuts = ((axis, found[axis]) for axis in axes if axis in found)
        return moves + [Move(axis, (axis,), taking(cut)) for axis, cut in cuts if cut is not None]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        found = slices(node) or {}
        gathers: dict[int, Array] = {}
        new: dict[int, slice] = {}
        for axis, cut in found.items():
            mask = r.operand_mask(node, 0, axis)
            if mask is None or cut is None:
                continue
            places = r.operand_places(node, 0, axis, np.arange(len(mask))[cut])
            step = int(places[1] - places[0]) if len(places) > 1 else 1
            if len(places) and step and (np.diff(places) == step).all():
                stop = int(places[-1]) + (1 if step > 0 else -1)
                new[axis] = slice(int(places[0]), stop if stop >= 0 else -_END, step)
            else:
                new[axis] = slice(0, _END, 1)
                gathers[axis] = places
        if not new:
            return
        order = list(found)
        columns = {
            "starts": {order.index(axis): int(cut.start) for axis, cut in new.items()},
            "ends": {order.index(axis): int(cut.stop) for axis, cut in new.items()},
            "steps": {order.index(axis): int(cut.step) for axis, cut in new.items()},
        }
        if shapes.opset(node) < 10:
            for name in ("starts", "ends"):
                listed = list(node.attributes.get_ints(name, ()) or ())
                node.attributes.add(ir.AttrInt64s(name, [columns[name].get(k, v) for k, v in enumerate(listed)]))
        else:
            set_entries(r, node, 1, columns["starts"], len(order))
            set_entries(r, node, 2, columns["ends"], len(order))
            kind = (node.inputs[1].dtype if node.inputs[1] is not None else None) or ir.DataType.INT64
            if len(node.inputs) < 4 or node.inputs[3] is None:
                r.set_input(node, 3, np.asarray(order, dtype=kind.numpy()))
            old = (shapes.ints(node.inputs[4]) if len(node.inputs) > 4 else None) or [1] * len(order)
            steps = [columns["steps"].get(k, v) for k, v in enumerate(old)]
            r.set_input(node, 4, np.asarray(steps, dtype=kind.numpy()))
        for axis, places in gathers.items():
            r.insert_gather(node, axis, places)


@rule
class Gather(Movement):
    """Positions of an axis by index. Known indices are followed; computed ones freeze the axis they look up.

    Each position of the result can go by itself. That matters where an index is listed more than once: the copies of a
    head of keys for the queries that share it. Indices along several axes arrange the positions along these, which is
    how a view with strides is exported.
    """

    ops = ("Gather",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        g.freeze(g.of(node.inputs[1]), f"{where(node)}: indices are no units")
        super().label(node, g)
        axis, places = self._axis(node), self._places(node)
        labels = g.of(node.outputs[0])
        if axis in labels and places is not None and places.ndim == 1 and len(np.unique(places)) < places.size:
            g.set(node.outputs[0], {**labels, axis: (*labels[axis], g.table.axis(places.size, "copy"))})

    @staticmethod
    def _axis(node: ir.Node) -> int:
        return int(node.attributes.get_int("axis", 0) or 0) % max(_rank(node), 1)

    def _places(self, node: ir.Node) -> Array | None:
        """Known indices, counted from the front."""
        source, found = node.inputs[0], shapes.integer_array(node.inputs[1])
        shape = shapes.dims(source) if source is not None else None
        size = shape[self._axis(node)] if shape else None
        if found is None or not isinstance(size, int):
            return None
        return np.where(found < 0, found + size, found)

    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        axis = self._axis(node)
        indices = node.inputs[1]
        shape = shapes.dims(indices) if indices is not None else None
        if shape is None:
            return "the rank of its indices is unknown"
        moves = [Move(a, (a if a < axis else a + len(shape) - 1,), same) for a in axes if a != axis]
        places = self._places(node)
        if axis in axes and places is not None:  # one position leaves no axis: it stays, and others may go
            moves.append(Move(axis, tuple(range(axis, axis + places.ndim)), taking(places)))
        return moves

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        axis, places = self._axis(node), self._places(node)
        if places is None:
            return
        left = [r.mask(node.outputs[0], axis + own) for own in range(places.ndim)]
        kept = places
        for own, alive in enumerate(left):
            kept = kept if alive is None else np.compress(alive, kept, axis=own)
        mask = r.operand_mask(node, 0, axis)
        moved = kept if mask is None else (np.cumsum(mask) - 1)[kept]
        if moved is not places:  # an index that counts from the back counts what is left
            kind = node.inputs[1].dtype if node.inputs[1] is not None else None
            r.set_input(node, 1, moved.astype(np.int32 if kind == ir.DataType.INT32 else np.int64))


def pads(node: ir.Node) -> dict[int, tuple[int, int] | None] | None:
    """Axis -> (before, after) of a Pad node, None for an axis whose pads are not known; None where no axis is told."""
    rank = _rank(node)
    given: Sequence[shapes.Dim] | None = node.attributes.get_ints("pads", None)
    if given is None and len(node.inputs) > 1:
        given = shapes.elements(node.inputs[1])
    axes: list[int] | None = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = shapes.ints(node.inputs[3])
    if given is None or axes is None or len(given) != 2 * len(axes):
        return None
    pairs = zip(axes, given, given[len(axes) :], strict=False)
    return {a % rank: (one, two) if isinstance(one, int) and isinstance(two, int) else None for a, one, two in pairs}


def _pad_value(node: ir.Node) -> float:
    """The padded constant; NaN where it is computed."""
    if shapes.opset(node) < 11:
        return float(node.attributes.get_float("value", 0.0) or 0.0)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = shapes.scalar(node.inputs[2])
        return float("nan") if value is None else value
    return 0.0


@rule
class Pad(OpRule):
    """Positions added before and after an axis; negative pads cut."""

    ops = ("Pad",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        x = g.operand(node, 0)
        found = pads(node)
        if found is None:
            g.freeze(x, f"{name}: its pads are computed")
            return
        constant = node.attributes.get_string("mode", "constant") == "constant"
        result: Axes = {}
        for axis, factors in x.items():
            edges = found.get(axis, (0, 0))
            if edges == (0, 0):
                result[axis] = factors
                continue
            if edges is None or None in found.values():
                g.freeze(x, f"{name}: its pads are computed", only=(axis,))
                continue
            before, after = edges
            if not constant:
                g.freeze(x, f"{name}: copies positions of the axis to its border", only=(axis,))
            else:
                # What a norm is padded with stands for positions that are gone already.
                new = np.zeros_like if feeds_norm(node) else np.asarray
                head, tail = (new(g.table.fresh(max(count, 0))) for count in (before, after))
                kept = [_crop(vector, before, after) for vector in factors]
                first = np.concatenate([head, kept[0], tail])
                rest = [np.concatenate([0 * head, vector, 0 * tail]) for vector in kept[1:]]
                result[axis] = (first, *rest)
        g.set(node.outputs[0], result)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        found, value = pads(node) or {}, _pad_value(node)
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            before, after = found.get(axis) or (0, 0)
            if values is None:
                values = np.full(d.size(node.outputs[0], axis) - before - after, np.nan)
            kept = _crop(values, before, after)
            # Other axes that are padded put the padded value next to the dead one.
            elsewhere = any(edges != (0, 0) for other, edges in found.items() if other != axis)
            if elsewhere and node.attributes.get_string("mode", "constant") == "constant":
                kept = np.where(kept == value, kept, np.nan)
            d.set(node.outputs[0], axis, np.pad(kept, (max(before, 0), max(after, 0)), constant_values=value))

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        told, output = pads(node) or {}, node.outputs[0]
        found = {axis: edges for axis, edges in told.items() if edges is not None}
        changed = False
        for axis, (before, after) in found.items():
            mask, source_mask = r.mask(output, axis), r.operand_mask(node, 0, axis)
            if (before or after) and (mask is not None or source_mask is not None):
                found[axis] = (_left(mask, source_mask, before, False), _left(mask, source_mask, after, True))
                changed = True
        if not changed:
            return
        rank, ordered = _rank(node), sorted(found)
        flat = [found[axis][0] for axis in ordered] + [found[axis][1] for axis in ordered]
        if shapes.opset(node) < 11:
            full = [found.get(a, (0, 0))[side] for side in (0, 1) for a in range(rank)]
            node.attributes.add(ir.AttrInt64s("pads", full))
            return
        r.set_input(node, 1, np.asarray(flat, dtype=np.int64))
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            r.set_input(node, 3, np.asarray(ordered, dtype=np.int64))


def _crop(vector: Array, before: int, after: int) -> Array:
    return vector[max(-before, 0) : len(vector) - max(-after, 0)]


def _left(mask: Array | None, source: Array | None, pad: int, back: bool) -> int:
    """What a pad becomes: added positions that stay alive, or minus the cut positions that were still there."""
    if pad >= 0:
        return pad if mask is None else int((mask[len(mask) - pad :] if back else mask[:pad]).sum())
    if source is None:
        return pad
    return -int((source[pad:] if back else source[:-pad]).sum())
