"""Channels between two grouped convolutions, put in an order in which those that can go together stand together.

    P  grouped convolution -> per-channel operators -> Gather -> per-channel operators -> Q  grouped convolution

A grouped convolution asks for equal counts in every group, of what it writes and of what it reads. Dense tensors say it
by positions: the same position in every group goes, and in P's order and in Q's order these sets are not the same, so
that little or nothing is left to go. But the order within a group is free: rows of P, columns of Q and the index of
the Gather can be permuted, exactly, so that the k-th positions of P's groups are the k-th positions of Q's groups.

Such sets are transversals: one channel of every group of P that are also one of every group of Q. With g groups of n
channels on both sides, count the channels of each pair of groups: a bipartite multigraph whose vertices all have n
edges. By Koenig's theorem (1916) it is the sum of n perfect matchings, and whichever is taken away leaves one of degree
n - 1, so they are found one after the other: the one of least weight first, so that weak channels stand together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import constant, float64
from graphopt.rewriting.edit import set_constant, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs

Order = npt.NDArray[np.int64]

PER_CHANNEL = (
    *("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
    *("Mish", "Relu", "Selu", "Sigmoid", "Softplus", "Tanh"),
)
"""Operators that treat all channels alike."""


@dataclass(frozen=True)
class Crossing:
    """Two grouped convolutions with a permutation between them.

    Attributes:
        writer, reader: P and Q.
        gather: the permutation.
        before, after: nodes between P and the Gather, and between it and Q, with a slice of weights for each channel.
        groups: of both.
    """

    writer: ir.Node
    reader: ir.Node
    gather: ir.Node
    before: tuple[ir.Node, ...]
    after: tuple[ir.Node, ...]
    groups: int


def order_transversals(model: ir.Model) -> list[str]:
    """Order the channels of every crossing, in place; exact. Returns the names of the Gathers."""
    names, done = Names(model), []
    for graph in graphs(model):
        for crossing in list(crossings(graph)):
            _apply(crossing, names)
            done.append(label(crossing.gather))
    return done


def crossings(graph: ir.Graph) -> Iterator[Crossing]:
    """All crossings of a graph whose weights can be permuted."""
    for gather in graph:
        index = constant(gather.inputs[1]) if is_onnx(gather, "Gather") else None
        if index is None or gather.attributes.get_int("axis", 0) != 1:
            continue
        up, down = _walk(gather, forward=False), _walk(gather, forward=True)
        if up is None or down is None:
            continue
        (writer, before), (reader, after) = up, down
        groups, size = _groups(writer), len(index.numpy().ravel())
        permuted = np.array_equal(np.sort(index.numpy().ravel()), np.arange(size))
        if permuted and groups == _groups(reader) > 1 and size % groups == 0 and size == _shape(writer)[0]:
            yield Crossing(writer, reader, gather, before, after, groups)


def transversals(pairs: Order, groups: int, weight: npt.NDArray[np.float64]) -> Order:
    """Which transversal each channel belongs to.

    Args:
        pairs: (2, channels) group of each channel on either side; every group has equally many.
        groups: how many there are, on both sides.
        weight: (channels,) what it would harm to lose one; light ones come first.

    Returns:
        (channels,) numbers from 0; every number occurs once in every group of either side.
    """
    from scipy.optimize import linear_sum_assignment

    cells: dict[tuple[int, int], list[int]] = {}
    for channel in np.argsort(-weight, kind="stable"):  # the lightest of a cell is last
        cells.setdefault((int(pairs[0, channel]), int(pairs[1, channel])), []).append(int(channel))
    top = float(weight.sum()) + 1.0
    found = np.zeros(pairs.shape[1], dtype=np.int64)
    for number in range(pairs.shape[1] // groups):
        price = np.full((groups, groups), groups * top)  # more than any perfect matching of what is left
        for cell, channels in cells.items():
            if channels:
                price[cell] = weight[channels[-1]]
        for row, column in zip(*linear_sum_assignment(price), strict=True):
            found[cells[int(row), int(column)].pop()] = number
    return found


def _apply(crossing: Crossing, names: Names) -> None:
    writer, reader, gather, groups = crossing.writer, crossing.reader, crossing.gather, crossing.groups
    index = constant(gather.inputs[1])
    assert index is not None  # crossings looked at it
    places = index.numpy().ravel().astype(np.int64)
    rows, columns = float64(writer.inputs[1]), float64(reader.inputs[1])
    assert rows is not None
    assert columns is not None
    size = len(places)
    each = size // groups
    # the channel at place i behind the Gather is the one at places[i] before it
    behind = np.arange(size) // each
    pairs = np.stack([places // each, behind])
    read = np.square(columns).reshape(groups, -1, each, int(np.prod(columns.shape[2:]))).sum(axis=(1, 3)).ravel()
    power = np.square(rows).reshape(size, -1).sum(axis=1)[places] * read
    number = transversals(pairs, groups, power / (power.max() or 1.0))
    after = np.lexsort((number, behind))
    by_source = np.empty(size, dtype=np.int64)
    by_source[places] = number
    before = np.lexsort((by_source, np.arange(size) // each))
    position = np.argsort(before)  # where a channel before the Gather is now
    for node in (writer, *crossing.before):
        _permute_rows(node, before, names)
    for node in crossing.after:
        _permute_rows(node, after, names)
    set_constant(gather, 1, position[places[after]], names, [label(gather)])
    within = after.reshape(groups, each) % each
    old = constant(reader.inputs[1])
    assert old is not None
    blocks = old.numpy().reshape(groups, -1, *old.numpy().shape[1:])
    new = np.concatenate([block[:, order] for block, order in zip(blocks, within, strict=True)])
    set_constant(reader, 1, new, names, [label(reader)])


def _permute_rows(node: ir.Node, order: Order, names: Names) -> None:
    """Permute everything that a node holds by output channel: filters and bias, or the vectors of a normalisation."""
    for place in range(1, len(node.inputs)):
        held = constant(node.inputs[place])
        if held is not None and len(held.shape) and held.shape[0] == len(order):
            set_constant(node, place, held.numpy()[order], names, [label(node)])


def _walk(gather: ir.Node, *, forward: bool) -> tuple[ir.Node, tuple[ir.Node, ...]] | None:
    """The grouped convolution next to a Gather, and the nodes on the way that hold something by channel."""
    held: list[ir.Node] = []
    node: ir.Node | None = gather
    while node is not None:
        value = node.outputs[0] if forward else node.inputs[0]
        use = sole_use(value) if value is not None else None
        if value is None or use is None or (forward and use.idx != 0):
            return None
        node = use.node if forward else value.producer()
        if node is None or node.graph is not gather.graph:
            return None
        if is_onnx(node, *PER_CHANNEL):
            continue
        if is_onnx(node, "BatchNormalization") and len(node.outputs) == 1 and _own(node):
            held.append(node)
        elif is_onnx(node, "Conv") and _own(node):
            if _groups(node) != _shape(node)[0] or _shape(node)[1] != 1:
                return node, tuple(held)
            held.append(node)
        else:
            return None
    return None


def _own(node: ir.Node) -> bool:
    """True where all operands but the first are constants, and no other node reads its filters."""
    held = [value for value in node.inputs[1:] if value is not None]
    return all((t := constant(v)) is not None and (len(t.shape) < 2 or sole_use(v) is not None) for v in held)


def _groups(node: ir.Node) -> int:
    return int(node.attributes.get_int("group", 1) or 1)


def _shape(node: ir.Node) -> tuple[int, ...]:
    """Of the weight."""
    weight = constant(node.inputs[1])
    return tuple(weight.shape.numpy()) if weight is not None else ()
