"""Block-diagonal mixings carried from where they stand in a graph to the tensor whose channels they mix.

A wrapper mixes the channels that it reads, block by block. Behind movement (`flow`) these are channels of a start
tensor in some order, perhaps several times over (copies for grouped queries): the mixing of the start is then a set of
small matrices, one for each tuple of channels that stood in a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from graphopt.sparsity.moves import FOREIGN, Channels

Floats = npt.NDArray[np.float64]

MEETS = "its blocks mix channels that met different factors on the way (of several heads, for instance)"
ELSEWHERE = "a part of what it reads comes from elsewhere"
ASTRAY = "channels do not stay on the axis of the channels"


@dataclass
class Mixing:
    """Small matrices on tuples of channels; other channels are left as they are.

    Attributes:
        blocks: channels of the start -> (b, b), rows and columns in the order of the channels.
    """

    blocks: dict[tuple[int, ...], Floats] = field(default_factory=dict)
    _owner: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add(self, channels: Channels, axis: int, blocks: Floats) -> str | None:
        """Ask for the mixing of one more wrapper.

        Args:
            channels: what the wrapper reads.
            axis: of its channels.
            blocks: (count, b, b).

        Returns:
            Why what is asked for so far cannot be done to the start; None where it can.
        """
        count, size = blocks.shape[:2]
        placed = channels.on(axis, count * size)
        if placed is None:
            return ASTRAY
        labels, meeting = placed
        for index, block in enumerate(blocks):
            part = slice(index * size, (index + 1) * size)
            key = tuple(int(label) for label in labels[part])
            if FOREIGN in key:
                return ELSEWHERE
            if (meeting[part] != meeting[part][:1]).any():
                return MEETS
            if len(set(key)) < size:
                return "its blocks mix copies of one channel"
            known = {self._owner[label] for label in key if label in self._owner}
            if known and (known != {key} or not np.array_equal(self.blocks[key], block)):
                return "copies of one channel, or several readers, are mixed in different ways"
            self.blocks[key] = block
            self._owner.update(dict.fromkeys(key, key))
        return None

    def touches(self, channels: Channels) -> bool:
        """Whether a tensor holds channels that are mixed."""
        return not self._owner.keys().isdisjoint(np.unique(channels.labels).tolist())

    def within(self, size: int) -> bool:
        """Whether no matrix reaches over a multiple of `size`."""
        return all(len({label // size for label in key}) == 1 for key in self.blocks)

    def apply(self, rows: Floats) -> Floats:
        """M X for X (channels, n)."""
        made = rows.copy()
        for key, block in self.blocks.items():
            made[list(key)] = block @ rows[list(key)]
        return made

    def times(self, front: Floats) -> Floats | str:
        """M A for a block-diagonal A, (count, a, a), as blocks of the size of the larger of the two.

        Returns:
            The blocks, or why one wrapper would hold more numbers than the two.
        """
        count, a = front.shape[:2]
        sizes = {len(key) for key in self.blocks}
        for size in sorted({a, *(math.lcm(a, b) for b in sizes)}):
            if (count * a) % size == 0 and self.within(size) and size <= a + max(sizes):
                return self._on_grid(front, size)
        return "the blocks of the two do not nest"

    def _on_grid(self, front: Floats, size: int) -> Floats:
        count, a = front.shape[:2]
        made = np.zeros((count * a // size, size, size))
        for index, block in enumerate(front):
            grid, first = divmod(index * a, size)
            made[grid, first : first + a, first : first + a] = block
        before = made.copy()
        for key, block in self.blocks.items():
            rows = [label % size for label in key]
            made[key[0] // size, rows] = block @ before[key[0] // size, rows]
        return made


def taken_in(channels: Channels, axis: int, blocks: Floats, weight: Floats) -> Floats | str:
    """The weight of a layer that reads A s where it read y = A s: V A, the columns in the order in which it reads them.

    Args:
        channels: which channels of y the layer reads.
        axis: of its input channels.
        blocks: A, (count, b, b).
        weight: (groups, outputs per group, inputs per group, taps).

    Returns:
        The weight of the same shape, or why there is none.
    """
    size, per_group = blocks.shape[1], weight.shape[2]
    total = weight.shape[0] * per_group
    placed = channels.on(axis, total)
    if placed is None:
        return ASTRAY
    labels, meeting = placed
    _, met = np.unique(meeting, axis=0, return_inverse=True)
    made = weight.copy()
    members: dict[tuple[int, int, int], list[int]] = {}
    for place in np.flatnonzero(labels != FOREIGN).tolist():
        key = (int(labels[place]) // size, int(met.ravel()[place]), place // per_group)
        members.setdefault(key, []).append(place)
    for (index, _, group), places in members.items():
        order = [int(labels[place]) % size for place in places]
        if sorted(order) != list(range(size)):
            return MEETS.replace("its", "the wrapper's")
        columns = [place % per_group for place in places]
        # Rows and columns of the block in the order in which the layer reads the channels.
        block = blocks[index][np.ix_(order, order)]
        made[group][:, columns] = np.einsum("oat,ak->okt", weight[group][:, columns], block)
    return made


def through(blocks: Floats, bias: Floats, worst: float) -> Floats | str:
    """s with A s = bias, so that a bias behind a wrapper can stand in front of it.

    Args:
        blocks: A, (count, b, b).
        bias: (count b,).
        worst: condition number of a block beyond which the result would not be exact to rounding.
    """
    conditions = np.linalg.cond(blocks)
    if not (conditions < worst).all():
        return f"its bias cannot stand in front of it: a block has condition number {conditions.max():.0e}"
    return np.asarray(np.linalg.solve(blocks, bias.reshape(len(blocks), -1, 1)).ravel())
