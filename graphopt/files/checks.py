"""What a valid graph is, as code: names, definitions before uses, operator signatures, types. Works on the IR.

Run on load, and after every pass (`graphopt.verify.structure_check`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.weights import all_graphs, contains_nan, model_tensors
from graphopt.rewriting.scopes import bodies

if TYPE_CHECKING:
    import onnx


def label(node: ir.Node) -> str:
    """How errors name a node: its name, or the tensor it produces where it has none."""
    if node.name:
        return f"node {node.name} ({node.op_type})"
    first = next((value.name for value in node.outputs if value.name), None)
    return f"node producing {first} ({node.op_type})" if first else f"unnamed node ({node.op_type})"


def check_graphs(model: ir.Model) -> None:
    """Check every graph of the model.

    Raises:
        ModelError: a name that is missing or defined twice, a use without or before its definition, a missing opset
            import, an operator with a wrong number of inputs or outputs, a wrongly typed attribute or operand.
    """
    if "" not in model.graph.opset_imports and any(node.domain == "" for node in model.graph.all_nodes()):
        raise ModelError("the default operator set is not among the imports of the model")
    _check_graph(model.graph, set(), model.graph.opset_imports, model)
    for function in model.functions.values():
        _check_graph(function.graph, set(), function.opset_imports, model)


def check_values(model: ir.Model) -> None:
    """Check the stored numbers: no NaN anywhere. Streamed; infinities are legitimate (attention masks).

    Raises:
        ModelError: names the first tensor that holds a NaN.
    """
    seen: set[int] = set()
    for name, tensor in model_tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if contains_nan(tensor):
            raise ModelError(
                "it contains NaN", where=f"tensor {name}", hint="the checkpoint is damaged; export a healthy one"
            )


def _check_graph(graph: ir.Graph, outer: set[ir.Value], imports: dict[str, int], model: ir.Model) -> None:
    visible = set(outer)
    names: set[str] = set()

    def define(value: ir.Value, where: str) -> None:
        if not value.name:
            raise ModelError("it defines a value without a name", where=where)
        if value.name in names:
            raise ModelError(f"it defines {value.name!r}, which is already defined", where=where)
        names.add(value.name)
        visible.add(value)

    for value in graph.inputs:
        define(value, f"graph {graph.name}")
    for key, value in graph.initializers.items():
        _check_initializer(key, value)
        if value not in visible:
            define(value, f"initialiser {key}")
    for node in graph:
        if node.domain not in imports and node.op_identifier() not in model.functions:
            raise ModelError(
                f"its operator set {node.domain or 'ai.onnx'!r} is not among the imports of the model",
                where=label(node),
            )
        for operand in node.inputs:
            if operand is not None and operand not in visible:
                _complain_about_use(operand, node)
        _check_signature(node, imports.get(node.domain))
        for subgraph in bodies(node):
            _check_graph(subgraph, visible, imports, model)
        for value in node.outputs:
            if value.name:
                define(value, label(node))
    for value in graph.outputs:
        if value not in visible:
            raise ModelError("nothing in the graph produces this output", where=f"output {value.name}")


def _complain_about_use(operand: ir.Value, node: ir.Node) -> None:
    producer = operand.producer()
    if producer is None:
        raise ModelError(f"it reads {operand.name!r}, which nothing defines", where=label(node))
    if producer.graph is None:
        raise ModelError(f"it reads {operand.name!r}, whose producer was removed from the graph", where=label(node))
    raise ModelError(f"it reads {operand.name!r} before {label(producer)} defines it", where=label(node))


def _check_initializer(key: str, value: ir.Value) -> None:
    tensor = value.const_value
    where = f"initialiser {key}"
    if tensor is None:
        raise ModelError("it holds no data", where=where)
    if value.name != key:
        raise ModelError(f"its value is named {value.name!r}", where=where)
    if value.dtype is not None and value.dtype != tensor.dtype:
        raise ModelError(f"it is declared {value.dtype.name} but holds {tensor.dtype.name} data", where=where)


@functools.cache
def schema(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    """The operator schema in force at an opset version; None for operators that onnx does not define."""
    import onnx

    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _type_name(kind: Any) -> str:
    """The name of an attribute type of onnx, spelled as `onnx_ir.AttributeType` spells it."""
    return str(kind.name)


@functools.cache
def _signature(op_type: str, domain: str, version: int) -> Any:
    """The parts of a schema that are checked, as plain Python values: reading them from C++ for each node is slow."""
    found = schema(op_type, domain, version)
    if found is None:
        return None
    import onnx

    variadic = bool(found.inputs) and found.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    return (
        found.min_input,
        found.max_input,
        found.min_output,
        found.max_output,
        {name: (_type_name(attribute.type), attribute.required) for name, attribute in found.attributes.items()},
        [(p.name, p.type_str, frozenset(p.types)) for p in found.inputs],
        variadic and found.inputs[-1].is_homogeneous,
    )


def _check_signature(node: ir.Node, version: int | None) -> None:
    if version is None:
        return
    signature = _signature(node.op_type, node.domain, version)
    if signature is None:
        return
    min_input, max_input, min_output, max_output, attributes, parameters, homogeneous = signature
    given = len(node.inputs)
    if not min_input <= given <= max_input:
        raise ModelError(f"it has {given} inputs, the operator takes {_range(min_input, max_input)}", where=label(node))
    given = len(node.outputs)
    if not min_output <= given <= max_output:
        raise ModelError(
            f"it has {given} outputs, the operator gives {_range(min_output, max_output)}", where=label(node)
        )
    for name, attribute in node.attributes.items():
        declared = attributes.get(name)
        if declared is not None and attribute.type.name != declared[0]:
            raise ModelError(
                f"attribute {name} is {attribute.type.name}, the operator takes {declared[0]}", where=label(node)
            )
    for name, (_, required) in attributes.items():
        if required and name not in node.attributes:
            raise ModelError(f"attribute {name}, which the operator requires, is missing", where=label(node))
    _check_operand_types(node, parameters, homogeneous)


def _range(low: int, high: int) -> str:
    if low == high:
        return str(low)
    return f"{low} or more" if high > 1 << 20 else f"{low} to {high}"


def _check_operand_types(node: ir.Node, parameters: list[tuple[str, str, frozenset[str]]], homogeneous: bool) -> None:
    """Check that operands have an allowed type, and the same type where the operator uses one type variable."""
    bound: dict[str, tuple[str, str | None]] = {}
    for position, operand in enumerate(node.inputs):
        if operand is None or not isinstance(operand.type, ir.TensorType) or not parameters:
            continue
        index = min(position, len(parameters) - 1)
        parameter, variable, allowed = parameters[index]
        found = f"tensor({operand.type.dtype.name.lower()})"
        if found not in allowed:
            raise ModelError(
                f"operand {operand.name!r} is {found}, which the operator does not take for {parameter}",
                where=label(node),
            )
        if index == len(parameters) - 1 and len(node.inputs) > len(parameters) and not homogeneous:
            continue
        first = bound.setdefault(variable, (found, operand.name))
        if first[0] != found:
            raise ModelError(
                f"operands {first[1]!r} and {operand.name!r} must have one type, but are {first[0]} and {found}",
                where=label(node),
            )


def sort_nodes(model: ir.Model) -> None:
    """Bring every graph into topological order, stably; a graph in order is left alone.

    Raises:
        ModelError: the graph has a cycle; names the nodes on it.
    """
    for graph in all_graphs(model):
        order = list(graph)
        position = {node: index for index, node in enumerate(order)}
        needs = {node: _local_predecessors(node, position) for node in order}
        if all(position[before] < position[node] for node in order for before in needs[node]):
            continue
        cycle = _find_cycle(order, needs)
        if cycle:
            shown = " -> ".join(node.name or node.op_type for node in cycle[:8])
            raise ModelError(f"the graph has a cycle: {shown}", where=label(cycle[0]))
        graph.sort()


def _local_predecessors(node: ir.Node, position: dict[ir.Node, int]) -> list[ir.Node]:
    """Nodes of the same graph that must run first, through operands and through what subgraphs capture."""
    found: dict[ir.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        for operand in current.inputs:
            producer = operand.producer() if operand is not None else None
            if producer is not None and producer in position:
                found[producer] = None
        for subgraph in bodies(current):
            pending.extend(subgraph)
            for value in subgraph.outputs:
                producer = value.producer()
                if producer is not None and producer in position:
                    found[producer] = None
    return list(found)


def _find_cycle(order: list[ir.Node], needs: dict[ir.Node, list[ir.Node]]) -> list[ir.Node]:
    """One cycle in execution order, or nothing: peel off nodes whose needs are met, then walk back among the rest."""
    waiting = {node: len(before) for node, before in needs.items()}
    users: dict[ir.Node, list[ir.Node]] = {node: [] for node in order}
    for node, before in needs.items():
        for producer in before:
            users[producer].append(node)
    ready = [node for node in order if waiting[node] == 0]
    while ready:
        node = ready.pop()
        del waiting[node]
        for user in users[node]:
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    if not waiting:
        return []
    walk: list[ir.Node] = []
    current = next(iter(waiting))
    while current not in walk:
        walk.append(current)
        current = next(producer for producer in needs[current] if producer in waiting)
    return [*reversed(walk[walk.index(current) :])]
