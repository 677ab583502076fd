"""What makes a model readable for the coupling analysis, without changing what it computes.

Calls of model-local functions are replaced by the bodies of the functions, because units run through them. Values in
bodies of If, Loop and Scan get names of their own, because the analysis knows values by name.
"""

from __future__ import annotations

import itertools

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.rewriting.constants import freeze_overridable
from graphopt.rewriting.names import Names
from graphopt.rewriting.scopes import bodies, graphs


def prepare(model: ir.Model) -> list[str]:
    """Inline functions, make names distinct and overridable initializers constant, in place; shapes are inferred anew.

    Returns:
        Sentences for the report, one for each kind of change.

    Raises:
        ModelError: functions call each other in a circle.
    """
    from graphopt.model import infer_shapes

    notes = []
    if model.functions:
        notes += inline_functions(model)
        infer_shapes(model)
    renamed = distinct_names(model)
    if renamed:
        notes.append(f"{renamed} values in bodies of If, Loop or Scan were renamed: others have their names")
    frozen = freeze_overridable(model)
    if frozen:
        notes.append(f"{len(frozen)} initializers that callers could override are constants now")
    return notes


def inline_functions(model: ir.Model) -> list[str]:
    """Replace calls of model-local functions by their nodes, also in bodies and in functions, in place.

    Names of nodes and values stay where they are free; what a call knows about its origin goes to every node of it. A
    function whose operator sets differ from the model's, or that takes a graph as an attribute, is called as before.

    Returns:
        Sentences for the report.

    Raises:
        ModelError: functions call each other in a circle.
    """
    from onnx_ir.passes import PreconditionError
    from onnx_ir.passes.common import InlinePass

    refusals = {function.identifier(): _refusal(model, function) for function in model.functions.values()}
    kept = {name: reason for name, reason in refusals.items() if reason is not None}
    before = len(model.functions)
    try:
        InlinePass(criteria=lambda function: function.identifier() not in kept)(model)
    except PreconditionError as error:
        raise ModelError(
            f"its functions cannot be inlined ({error})", hint="functions must not call themselves"
        ) from error
    done = before - len(model.functions)
    notes = [f"{done} model-local functions were inlined"] if done else []
    return notes + [f"function {name} is left as it is: {why}" for (_, name, _), why in sorted(kept.items())]


def _refusal(model: ir.Model, function: ir.Function) -> str | None:
    """Why a function cannot be inlined."""
    for domain, version in function.opset_imports.items():
        own = model.opset_imports.get(domain, version)
        if own != version:
            return f"it uses opset {version} of {domain or 'ai.onnx'}, the model {own}"
    everywhere = itertools.chain(model.graph.all_nodes(), *(f.all_nodes() for f in model.functions.values()))
    calls = (node for node in everywhere if node.op_identifier() == function.identifier())
    return "a graph is among its attributes" if any(next(bodies(call), None) for call in calls) else None


def distinct_names(model: ir.Model) -> int:
    """Rename values in bodies that have the name of a value of another graph, in place; how many they were."""
    names, taken, renamed = Names(model), _names(model.graph), 0
    for body in list(graphs(model))[1:]:
        for value in [*body.inputs, *body.initializers.values(), *(v for node in body for v in node.outputs)]:
            if not value.name:
                continue
            if value.name in taken:
                value.name = names.fresh(value.name)
                renamed += 1
            taken.add(value.name)
    return renamed


def _names(graph: ir.Graph) -> set[str]:
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name for value in values if value.name}
