"""Branches: parts of a graph that only feed one operand of a sum, and can go together with it.

    x + f(x)  ->  x + c,        c = E f(x), one number a channel

A branch is found without patterns: the largest set of nodes all of whose results end in one operand of an Add. It can
go if the other operand has the shape of the sum, and if every graph input that reaches the branch also reaches the
other operand, so that everything stays connected. What is left of the sum is made as small as possible:

- where x comes from a linear layer (alone or as a sum) and nothing else reads it, c goes into that layer's bias and the
  sum disappears; the layer can then be refitted to what the sum was (its *writer*);
- where moreover the same idempotent activation stands before the branch and behind the sum (Relu in residual networks),
  one of the two is enough: relu(relu(z) + c) becomes relu(z + c), which is another function where z < 0, and what a
  refit of the writer is for;
- elsewhere the constant is added.

What stays takes over the names of what it stands for, so that tensors of both models can still be compared by name.
The idea of removing whole operators: Chen et al., OTOv3, arXiv:2312.09411, section 3 ("erasing"), there in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.rules import node_key
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import cannot_replace, new_initializer, remove_node, replace_value, sole_use
from graphopt.rewriting.layers import Layer, layers_of
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies

IDEMPOTENT = ("Relu", "Clip")


@dataclass(frozen=True)
class Branch:
    """Something that can be erased.

    Attributes:
        total: name of the sum's result.
        operand: which operand of the sum the branch is.
        output: name of that operand.
        axis: its channel axis.
        nodes: keys of the nodes of the branch.
        label: for messages: its last linear layer.
    """

    total: str
    operand: int
    output: str
    axis: int
    nodes: frozenset[str]
    label: str


@dataclass(frozen=True)
class Erased:
    """What became of a sum.

    Attributes:
        writer: key of the layer that took over the mean and can be refitted; "" where a constant is added.
        key: the writer's key from now on (where its own output is the stream, that has another name now).
        stream: the tensor that the writer ends in, by its name before.
        total: the sum; where there is a writer, what it ends in has this name now.
        relu: only what is above zero counts there.
    """

    writer: str = ""
    key: str = ""
    stream: str = ""
    total: str = ""
    relu: bool = False


def find_branches(model: ir.Model) -> list[Branch]:
    """All branches of the main graph that can go, in graph order. Shapes must have been inferred."""
    layers, _ = layers_of(model)
    place = {node: number for number, node in enumerate(model.graph)}
    sources = _sources(model)
    found = []
    for node in model.graph:
        if not is_onnx(node, "Add") or None in node.inputs or any(constant(v) is not None for v in node.inputs):
            continue
        for operand in (0, 1):
            branch, other, total = node.inputs[operand], node.inputs[1 - operand], node.outputs[0]
            assert branch is not None and other is not None
            if other.shape is None or other.shape != total.shape or branch.shape != total.shape:
                continue
            region = _region(branch, node, operand, place)
            inside = [layer for layer in layers.values() if layer.linear.node in region]
            if not inside or sources.get(branch, frozenset()) - sources.get(other, frozenset()):
                continue
            last = _last_layer(branch, region, layers)
            if last is None or total.shape is None:
                continue
            keys = frozenset(node_key(n) for n in region)
            axis = last.channel_axis(len(total.shape))
            found.append(Branch(total.name or "", operand, branch.name or "", axis, keys, last.label))
    return found


def erase(model: ir.Model, branch: Branch, mean: npt.NDArray[np.float64]) -> Erased:
    """Put a constant in the place of a branch, in place.

    Args:
        model: has the branch.
        branch: of this model, as `find_branches` tells it.
        mean: (channels,), what the branch is on average.

    Raises:
        KeyError: the model has no such sum.
    """
    add = next((n for n in model.graph if n.outputs[0].name == branch.total and is_onnx(n, "Add")), None)
    if add is None:
        raise KeyError(branch.total)
    stream, total = add.inputs[1 - branch.operand], add.outputs[0]
    place = {node: number for number, node in enumerate(model.graph)}
    gone = add.inputs[branch.operand]
    assert stream is not None and gone is not None
    region = _region(gone, add, branch.operand, place)
    left = {use.node for use in stream.uses()} - region
    plain = left == {add} and not stream.is_graph_output()
    front, behind = stream.producer(), _behind(total)
    writer: Layer | None = None
    if plain and front is not None and behind is not None and _same(front, behind):
        source = front.inputs[0]
        assert source is not None
        writer = _writer(source, model) if sole_use(source) is not None else None
        if writer is not None and cannot_replace(behind.outputs[0], stream) is None:
            before, name, relu = writer.key, source.name or "", is_onnx(front, "Relu")
            _take_over(behind, stream)
            add.replace_input_with(branch.operand, None)
            _take_over_unread(add, source)
            _remove(region, place)
            _shift(writer, mean)
            return Erased(before, writer.key, name, branch.total, relu)
    if plain and (writer := _writer(stream, model)) is not None and cannot_replace(total, stream) is None:
        before, name = writer.key, stream.name or ""
        relu = bool(total.uses()) and all(is_onnx(use.node, "Relu") for use in total.uses())
        add.replace_input_with(branch.operand, None)
        _take_over(add, stream)
        _remove(region, place)
        _shift(writer, mean)
        return Erased(before, writer.key, name, branch.total, relu)
    assert total.shape is not None
    shape = [1] * len(total.shape)
    shape[branch.axis] = len(mean)
    held = new_initializer(
        model.graph, Names(model).fresh(f"{branch.output}_mean"), mean.reshape(shape), gone.dtype or ir.DataType.FLOAT
    )
    add.replace_input_with(branch.operand, held)
    _remove(region, place)
    return Erased(total=branch.total)


def _region(value: ir.Value, add: ir.Node, operand: int, place: Mapping[ir.Node, int]) -> set[ir.Node]:
    """Nodes whose results all end in one operand of a sum."""
    region: set[ir.Node] = set()
    pending = {value.producer()}
    while pending:
        node = max(pending, key=lambda n: place.get(n, -1) if n is not None else -1)
        pending.remove(node)
        if node is None or node not in place or next(bodies(node), None) is not None:
            continue
        ends = all(
            (use.node in region or (use.node is add and use.idx == operand)) and not result.is_graph_output()
            for result in node.outputs
            for use in result.uses()
        )  # fmt: skip
        if ends and not any(result.is_graph_output() for result in node.outputs):
            region.add(node)
            pending |= {v.producer() for v in node.inputs if v is not None} - region
    return region


def _sources(model: ir.Model) -> dict[ir.Value, frozenset[str]]:
    """The graph inputs that reach each value."""
    from graphopt.slicing import reads_of

    found: dict[ir.Value, frozenset[str]] = {v: frozenset({v.name or ""}) for v in model.graph.inputs}
    for node in model.graph:
        reach: frozenset[str] = frozenset().union(*(found.get(v, frozenset()) for v in reads_of(node)))
        for value in node.outputs:
            found[value] = reach
    return found


def _last_layer(value: ir.Value, region: set[ir.Node], layers: Mapping[str, Layer]) -> Layer | None:
    """The linear layer of a branch that is nearest to its end and of the same rank."""
    nodes = {layer.linear.node: layer for layer in layers.values()}
    pending, seen = [value.producer()], set[ir.Node]()
    while pending:
        node = pending.pop(0)
        if node is None or node not in region or node in seen:
            continue
        seen.add(node)
        layer = nodes.get(node)
        shape = None if layer is None else layer.linear.output.shape
        if layer is not None and shape is not None and value.shape is not None and len(shape) == len(value.shape):
            return layer
        pending += [v.producer() for v in node.inputs if v is not None]
    return None


def _behind(total: ir.Value) -> ir.Node | None:
    """The activation that alone reads a sum."""
    use = sole_use(total)
    return use.node if use is not None and is_onnx(use.node, *IDEMPOTENT) else None


def _same(one: ir.Node, other: ir.Node) -> bool:
    """The same operator with the same constants."""
    if not is_onnx(one, other.op_type) or one.op_type not in IDEMPOTENT or len(one.inputs) != len(other.inputs):
        return False
    if {k: a.value for k, a in one.attributes.items()} != {k: a.value for k, a in other.attributes.items()}:
        return False
    for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True):
        first, second = constant(a), constant(b)
        if (a is None) != (b is None):
            return False
        if a is not None and (first is None or second is None or first.numpy() != second.numpy()):
            return False
    return True


def _writer(value: ir.Value, model: ir.Model) -> Layer | None:
    """The layer that makes a tensor, or the latest one that enters it as a sum; one with a bias and no other reader."""
    outputs = {layer.output: layer for layer in layers_of(model)[0].values() if layer.has_bias}
    if value.name in outputs:
        return outputs[value.name]
    node = value.producer()
    if node is None or not is_onnx(node, "Add"):
        return None
    order = {n: i for i, n in enumerate(model.graph)}
    entering = [v for v in node.inputs if v is not None and v.name in outputs and sole_use(v) is not None]
    if not entering or any(v is not None and v.shape != value.shape for v in entering):
        return None
    last = max(entering, key=lambda v: order.get(p, -1) if (p := v.producer()) is not None else -1)
    return outputs[last.name or ""]


def _shift(writer: Layer, mean: npt.NDArray[np.float64]) -> None:
    writer.store(writer.weight(), writer.bias() + mean)


def _take_over(node: ir.Node, value: ir.Value) -> None:
    """A node goes; a value takes its place and its name."""
    name = node.outputs[0].name
    replace_value(node.outputs[0], value)
    _drop(node, value, name)


def _take_over_unread(node: ir.Node, value: ir.Value) -> None:
    """A node that nobody reads goes; a value takes its name."""
    _drop(node, value, node.outputs[0].name)


def _drop(node: ir.Node, value: ir.Value, name: str | None) -> None:
    node.outputs[0].name = f"{name}_erased"
    remove_node(node)
    value.name = name


def _remove(region: set[ir.Node], place: Mapping[ir.Node, int]) -> None:
    for node in sorted(region, key=lambda n: -place[n]):
        remove_node(node)


def in_graph_order(branches: Sequence[Branch], model: ir.Model) -> list[Branch]:
    """Branches by the place of their sums."""
    place = {v.name: i for i, node in enumerate(model.graph) for v in node.outputs}
    return sorted(branches, key=lambda b: place[b.total])
