"""Norms over groups of channels, written out or as one operator, from which single channels go.

    y = gamma (x - m) / sqrt(v + epsilon) + beta        m, v: over all positions of all channels of a group

A dead channel is zero, and its zeros enter m and v; its gamma and beta go with it, as in
`graphopt.analysis.ops.layer_norm`. So what is left is spread over the dense width again, zeros where channels died,
normalised as before, and taken back. Groups that lost all channels are dropped, and where all others are whole nothing
is spread. Which channels go is free: groups need not lose the same places, nor equally many, which matters where one
tensor is grouped twice, by itself and behind a Concat.

Exporters write the norm as a Reshape of each group to one channel, an InstanceNormalization, the Reshape back, and a
gain for each true channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.centred import has_gain_behind, only_reader, standard
from graphopt.analysis.padding import cannot_pad
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, where
from graphopt.analysis.size_vectors import set_entries, set_sizes

Mask = npt.NDArray[np.bool_]
WHOLE = "graphopt.whole_groups"
"""Key in `metadata_props` of a norm whose groups only go whole."""


def keep_groups_whole(model: ir.Model) -> None:
    """Mark all norms of a model, in place: a torch module has no zeros to put between its channels."""
    for node in model.graph.all_nodes():
        if node.op_type in {"InstanceNormalization", "GroupNormalization"}:
            node.metadata_props[WHOLE] = "1"


@dataclass(frozen=True)
class Spread:
    """What a removal makes of channels in groups.

    Attributes:
        groups: (groups,), which keep a channel.
        index: for each place in these groups, which of the channels that are left stands there, counted from 0; a
            place that lost its own has their number.
        places: (channels left,), where each of them stands.
    """

    groups: Mask
    index: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]

    @property
    def whole(self) -> bool:
        """Whether groups that keep a channel keep all."""
        return len(self.places) == len(self.index)

    @property
    def in_front(self) -> bool:
        """Whether all zeros stand behind what is left."""
        return bool((self.places == np.arange(len(self.places))).all())


def spread(mask: Mask, groups: int) -> Spread:
    """How the channels of `mask` that stay fill the groups; in a single one they move to the front."""
    rows = mask.reshape(groups, -1)
    alive: Mask = np.asarray(rows.any(axis=1))
    kept = rows[alive]
    if len(kept) == 1:
        kept = np.sort(kept, axis=1)[:, ::-1]
    flat = kept.ravel()
    return Spread(alive, np.where(flat, np.cumsum(flat) - 1, flat.sum()), np.flatnonzero(flat))


def spread_operand(node: ir.Node, plan: Spread, r: Removal) -> None:
    """Put zeros between the channels that are left of a node's first operand."""
    if plan.whole:
        return
    missing = len(plan.index) - len(plan.places)
    r.pad_operand(node, 0, {1: missing if plan.in_front else 1})
    if not plan.in_front:
        r.insert_gather(node, 1, plan.index)


def take_result(node: ir.Node, plan: Spread, r: Removal) -> None:
    """Take the channels that are left from a node's first result."""
    if plan.whole:
        return
    if plan.in_front:
        r.cut_output(node, 0, {1: len(plan.places)})
    else:
        r.take_output(node, 1, plan.places)
    _annotate(node.outputs[0], len(plan.index))  # not before: other rules still see the dense sizes


@dataclass(frozen=True)
class WrittenNorm:
    """A group norm as exporters write it: [n, C, ...] enters as [n, groups, ...] and leaves as [n, C, ...]."""

    enter: ir.Node
    norm: ir.Node
    leave: ir.Node
    groups: int

    def label(self, node: ir.Node, g: Labeller) -> None:
        """Labels of what one of the Reshapes gives: channels pass, all positions within a group are judged together."""
        source = self.enter.inputs[0]
        x = g.of(source)
        if node is self.leave:
            g.of(node.inputs[0])
            g.set(node.outputs[0], {axis: x[axis] for axis in (0, 1) if axis in x})
            return
        g.freeze(x, f"{where(self.norm)}: the axis is normalised over", but=(0, 1))
        if 1 in x:
            g.sink(node, 0, 1, "zero", f"{where(self.norm)}: normalises a value that is not zero")
        g.set(node.outputs[0], {0: x[0]} if 0 in x else {})

    def rewrite(self, r: Removal) -> None:
        """Change all three nodes, the sizes of the Reshapes included."""
        set_sizes(r, self.enter, 1, (0,))
        mask = r.mask(self.leave.outputs[0], 1)
        if mask is None:
            return
        plan = spread(mask, self.groups)
        count = int(plan.groups.sum())
        spread_operand(self.enter, plan, r)
        if count < self.groups:
            for index in (1, 2):
                r.change_operand(self.norm, index, lambda array: array[plan.groups])
            for node, size in ((self.enter, count), (self.leave, len(plan.index))):
                _size_channels(node, size, r)
            for node in (self.enter, self.norm):
                _annotate(node.outputs[0], count)
        set_sizes(r, self.leave, 1, (0,))
        take_result(self.leave, plan, r)


def written_norm(node: ir.Node) -> WrittenNorm | None:
    """The group norm that a Reshape or InstanceNormalization is part of, with a gain for each channel; else None."""
    found = (_around(norm) for norm in _norms(node))
    return next((each for each in found if each is not None), None)  # one at most: see `_around`


def _around(norm: ir.Node) -> WrittenNorm | None:
    """The group norm of an InstanceNormalization; its first Reshape has no other reader, and its last a gain behind."""
    enter, leave = standard(norm.inputs[0], "Reshape"), only_reader(norm)
    if enter is None or leave is None or leave.op_type != "Reshape" or only_reader(enter) is not norm:
        return None
    source = enter.inputs[0]
    if source is None or any(shapes.constant_tensor(v) is not None for v in (source, leave.inputs[0])):
        return None
    sizes = [shapes.dims(value) for value in (source, enter.outputs[0], leave.outputs[0])]
    if any(dims is None or len(dims) < 2 or dims[0] is None for dims in sizes):
        return None
    (batch, channels), (inside, groups), after = ((dims or ())[:2] for dims in sizes)
    if not isinstance(channels, int) or not isinstance(groups, int) or not groups or channels % groups:
        return None
    if inside != batch or after != (batch, channels) or len(sizes[0] or ()) != len(sizes[2] or ()):
        return None
    if any(shapes.constant_tensor(value) is None for value in norm.inputs[1:3]):
        return None
    fits = has_gain_behind(norm) and cannot_pad(norm) is None and WHOLE not in norm.metadata_props
    return WrittenNorm(enter, norm, leave, groups) if fits else None


def _norms(node: ir.Node) -> Iterator[ir.Node]:
    """The InstanceNormalization at a node, or those before it and behind it, as one norm may follow another."""
    if node.op_type == "InstanceNormalization":
        yield node
        return
    for near in (standard(node.inputs[0], "InstanceNormalization"), only_reader(node)):
        if near is not None and near.op_type == "InstanceNormalization":
            yield near


def _size_channels(node: ir.Node, size: int, r: Removal) -> None:
    """Write the size of axis 1 into the target of a Reshape, unless it is copied or what is left."""
    target = node.inputs[1]
    known = shapes.elements(target)
    entry = None if known is None else known[1]
    if not isinstance(entry, int) or entry > 0:
        set_entries(r, node, 1, {1: size}, len(shapes.dims(node.outputs[0]) or ()))


def _annotate(value: ir.Value, size: int) -> None:
    """Record the size of axis 1 of a value that the analysis knows by no name."""
    sizes = list(value.shape or ())
    sizes[1] = size
    value.shape = ir.Shape(sizes)
