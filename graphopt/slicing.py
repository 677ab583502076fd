"""Sliced execution: a model run a few nodes at a time, so that only the weights of those nodes are in memory.

Slices are consecutive runs of nodes in topological order whose weights stay under a byte budget. Tensors that a later
slice reads are handed over as runtime values (no conversion, any type) and freed after their last reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.executor import Session, TensorSpec, check_feeds, explain, running
from graphopt.files.weights import MappedTensor
from graphopt.rewriting.scopes import bodies

if TYPE_CHECKING:
    from graphopt.executor import Array


FED = 1 << 20
"""Weights above this many bytes are fed like activations: the runtime copies initialisers, and feeds it does not."""

_TAKES_COMPUTED_WEIGHTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "Add", "Sub", "Mul", "Div", "Identity"}
"""Operators that run the same whether their weight is a constant or computed. Others may insist on a constant."""


@dataclass(frozen=True)
class Slice:
    """Nodes that run together.

    Attributes:
        nodes: consecutive nodes of the main graph.
        reads: tensors that come from outside: graph inputs and results of earlier slices.
        writes: tensors that later slices or the caller need.
    """

    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]
    writes: tuple[ir.Value, ...]


def reads_of(node: ir.Node) -> list[ir.Value]:
    """The values of the enclosing graph that a node reads, in itself or inside its subgraphs, without repetition."""
    inner: set[ir.Value] = set()
    found: dict[ir.Value, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        for value in current.inputs:
            if value is not None:
                found[value] = None
        if current is not node:
            inner.update(current.outputs)
        for graph in bodies(current):
            inner.update(graph.inputs)
            inner.update(graph.initializers.values())
            for value in graph.outputs:
                found[value] = None
            pending.extend(graph)
    return [value for value in found if value not in inner]


def node_weights(node: ir.Node) -> dict[int, int]:
    """Bytes of the tensors a node holds or reads, by identity of the tensor."""
    found: dict[int, int] = {}

    def add(tensor: ir.TensorProtocol | None) -> None:
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            found[id(tensor)] = tensor.nbytes

    for value in reads_of(node):
        add(value.const_value)
    pending = [node]
    while pending:
        current = pending.pop()
        for attribute in current.attributes.values():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                add(attribute.as_tensor())
        for graph in bodies(current):
            for value in graph.initializers.values():
                add(value.const_value)
            pending.extend(graph)
    return found


def slices(model: ir.Model, budget: int) -> list[Slice]:
    """Cut the main graph into slices.

    Args:
        model: a model in topological order.
        budget: bytes of weights a slice may hold; a single node may exceed it.
    """
    groups: list[list[ir.Node]] = []
    held: dict[int, int] = {}
    for node in model.graph:
        weights = node_weights(node)
        if not groups or sum((held | weights).values()) > budget:
            groups.append([])
            held = {}
        groups[-1].append(node)
        held |= weights
    initializers = set(model.graph.initializers.values())
    outputs = set(model.graph.outputs)
    last_reader: dict[ir.Value, int] = {}
    for index, group in enumerate(groups):
        for node in group:
            last_reader.update(dict.fromkeys(reads_of(node), index))
    result = []
    for index, group in enumerate(groups):
        made = {value: None for node in group for value in node.outputs}
        read = {
            value: None for node in group for value in reads_of(node) if value not in made and value not in initializers
        }
        writes = [value for value in made if value in outputs or last_reader.get(value, -1) > index]
        result.append(Slice(tuple(group), tuple(read), tuple(writes)))
    return result


class SlicedSession:
    """Runs a model slice by slice; the same calls as `graphopt.executor.Session`, for several feeds at once.

    Args:
        model: a model in topological order. Initialisers that are also inputs keep their stored values.
        budget: bytes of weights in memory at a time.
        threads: threads of one operator.
    """

    def __init__(self, model: ir.Model, *, budget: int, threads: int = 1) -> None:
        self._model = model
        self._slices = slices(model, budget)
        self._threads = threads
        self._inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
        self.output_names = [value.name or "" for value in model.graph.outputs]
        self._last_read: dict[str, int] = {}
        for index, piece in enumerate(self._slices):
            for value in piece.reads:
                self._last_read[value.name or ""] = index
        self._files = {
            tensor.file for v in model.graph.initializers.values() if isinstance(tensor := v.const_value, MappedTensor)
        }

    def run_all(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run the model on each of the feeds; a slice is loaded once for all of them.

        Raises:
            DataError: a feed does not fit the model.
            ModelError: an operator failed; names the node.
        """
        import onnxruntime as ort

        specs = [_declared(value) for value in self._inputs]
        for feed in feeds:
            check_feeds(feed, [spec for spec in specs if spec is not None])
        alive = [{name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in f.items()} for f in feeds]
        failures = [running(feed) for feed in feeds]
        for index, piece in enumerate(self._slices):
            if piece.writes:
                self._run_slice(index, piece, alive, failures)
            for file in self._files:
                file.shed()
        return [dict(self._collect(values)) for values in alive]

    def _run_slice(self, index: int, piece: Slice, alive: list[dict[str, Any]], failures: Sequence[str]) -> None:
        fed = _fed_weights(piece)
        weights = {value.name or "": _runtime_value(value) for value in fed}
        model = _slice_model(self._model, piece, alive[0], fed)
        names = [value.name or "" for value in piece.writes]
        with Session(model, threads=self._threads, low_memory=True) as session:
            for values, doing in zip(alive, failures, strict=True):
                feed = weights | {value.name or "": values[value.name or ""] for value in piece.reads}
                try:
                    results = session.session.run_with_ort_values(names, feed)
                except Exception as error:
                    raise explain(error, doing) from error
                values.update(zip(names, results, strict=True))
        for values in alive:
            for name in [n for n in values if self._last_read.get(n, index + 1) <= index]:
                if name not in self.output_names:
                    del values[name]

    def _collect(self, values: dict[str, Any]) -> Iterator[tuple[str, Array]]:
        for value in self._model.graph.outputs:
            name = value.name or ""
            if name in values:
                yield name, values[name].numpy()
            elif value.const_value is not None:
                yield name, value.const_value.numpy()
            else:
                raise ModelError("nothing computes this output", where=f"output {name}")


def _declared(value: ir.Value) -> TensorSpec | None:
    """What a graph input takes; None for types that numpy has no arrays of."""
    if not isinstance(value.type, ir.TensorType):
        return None
    dtype = np.dtype(np.str_) if value.type.dtype == ir.DataType.STRING else np.dtype(value.type.dtype.numpy())
    shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ())
    return TensorSpec(value.name or "", dtype, shape) if value.shape is not None else None


def _fed_weights(piece: Slice) -> list[ir.Value]:
    """Large initialisers of the main graph that all their readers in the slice take as a computed operand."""
    readers: dict[ir.Value, set[str]] = {}
    for node in piece.nodes:
        for value in reads_of(node):
            if value.is_initializer() and value.const_value is not None and value.const_value.nbytes > FED:
                readers.setdefault(value, set()).add(node.op_type)
    floats = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16}
    return [v for v, operators in readers.items() if operators <= _TAKES_COMPUTED_WEIGHTS and v.dtype in floats]


def _runtime_value(value: ir.Value) -> Any:
    import onnxruntime as ort

    assert value.const_value is not None
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.const_value.numpy()))


def _slice_model(model: ir.Model, piece: Slice, values: Mapping[str, Any], fed: Sequence[ir.Value]) -> ir.Model:
    """A model of the nodes of a slice. Weights are shared; the types of its inputs are those of the actual values."""
    held = {value: None for node in piece.nodes for value in reads_of(node) if value.const_value is not None}
    initializers = [
        value for value in held if value not in fed and model.graph.initializers.get(value.name or "") is value
    ]
    view = ir.GraphView(
        [*piece.reads, *fed, *(value for value in initializers if model.ir_version < 4)],
        piece.writes,
        nodes=piece.nodes,
        initializers=initializers,
        opset_imports=model.graph.opset_imports,
        name=model.graph.name or "slice",
    )
    graph = view.clone()
    for value in graph.inputs:
        actual = values.get(value.name or "")
        if actual is not None and actual.is_tensor():
            value.type = ir.TensorType(ir.DataType(actual.element_type()))
            value.shape = None
    for value in graph.outputs:
        # Inferred by the runtime: a declared shape could contradict the actual one of this feed.
        value.shape = None
        value.type = None
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
