"""Channel shuffles as gathers: Reshape, Transpose, Reshape that only permute one axis.

With C = c1 c2 ..., (.., C, ..) -> (.., c1, c2, .., ..) -> transposed among these -> (.., C, ..) gives y[i] = x[p[i]],
where p = transpose(reshape(0 .. C - 1)) flattened. One Gather with the constant p says the same, and says it channel
by channel: a reshape needs equal counts in every group that is left, an index does not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.edit import new_initializer, remove_node, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import graphs


@dataclass(frozen=True)
class Shuffle:
    """Three nodes that permute one axis.

    Attributes:
        nodes: Reshape, Transpose, Reshape.
        axis: what is permuted.
        parts: the sizes that the axis is split into; their product is its size.
        places: (size of the axis,) position of the input for each of the output.
    """

    nodes: tuple[ir.Node, ir.Node, ir.Node]
    axis: int
    parts: tuple[int, ...]
    places: npt.NDArray[np.int64]

    @property
    def source(self) -> ir.Value:
        """The tensor that is permuted."""
        value = self.nodes[0].inputs[0]
        assert value is not None  # a Reshape has one
        return value

    @property
    def name(self) -> str:
        """How reports name it: by its last node, whose name the Gather takes over."""
        return label(self.nodes[-1])


def shuffles(graph: ir.Graph) -> list[Shuffle]:
    """All shuffles of a graph; tensors between the three nodes are read by nothing else."""
    found = (shuffle_ending_in(node) for node in graph)
    return [shuffle for shuffle in found if shuffle is not None]


def shuffle_ending_in(last: ir.Node) -> Shuffle | None:
    """The shuffle whose second Reshape is `last`."""
    middle = _before(last, "Transpose") if is_onnx(last, "Reshape") else None
    first = _before(middle, "Reshape") if middle is not None else None
    if middle is None or first is None:
        return None
    before, split, after = _shape(first.inputs[0]), _shape(first.outputs[0]), _shape(last.outputs[0])
    if before is None or split is None or after is None or not _same(before, after):
        return None
    order = list(middle.attributes.get_ints("perm", ()) or range(len(split))[::-1])
    more = len(split) - len(before)
    for axis, size in enumerate(before):
        parts = [d for d in split[axis : axis + more + 1] if isinstance(d, int)]
        block = range(axis, axis + len(parts))
        if more < 1 or len(parts) != more + 1 or prod(parts) != size:
            continue
        if not _same(before[:axis] + before[axis + 1 :], split[:axis] + split[block.stop :]):
            continue
        inside = order[axis : block.stop]
        if sorted(inside) == list(block) and all(a < b for a, b in pairwise(k for k in order if k not in block)):
            places = np.arange(size).reshape(parts).transpose([k - axis for k in inside]).ravel()
            return Shuffle((first, middle, last), axis, tuple(parts), places)
    return None


def gather_shuffles(model: ir.Model, only: Collection[str] | None = None) -> list[str]:
    """Replace shuffles by Gathers, in place, also in bodies.

    Args:
        model: with inferred shapes.
        only: the names of those to replace; None: all.

    Returns:
        Their names.
    """
    names, done = Names(model), []
    for graph in graphs(model):
        for shuffle in shuffles(graph):
            if only is None or shuffle.name in only:
                done.append(shuffle.name)
                _gather(graph, shuffle, names)
    return done


def _gather(graph: ir.Graph, shuffle: Shuffle, names: Names) -> None:
    first, middle, last = shuffle.nodes
    output = last.outputs[0]
    index = new_initializer(graph, names.fresh(f"{output.name}_places"), shuffle.places, ir.DataType.INT64)
    gather = ir.Node(
        "",
        "Gather",
        [shuffle.source, index],
        [ir.AttrInt64("axis", shuffle.axis)],
        outputs=[ir.Value(name=names.fresh(f"{output.name}_gathered"), type=output.type, shape=output.shape)],
        name=last.name,
    )
    mark_origin(gather, [label(node) for node in shuffle.nodes])
    graph.insert_before(last, gather)
    output.replace_all_uses_with(gather.outputs[0], replace_graph_outputs=True)
    output.name, gather.outputs[0].name = gather.outputs[0].name, output.name
    for node in (last, middle, first):
        remove_node(node)


def _before(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node that makes the first input of `node`, for it alone and in the same graph."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.graph is not node.graph or not is_onnx(producer, op_type):
        return None
    return producer if sole_use(value) else None


def _shape(value: ir.Value | None) -> list[Any] | None:
    """Sizes: integers, names, None for an unnamed one."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _same(left: list[Any], right: list[Any]) -> bool:
    """True where the sizes agree; one may be unknown, for the number of elements is the same."""
    if len(left) != len(right):
        return False
    unsure = [(a, b) for a, b in zip(left, right, strict=True) if a is None or a != b]
    return len(unsure) <= 1 and not any(isinstance(a, int) and isinstance(b, int) for a, b in unsure)
