"""What passes share to rewrite a graph: constants, uses, names, replacement, provenance, size.

Three rules hold in every helper. A use inside an If, Loop or Scan body counts as a use: onnx_ir links inner nodes to
the outer value object, so `Value.uses()` sees them. A value that a graph declares as its output keeps its name. Names
of nodes and parameters stay, and a new name is derived from the old ones only, so that equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.spill import held

Float64 = npt.NDArray[np.float64]

FOLDED_FROM = "graphopt.folded_from"
"""Key in `metadata_props`: the nodes or values that went into this one, separated by commas."""

_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
"""Before IR version 4 every initializer had to be listed as a graph input too."""


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every If/Loop/Scan body in it; model-local functions are not visited."""
    yield model.graph
    yield from tuple(subgraphs(model.graph))


def subgraphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Every If/Loop/Scan body below `graph`, outer ones first.

    What `ir.Graph.subgraphs` yields, in a tenth of its time: passes ask for it again and again.
    """
    for node in graph:
        # The dictionary itself: its wrapper looks every key up again.
        for attribute in node.attributes.data.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                found = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
                found = list(attribute.as_graphs())
            else:
                continue
            for body in found:
                yield body
                yield from subgraphs(body)


def scopes(model: ir.Model) -> Iterator[tuple[ir.Graph, int]]:
    """Every graph with the standard opset it is written in: those of `graphs`, then model-local functions' and theirs.

    A rule that makes initializers in a function calls `settle_functions` afterwards.
    """
    for graph in graphs(model):
        yield graph, model.graph.opset_imports.get("", 1)
    for function in model.functions.values():
        opset = function.opset_imports.get("", model.graph.opset_imports.get("", 1))
        yield function.graph, opset
        for graph in tuple(subgraphs(function.graph)):
            yield graph, opset


def settle_functions(model: ir.Model) -> None:
    """Make Constant nodes of the initializers that rules left in model-local functions, which can hold none."""
    for function in model.functions.values():
        graph = function.graph
        for name, value in tuple(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                raise ModelError("an initializer has no value", where=f"{function.name}: {name}")
            new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=value.shape)
            node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[new])
            first = next(iter(graph), None)
            if first is None:
                graph.append(node)
            else:
                graph.insert_before(first, node)
            value.replace_all_uses_with(new)
            graph.initializers.pop(name)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The If/Loop/Scan bodies that `node` holds directly."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """True if `node` is one of these operators of the standard domain."""
    return node.op_type in op_types and node.domain in ("", "ai.onnx")


def refers_to_caller(node: ir.Node) -> bool:
    """Whether an attribute of `node`, in a model-local function, is given by the function's caller."""
    return any(attribute.is_ref() for attribute in node.attributes.data.values())


def label(node: ir.Node) -> str:
    """How a report names `node`: its name, or its operator and first output where it has none."""
    return node.name or f"{node.op_type}({node.outputs[0].name if node.outputs else ''})"


# -- constants -------------------------------------------------------------------------------------------------------


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that `value` always holds: an initializer that no caller can override, or a Constant node's.

    None for everything else, also for an initializer that is listed as a graph input: see `freeze_overridable`.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    return constant_node_tensor(node) if node is not None and is_onnx(node, "Constant") else None


def constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The dense tensor of a Constant node; None for a sparse one or one that refers to a function's attribute."""
    if len(node.attributes) != 1 or len(node.outputs) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    name = node.outputs[0].name
    match attribute.name:
        case "value":
            # What `as_tensor` returns, without its slow check against the protocol.
            tensor: ir.TensorProtocol = attribute.value
            return tensor
        case "value_float" | "value_floats":
            return ir.Tensor(np.array(attribute.value, dtype=np.float32), name=name)
        case "value_int" | "value_ints":
            return ir.Tensor(np.array(attribute.value, dtype=np.int64), name=name)
        case _:
            return None


def array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The constant that `value` holds as a numpy array (memory-mapped where the file is); None where it is none."""
    tensor = constant(value)
    return None if tensor is None or tensor.dtype == ir.DataType.STRING else np.asarray(tensor.numpy())


def float64(value: ir.Value | None) -> Float64 | None:
    """The floating-point constant that `value` holds, in float64; None where it is no such constant."""
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return None
    return np.asarray(tensor.numpy()).astype(np.float64)


def freeze_overridable(model: ir.Model) -> list[str]:
    """Make constants of the initializers that are also graph inputs, as models of IR version 3 have to list them.

    ONNX lets a caller override such an initializer at run time, which is why ONNX Runtime folds nothing into it.

    Returns:
        The names that callers can no longer feed.
    """
    graph = model.graph
    frozen = [v for v in graph.inputs if v.is_initializer()]
    if frozen:
        kept = [v for v in graph.inputs if not v.is_initializer()]
        graph.inputs.clear()
        graph.inputs.extend(kept)
    return [str(v.name) for v in frozen]


def freeze_note(names: list[str]) -> str:
    """The sentence for the report about what `freeze_overridable` did."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} initializers were also graph inputs that a caller could override ({shown}); "
        "they are constants now (keep_overridable=true leaves them)"
    )


def allow_private_initializers(model: ir.Model) -> str | None:
    """Raise the IR version to 4 where it is older, because a new initializer is no graph input.

    Returns:
        A sentence for the report where the version changed.
    """
    old = model.ir_version
    if old >= _FIRST_IR_WITH_PRIVATE_INITIALIZERS:
        return None
    model.ir_version = _FIRST_IR_WITH_PRIVATE_INITIALIZERS
    return f"IR version {old} -> {model.ir_version}: before 4 every initializer had to be a graph input"


# -- names and new values --------------------------------------------------------------------------------------------


class Names:
    """All names of values and nodes in a model, and new ones that clash with none of them.

    Args:
        model: the model.
        later: collect the names when the first new one is asked for: most runs of most passes need none. Only where
            nothing is taken out of the graph under its name to be put back later.
    """

    def __init__(self, model: ir.Model, *, later: bool = False) -> None:
        self._model = model
        self._taken: set[str] | None = None if later else _all_names(model)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ... where it is taken."""
        if self._taken is None:
            self._taken = _all_names(self._model)
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def _all_names(model: ir.Model) -> set[str]:
    names: set[str | None] = set()
    for graph, _ in scopes(model):
        names.update(value.name for value in graph.inputs)
        names.update(value.name for value in graph.initializers.values())
        for node in graph:
            names.add(node.name)
            names.update([value.name for value in node.outputs])
    return {name for name in names if name}


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


# -- uses and replacement --------------------------------------------------------------------------------------------


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


def mark_origin(item: ir.Node | ir.Value, names: Iterable[str]) -> None:
    """Record in `item.metadata_props` what was folded into it, in order and without repetition."""
    known = item.metadata_props.get(FOLDED_FROM, "")
    merged = dict.fromkeys([*filter(None, known.split(",")), *names])
    item.metadata_props[FOLDED_FROM] = ",".join(merged)


# -- size ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        nodes: nodes in the main graph, all bodies and functions, without Constant nodes, which only store a tensor.
        bytes: about what the file takes: tensors plus names and attributes, without the provenance we add.
    """

    nodes: int
    bytes: int


def node_bytes(node: ir.Node) -> int:
    """About how many bytes `node` takes in a file, tensors in its attributes included and bodies not."""
    total = 8 + len(node.name or "") + len(node.op_type) + len(node.domain)
    for value in node.inputs:
        if value is not None:
            total += 2 + len(value.name or "")
    for value in node.outputs:
        # It stands there twice: once more with its shape.
        total += 2 + len(value.name or "") + 16 + len(value.name or "")
    for key, text in node.metadata_props.items():
        if key != FOLDED_FROM:
            total += 4 + len(key) + len(text)
    # The dictionary itself: its wrapper looks every key up again.
    for attribute in node.attributes.data.values():
        total += _attribute_bytes(attribute)
    return total


def _attribute_bytes(attribute: ir.Attr) -> int:
    total = 6 + len(attribute.name)
    if attribute.is_ref():
        return total
    if attribute.type == ir.AttributeType.TENSOR:
        total += attribute.value.nbytes + 16
    elif attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
        total += 4 * len(attribute.value)
    elif attribute.type == ir.AttributeType.STRING:
        total += len(attribute.as_string())
    return total


def initializer_bytes(value: ir.Value) -> int:
    """About how many bytes an initializer takes in a file."""
    tensor = value.const_value
    return 16 + len(value.name or "") + (tensor.nbytes if tensor is not None else 0)


def size(model: ir.Model) -> Size:
    """Measure `model`, model-local functions included, in O(nodes); no weight is read."""
    nodes = total = 0
    for graph, _ in scopes(model):
        for node in graph:
            nodes += not is_onnx(node, "Constant")
            total += node_bytes(node)
        total += sum(initializer_bytes(v) for v in graph.initializers.values())
    return Size(nodes, total)
