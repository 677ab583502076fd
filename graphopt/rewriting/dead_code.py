"""Mark and sweep over a graph and all its bodies, and over every model-local function.

Reachability is followed from the outputs instead of trusting use counts, because a body that was cut out of the graph
(the branch of an If that is never taken) still counts as a reader of the outer values it captures.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.rewriting.scopes import bodies, subgraphs


def remove_dead(model: ir.Model) -> tuple[int, int]:
    """Remove nodes and initializers that no output depends on; inputs and outputs of graphs stay.

    Returns:
        How many nodes and how many initializers went.
    """
    nodes = initializers = 0
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        gone = _sweep([root, *subgraphs(root)])
        nodes, initializers = nodes + gone[0], initializers + gone[1]
    return nodes, initializers


def _sweep(everything: list[ir.Graph]) -> tuple[int, int]:
    """Remove what the outputs of the first graph, which holds the others, do not depend on."""
    live_nodes, live_values = reachable(everything[0])
    nodes = initializers = 0
    for graph in everything:
        dead = [n for n in graph if n not in live_nodes and n.outputs]
        for node in dead:
            _detach(node)
        graph.remove(dead)
        nodes += len(dead)
        for value in tuple(graph.initializers.values()):
            if value not in live_values and not value.is_graph_input():
                graph.initializers.pop(str(value.name))
                initializers += 1
    _forget_stale_uses([everything[0], *subgraphs(everything[0])])
    return nodes, initializers


def reachable(graph: ir.Graph) -> tuple[set[ir.Node], set[ir.Value]]:
    """Nodes and values, those of bodies too, that the outputs of a graph depend on."""
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    # A node without outputs has an effect we cannot see (custom operators), so it and what it reads stay.
    todo: list[ir.Value | None] = list(graph.outputs)
    for each in (graph, *subgraphs(graph)):
        todo.extend(value for node in each if not node.outputs for value in node.inputs)
    while todo:
        value = todo.pop()
        if value is None or value in values:
            continue
        values.add(value)
        node = value.producer()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        todo.extend(node.inputs)
        for body in bodies(node):
            todo.extend(body.outputs)
    return nodes, values


def _detach(node: ir.Node) -> None:
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    for body in bodies(node):
        for inner in body:
            _detach(inner)


def _forget_stale_uses(everything: list[ir.Graph]) -> None:
    present = {node for graph in everything for node in graph}
    for graph in everything:
        values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
        for value in values:
            for use in tuple(value.uses()):
                if use.node not in present:
                    use.node.replace_input_with(use.idx, None)
