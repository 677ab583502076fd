"""Where the channels of a tensor travel: data movement between a layer and the node that computes with its output.

Between a projection and the attention product that reads it stand splits into heads, transpositions, copies for grouped
queries, scaling by a constant: operators that move whole numbers and multiply all of them alike. Nothing is deduced
from their attributes. They are run, on the numbers of the channels themselves, so every arrangement that an exporter
can think of is understood, or seen to be something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx

Array = npt.NDArray[Any]
Channels = npt.NDArray[np.int64]

MOVES = (
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"),
    *("Split", "Slice", "Gather", "Expand", "Tile"),
)


@dataclass(frozen=True)
class Stop:
    """Where moved channels are computed with.

    Attributes:
        node: the node that reads them; None for an output of the graph.
        index: which of its operands.
        value: name of the tensor that arrives there.
    """

    node: ir.Node | None
    index: int
    value: str


def stops(source: ir.Value) -> list[Stop]:
    """Every place where something computes with `source`, behind operators that only move or scale it."""
    found: list[Stop] = []
    pending, seen = [source], {source}
    while pending:
        value = pending.pop(0)
        if value.is_graph_output():
            found.append(Stop(None, 0, value.name or ""))
        for use in value.uses():
            if use.node.graph is not None and _moves(use.node, use.idx):
                pending += [v for v in use.node.outputs if v not in seen]
                seen.update(use.node.outputs)
            elif not is_onnx(use.node, "Shape", "Size"):
                found.append(Stop(use.node, use.idx, value.name or ""))
    return found


def _moves(node: ir.Node, index: int) -> bool:
    if is_onnx(node, *MOVES):
        return index == 0
    if is_onnx(node, "Mul", "Div"):
        factor = constant(node.inputs[1 - index])
        return factor is not None and factor.size == 1 and (index == 0 or node.op_type == "Mul")
    return False


def carried(
    model: ir.Model, source: str, numbers: Array, targets: list[str], known: Mapping[str, Array]
) -> list[Channels]:
    """What arrives at `targets` where `source` holds numbers: the numbers again, at their new places.

    Args:
        model: the graph.
        source: name of the tensor that is replaced.
        numbers: from 0, of the shape that `source` has for these feeds.
        targets: names of tensors that only move or scale it.
        known: the graph's inputs and every other computed tensor that the way reads (shapes).

    Returns:
        For each target an array of its shape; -1 everywhere where it is no arrangement of multiples of the numbers.
    """
    from graphopt.executor import Session

    part = _between(model, source, targets, known)
    found = []
    with Session(part, optimize=False) as session:
        feeds = {s.name: known[s.name] for s in session.inputs if s.name != source}
        dtype = next(s.dtype for s in session.inputs if s.name == source)
        ones = session.run({**feeds, source: np.ones(numbers.shape, dtype)})
        ids = session.run({**feeds, source: (numbers + 1).astype(dtype)})
    for target in targets:
        factor = ones[target].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            number = ids[target].astype(np.float64) / factor
        whole = np.isfinite(number).all() and bool(np.abs(number - np.rint(number)).max(initial=0) < 1e-2)
        uniform = bool((factor == factor.ravel()[0]).all()) if factor.size else False
        good = whole and uniform
        found.append(np.rint(number).astype(np.int64) - 1 if good else np.full(factor.shape, -1, dtype=np.int64))
    return found


def _between(model: ir.Model, source: str, targets: list[str], known: Mapping[str, Array]) -> ir.Model:
    """The nodes that lead from `source` to `targets`, as a model that is fed `source` and everything known it reads."""
    from graphopt.slicing import reads_of

    made = {v.name: v for node in model.graph for v in node.outputs if v.name}
    nodes: dict[ir.Node, None] = {}
    reads: dict[ir.Value, None] = {}
    pending = [made[t] for t in targets]
    while pending:
        value = pending.pop()
        producer = value.producer()
        if value.name == source or value.name in known:
            reads[value] = None
        elif producer is not None and producer not in nodes:
            nodes[producer] = None
            pending += [v for v in reads_of(producer) if v.const_value is None or v.producer() is not None]
    order = [node for node in model.graph if node in nodes]
    used = {v: None for n in order for v in reads_of(n) if v.const_value is not None and v.producer() is None}
    constants = [v for v in used if model.graph.initializers.get(v.name or "") is v]
    view = ir.GraphView(
        [*reads, *(v for v in constants if model.ir_version < 4)], [made[t] for t in targets], nodes=order,
        initializers=constants, opset_imports=model.graph.opset_imports, name=model.graph.name or "part",
    )  # fmt: skip
    graph = view.clone()
    for value in (*graph.inputs, *graph.outputs):
        value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
