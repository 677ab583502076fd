"""How passes change a graph: new constants, readers that get another value, nodes that go.

Three rules hold in every helper. A use inside an If, Loop or Scan body counts as a use: onnx_ir links inner nodes to
the outer value object, so `Value.uses()` sees them. A value that a graph declares as its output keeps its name. Names
of nodes and parameters stay, and a new name is derived from the old ones only, so that equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.spill import held
from graphopt.rewriting.constants import constant
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin


class Usage(Protocol):
    """One place where a value is read (what `ir.Value.uses()` yields)."""

    @property
    def node(self) -> ir.Node:
        """The reader."""

    @property
    def idx(self) -> int:
        """Which of its inputs."""


def sole_use(value: ir.Value) -> Usage | None:
    """The one use of `value`; None where there are more or none, or where a graph gives it out."""
    uses = tuple(value.uses())
    return uses[0] if len(uses) == 1 and not value.is_graph_output() else None


def new_initializer(graph: ir.Graph, name: str, data: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
    """Register `data`, cast to `dtype`, as an initializer of `graph`; `name` must be free."""
    tensor = held(np.asarray(data).astype(dtype.numpy(), order="C"), dtype, name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(data.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_constant(node: ir.Node, index: int, data: npt.NDArray[Any], names: Names, origin: Iterable[str]) -> None:
    """Let input `index` of `node`, a constant, hold `data` (cast to the dtype it had).

    A parameter that only this input reads is changed under its name. Otherwise the other readers keep theirs and this
    input gets a private one: refuse before calling (`sole_use`) where that would duplicate a weight.
    """
    old = node.inputs[index]
    tensor = constant(old)
    if old is None or tensor is None or node.graph is None:
        raise ModelError(f"input {index} is not a constant", where=label(node))
    if old.is_initializer() and sole_use(old):
        old.const_value = held(np.asarray(data).astype(tensor.dtype.numpy(), order="C"), tensor.dtype, old.name)
        old.shape = ir.Shape(data.shape)
        mark_origin(old, origin)
        return
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise ModelError("nodes of model-local functions cannot hold initializers", where=label(node))
    wanted = str(old.name)
    new = new_initializer(graph, names.fresh(wanted), data, tensor.dtype)
    mark_origin(new, [wanted, *origin])
    node.replace_input_with(index, new)
    drop_if_unused(old)


def drop_if_unused(value: ir.Value | None) -> None:
    """Remove a constant that nobody reads: the initializer, or the Constant node."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node = value.producer()
    if node is not None and is_onnx(node, "Constant") and node.graph is not None:
        node.graph.remove(node, safe=True)
    elif value.is_initializer() and value.graph is not None:
        value.graph.initializers.pop(str(value.name))


def cannot_replace(old: ir.Value, new: ir.Value) -> str | None:
    """Why `new` cannot stand for `old`; None where it can. The report groups nodes by reason, so it names no value."""
    if not old.is_graph_output():
        return None
    graph, producer = old.graph, new.producer()
    if graph is None or new.is_graph_input() or producer is None:
        return "its result is a graph output and what it reads a graph input or a constant"
    if new.is_graph_output():
        return "its result and what would replace it are both graph outputs"
    if producer.graph is not graph:
        return "its result is an output of this body and what would replace it is computed outside it"
    if sum(output is old for output in graph.outputs) > 1:
        return "its result is given out twice"
    return None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`; a graph output keeps its name. `cannot_replace` must allow it."""
    if old.type is not None and new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = f"{name}_replaced"
        new.name = name
        return
    old.replace_all_uses_with(new)


def remove_node(node: ir.Node) -> None:
    """Take a node nobody reads out of its graph, and with it the constants that only it read."""
    if node.graph is None:
        raise ModelError("the node is not in a graph", where=label(node))
    inputs = tuple(node.inputs)
    node.graph.remove(node, safe=True)
    for value in inputs:
        drop_if_unused(value)


def remove_unread(node: ir.Node) -> None:
    """Take a node out that nobody reads, and then whatever only it had read, up to where something is in use."""
    todo = [node]
    while todo:
        last = todo.pop()
        if last.graph is None or any(v.uses() or v.is_graph_output() for v in last.outputs):
            continue
        above = [v.producer() for v in last.inputs if v is not None]
        remove_node(last)
        todo.extend(dict.fromkeys(n for n in above if n is not None))


def bypass(node: ir.Node, new: ir.Value, origin_of: ir.Node | None = None) -> str | None:
    """Replace the first output of `node` by `new` and remove the node.

    Args:
        node: the node that goes; its other outputs must be unread.
        new: what its readers get.
        origin_of: the node that did take over the work, which records `node` in its provenance.

    Returns:
        None where it was done, otherwise the reason why it cannot be.
    """
    reason = cannot_replace(node.outputs[0], new)
    if reason:
        return reason
    if any(extra.uses() or extra.is_graph_output() for extra in node.outputs[1:]):
        return "another output of it is in use"
    name = label(node)
    replace_value(node.outputs[0], new)
    if origin_of is not None:
        mark_origin(origin_of, [name])
    remove_node(node)
    return None
