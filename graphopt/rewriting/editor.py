"""Constants and nodes that rewrites add: named after what they replace, small equal ones made once a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import label, refers_to_caller
from graphopt.rewriting.scopes import scopes, settle_functions

_SMALL = 1024
"""Bytes up to which a constant is compared with those that are there."""


class Editor:
    """Walks a model, bodies and model-local functions included, and makes constants and nodes in it.

    One for a run of a pass, which calls `close` at its end.

    Args:
        model: the model that is rewritten, in place.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._names = Names(model, later=True)
        self._known: dict[ir.Graph, dict[Any, ir.Value]] = {}

    def close(self) -> None:
        """Leave no initializers in functions, which can hold none."""
        settle_functions(self._model)

    def nodes(self) -> Iterator[tuple[ir.Node, int]]:
        """Every node that is still there when its turn comes and has no attribute that a function's caller gives."""
        for graph, opset in scopes(self._model):
            for node in tuple(graph):
                if node.graph is graph and not refers_to_caller(node):
                    yield node, opset

    def constant(self, before: ir.Node, wanted: str, data: npt.NDArray[Any]) -> ir.Value:
        """A constant that `before` can read; an equal small one of its graph where there is one.

        Args:
            before: the node that will read it.
            wanted: its name, where that is free.
            data: what it holds, in the dtype that it gets.
        """
        graph = _graph(before)
        array = np.array(data, order="C")  # ascontiguousarray would make a vector of a scalar
        key = (array.dtype.str, array.shape, array.tobytes())
        known = self._small_constants(graph) if array.nbytes <= _SMALL else {}
        found = known.get(key)
        if found is None or found.graph is not graph:
            name = self._names.fresh(wanted)
            found = known[key] = new_initializer(graph, name, array, ir.DataType.from_numpy(array.dtype))
        return found

    def sizes(self, before: ir.Node, wanted: str, numbers: Sequence[int]) -> ir.Value:
        """A constant vector of int64."""
        return self.constant(before, wanted, np.array(numbers, dtype=np.int64))

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        wanted: str,
        shape: Sequence[int | str | None] | ir.Shape | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """The first output of a new node before `before`, named like its output.

        Args:
            before: the node in front of which it is put.
            op_type: an operator of the standard domain.
            inputs: what it reads.
            attributes: in Python's types.
            wanted: name of output and node, where it is free.
            shape: of the output, where known.
            dtype: of the output; None: that of the first input.
        """
        name = self._names.fresh(wanted)
        node = ir.node(op_type, inputs, attributes, num_outputs=1, name=name)
        output = node.outputs[0]
        output.name = name
        source = inputs[0] if inputs else None
        output.type = ir.TensorType(dtype) if dtype is not None else source.type if source is not None else None
        output.shape = None if shape is None else ir.Shape(shape)
        _graph(before).insert_before(before, node)
        return output

    def transposed(self, source: ir.Value, graph: ir.Graph, perm: Sequence[int], wanted: str) -> ir.Value:
        """Transpose `source` as soon as it is there: behind the node that makes it, or at the start of `graph`."""
        maker = source.producer()
        name = self._names.fresh(wanted)
        node = ir.node("Transpose", [source], {"perm": list(perm)}, num_outputs=1, name=name)
        output = node.outputs[0]
        output.name, output.type = name, source.type
        output.shape = None if source.shape is None else ir.Shape([source.shape[axis] for axis in perm])
        if maker is not None:
            graph.insert_after(maker, node)
        else:
            graph.insert_before(graph[0], node)
        return output

    def names_outside(self, body: ir.Graph) -> set[str]:
        """Names of values and nodes in all graphs but this body."""
        names: set[str] = set()
        for graph, _ in scopes(self._model):
            if graph is not body:
                values = (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))
                names.update(v.name for v in values if v.name)
                names.update(node.name for node in graph if node.name)
        return names

    def fresh(self, wanted: str) -> str:
        """A name that nothing has."""
        return self._names.fresh(wanted)

    def _small_constants(self, graph: ir.Graph) -> dict[Any, ir.Value]:
        if graph not in self._known:
            known: dict[Any, ir.Value] = {}
            for value in graph.initializers.values():
                tensor = constant(value)
                if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.nbytes > _SMALL:
                    continue
                array = np.array(tensor.numpy(), order="C")
                known.setdefault((array.dtype.str, array.shape, array.tobytes()), value)
            self._known[graph] = known
        return self._known[graph]


def _graph(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise ModelError("the node is in no graph", where=label(node))
    return node.graph
