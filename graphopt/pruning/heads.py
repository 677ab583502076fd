"""Which channels form the heads of attention, and the change of basis inside a head that makes it easy to shorten.

Two products leave a basis free. Scores q . k between the outputs of two layers (queries and keys), and what a layer
reads of a head, W_o (P V), where P mixes positions and not channels: A on one side and B with A B^T = I on the other
change nothing (`graphopt.numerics.product`). Turned so, component j of every head matters less than component j - 1,
and leaving out the last ones is the best approximation of that rank. Turning is exact; it is done before units are
ranked and taken back where nothing was removed.

For scores under a Softmax the mean of the keys does not count, it shifts all scores of a query alike. Where something
else than movement or scaling stands between a layer and the product (rotary embedding, normalised queries), there is no
such freedom and the head keeps its basis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.rules import node_key
from graphopt.pruning.routes import Stop, carried, stops
from graphopt.rewriting.constants import constant
from graphopt.rewriting.layers import Layer
from graphopt.rewriting.nodes import is_onnx

Array = npt.NDArray[Any]
Channels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Channels of a head as one layer has them.

    Attributes:
        layer: key of the layer.
        side: "rows": its outputs; "columns": its inputs.
        channels: (d,), in the order of the head's components.
    """

    layer: str
    side: Literal["rows", "columns"]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """A product of two factors of dimension d whose basis is free.

    Attributes:
        product: name of the tensor that attention computes from them.
        left: makers of the left factor: queries (several where they share keys), or values.
        right: keys, or the layers that read the head (several where it was copied).
        centred: the mean of `right` (scores) or of `left` (values) does not count.
    """

    product: str
    left: tuple[Part, ...]
    right: tuple[Part, ...]
    centred: bool

    @property
    def scores(self) -> bool:
        """Queries and keys; otherwise values and their readers."""
        return self.right[0].side == "rows"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Both sides."""
        return self.left + self.right


def find_heads(model: ir.Model, layers: Mapping[str, Layer], feeds: Mapping[str, Array]) -> list[Head]:
    """Heads whose basis is free.

    Args:
        model: the model, shapes inferred.
        layers: its linear layers.
        feeds: one small sample; movement is followed by running it.
    """
    makers = {k: found for k, layer in layers.items() if _free(layer) and (found := stops(layer.linear.output))}
    products = [n for n in model.graph if is_onnx(n, "MatMul") and all(constant(v) is None for v in n.inputs)]
    wanted = {(n, i) for n in products for i in (0, 1)}
    makers = {k: s for k, s in makers.items() if any((stop.node, stop.index) in wanted for stop in s)}
    if not makers:
        return []
    shapes = _shapes(model, [*(layers[k].output for k in makers), *(n.outputs[0].name or "" for n in products)], feeds)
    arriving: dict[tuple[ir.Node, int], tuple[str, Channels]] = {}
    taken: dict[str, list[tuple[Stop, Channels]]] = {}
    for key, places in makers.items():
        layer = layers[key]
        numbers = _numbered(shapes[layer.output], layer.channel_axis(len(shapes[layer.output])))
        moved = carried(model, layer.output, numbers, [p.value for p in places], feeds)
        taken[key] = list(zip(places, moved, strict=True))
        arriving.update({(p.node, p.index): (key, c) for p, c in taken[key] if p.node is not None})
    readers = {layer.linear.node: layer for layer in layers.values() if _free(layer) and layer.kernel == 1}
    heads: list[Head] = []
    for node in products:
        left, right = arriving.get((node, 0)), arriving.get((node, 1))
        if left is not None and right is not None:
            heads += _scores(node, left, right)
        elif right is not None:
            heads += _values(model, node, right, readers, shapes[node.outputs[0].name or ""], feeds)
    return [h for h in heads if all(_only_here(p, taken) for p in h.parts if p.side == "rows")]


def _free(layer: Layer) -> bool:
    """Ungrouped, and its weight is read by nothing else."""
    weight = layer.linear.node.inputs[1]
    return layer.groups == 1 and not layer.stuffing and weight is not None and len(list(weight.uses())) == 1


def _shapes(model: ir.Model, names: list[str], feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    from graphopt.executor import Session

    with Session(model, outputs=list(dict.fromkeys(names))) as session:
        return {name: tuple(array.shape) for name, array in session.run(feeds).items()}


def _numbered(shape: tuple[int, ...], axis: int) -> Channels:
    """The position along an axis, everywhere."""
    line = np.arange(shape[axis]).reshape([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])
    return np.broadcast_to(line, shape)


def _rows(numbers: Channels, along: int) -> Channels | None:
    """(..., d): the channels along the other one of the last two axes; None where they change along `along`."""
    if numbers.ndim < 2 or (numbers < 0).any():
        return None
    first = np.take(numbers, 0, axis=along)
    return first if (numbers == np.expand_dims(first, along)).all() else None


def _scores(node: ir.Node, left: tuple[str, Channels], right: tuple[str, Channels]) -> Iterator[Head]:
    """Queries and keys."""
    one, two = _rows(left[1], -2), _rows(right[1], -1)
    if one is None or two is None:
        return
    d = one.shape[-1]
    lead = np.broadcast_shapes(one.shape[:-1], two.shape[:-1])
    ones, twos = (np.broadcast_to(x, (*lead, d)).reshape(-1, d).tolist() for x in (one, two))
    pairs = {(tuple(a), tuple(b)) for a, b in zip(ones, twos, strict=True)}
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for a, b in sorted(pairs):
        groups.setdefault(b, []).append(a)
    if not _disjoint([a for a, _ in pairs]) or not _disjoint(list(groups)):
        return
    for b, several in groups.items():
        parts = tuple(Part(left[0], "rows", a) for a in several)
        yield Head(node_key(node), parts, (Part(right[0], "rows", b),), _under_softmax(node.outputs[0]))


def _values(
    model: ir.Model,
    node: ir.Node,
    right: tuple[str, Channels],
    readers: Mapping[ir.Node, Layer],
    shape: tuple[int, ...],
    feeds: Mapping[str, Array],
) -> Iterator[Head]:
    """Values and the layers that read what attention makes of them."""
    rows = _rows(right[1], -2)
    ends = stops(node.outputs[0])
    if rows is None or not ends or any(e.node not in readers or e.index != 0 for e in ends):
        return
    # every component of the product is a mixture of one channel of the values: its number travels on
    numbers = np.broadcast_to(np.expand_dims(rows, -2), shape)
    found = carried(model, node.outputs[0].name or "", numbers, [e.value for e in ends], feeds)
    heads = {tuple(map(int, row)) for row in rows.reshape(-1, rows.shape[-1])}
    columns: dict[tuple[int, ...], list[Part]] = {head: [] for head in sorted(heads)}
    if not _disjoint(list(heads)):
        return
    for end, moved in zip(ends, found, strict=True):
        assert end.node is not None
        layer = readers[end.node]
        last = np.moveaxis(moved, layer.channel_axis(moved.ndim), -1).reshape(-1, layer.linear.inputs)
        if (last < 0).any() or (last != last[:1]).any():
            return
        for head, parts in columns.items():
            places = [np.flatnonzero(last[0] == channel) for channel in head]
            if len({len(p) for p in places}) != 1 or not len(places[0]):
                return
            parts += [Part(layer.key, "columns", tuple(map(int, copy))) for copy in np.stack(places, axis=1)]
    for head, parts in columns.items():
        yield Head(node_key(node), (Part(right[0], "rows", head),), tuple(parts), centred=True)


def _disjoint(rows: Sequence[tuple[int, ...]]) -> bool:
    """No channel twice, in a row or in two different ones."""
    every = [c for row in set(rows) for c in row]
    return len(every) == len(set(every))


def _only_here(part: Part, taken: Mapping[str, list[tuple[Stop, Channels]]]) -> bool:
    """The channels end in one place: nothing else sees the basis change."""
    ends = [numbers for _, numbers in taken[part.layer]]
    return sum(bool((numbers < 0).any() or np.isin(numbers, part.channels).any()) for numbers in ends) == 1


def _under_softmax(value: ir.Value) -> bool:
    """Scores reach a Softmax over the keys through masks and constant factors alone."""
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return False
        node, index = uses[0].node, uses[0].idx
        if is_onnx(node, "Softmax"):
            rank = None if value.shape is None else len(value.shape)
            return node.attributes.get_int("axis", -1) in {-1, None if rank is None else rank - 1}
        factor = constant(node.inputs[1 - index]) if is_onnx(node, "Mul", "Div") else None
        scaled = factor is not None and factor.size == 1 and (index == 0 or node.op_type == "Mul")
        masked = is_onnx(node, "Add", "Sub") or (is_onnx(node, "Where") and index > 0)
        if not scaled and not masked:
            return False
        value = node.outputs[0]
