"""Which graphs of a model the coupling analysis enters: the main graph and the bodies of If, Loop and Scan.

Labels, uses and sinks are kept by name, so that they also hold for a clone of the model. ONNX lets two bodies use one
name for different values where neither sees the other; such bodies are not entered, and freeze what they read
(`graphopt.rewriting.prepare` makes their names distinct).
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from graphopt.analysis.rules import node_key
from graphopt.rewriting.scopes import graphs


def scopes(model: ir.Model) -> list[ir.Graph]:
    """The main graph first, then every body whose names are its own.

    Bodies import the operator sets of their model, which onnx_ir leaves to be read from the main graph; they are
    told here, because rules depend on the version of an operator.
    """
    found = list(graphs(model))
    for body in found[1:]:
        body.opset_imports.update(model.graph.opset_imports)
    told = [_names(graph) for graph in found]
    count = Counter(name for names in told for name in names)
    bodies = zip(found[1:], told[1:], strict=True)
    return [model.graph, *(body for body, names in bodies if all(count[name] == 1 for name in names))]


def _names(graph: ir.Graph) -> set[str]:
    """Names that a graph defines."""
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name for value in values if value.name}


def nodes_by_key(model: ir.Model) -> dict[str, ir.Node]:
    """All nodes of the entered graphs by `node_key`."""
    return {node_key(node): node for graph in scopes(model) for node in graph}


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """All values of the entered graphs: results, inputs, initializers."""
    found = {v.name: v for graph in scopes(model) for node in graph for v in node.outputs if v.name}
    for graph in scopes(model):
        found.update({v.name: v for v in (*graph.inputs, *graph.initializers.values()) if v.name})
    return found


def initializers(model: ir.Model) -> dict[str, ir.Value]:
    """All initializers of the entered graphs by name."""
    return {name: value for graph in scopes(model) for name, value in graph.initializers.items()}
