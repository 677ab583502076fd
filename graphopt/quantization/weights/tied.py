"""Tables that a product shares with look-ups: once the product has integers, the look-ups read those, not floats.

    y = float(Gather(integers, i)) * Gather(scale, i)           integers (rows, columns), a scale for each row
    y = float(Transpose(Gather(integers, i, axis=1))) * ...     integers (columns, rows), as some products want them

Otherwise the file would hold the table twice, and be larger than before (the last layer of a language model is often
its table of embeddings). Only the rows that are read become floats.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import drop_if_unused, new_initializer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx


class Stored(NamedTuple):
    """A weight that has integers now.

    Attributes:
        old: the constant that held it.
        integers: (rows, columns), or turned.
        scale: one for each row, (rows,).
        rows: axis of the rows in `integers`.
    """

    old: ir.Value
    integers: ir.Value
    scale: ir.Value
    rows: int


def share(model: ir.Model, stored: Iterable[Stored]) -> list[str]:
    """Let look-ups of rows read the integers of a weight where no one else reads its floats any more.

    Does not fire where the table is an output of the graph, where a look-up takes another axis, where the rank of the
    indices is unknown though the integers are turned, or where there is one scale for all.

    Args:
        model: changed in place.
        stored: weights whose integers have zero point 0.

    Returns:
        names of the tables that are gone.
    """
    names = Names(model)
    gone = []
    for weight in stored:
        old = weight.old
        uses = list(old.uses())
        if not uses or old.is_graph_output() or not all(_looks_up_rows(use.node, weight) for use in uses):
            continue
        if constant(old) is None or constant(weight.scale) is None or not _fits(old, weight):
            continue
        scale = _column(model, weight.scale, names)
        for use in uses:
            _read_integers(use.node, weight, scale, names)
        gone.append(str(old.name))
        drop_if_unused(old)
    return gone


def _fits(old: ir.Value, weight: Stored) -> bool:
    table, integers, scale = constant(old), constant(weight.integers), constant(weight.scale)
    assert table is not None and scale is not None
    if integers is None or len(table.shape) != 2:
        return False
    rows, columns = table.shape.numpy()
    turned = (rows, columns) if weight.rows == 0 else (columns, rows)
    return tuple(integers.shape.numpy()) == turned and tuple(scale.shape.numpy()) == (rows,)


def _looks_up_rows(node: ir.Node, weight: Stored) -> bool:
    if not is_onnx(node, "Gather") or node.inputs[0] is not weight.old:
        return False
    axis, indices = node.attributes.get_int("axis", 0), node.inputs[1]
    if axis != 0:
        return False
    return weight.rows == 0 or (indices is not None and indices.shape is not None)


def _column(model: ir.Model, scale: ir.Value, names: Names) -> ir.Value:
    """The scales as (rows, 1), whose rows broadcast against those of the table."""
    tensor = constant(scale)
    assert tensor is not None
    data = np.asarray(tensor.numpy()).reshape(-1, 1)
    return new_initializer(model.graph, names.fresh(f"{scale.name}_by_row"), data, ir.DataType.FLOAT)


def _read_integers(node: ir.Node, weight: Stored, scale: ir.Value, names: Names) -> None:
    graph, output, indices = node.graph, node.outputs[0], node.inputs[1]
    assert graph is not None
    stem = node.name or str(output.name)
    steps = [ir.node("Gather", [weight.integers, indices], {"axis": weight.rows})]
    if weight.rows:
        assert indices is not None and indices.shape is not None
        rank = len(indices.shape)
        steps.append(ir.node("Transpose", [steps[-1].outputs[0]], {"perm": [*range(1, rank + 1), 0]}))
    steps.append(ir.node("Cast", [steps[-1].outputs[0]], {"to": int(ir.DataType.FLOAT)}))
    steps.append(ir.node("Gather", [scale, indices], {"axis": 0}))
    steps.append(ir.node("Mul", [steps[-2].outputs[0], steps[-1].outputs[0]]))
    for step in steps:
        step.name = names.fresh(f"{stem}_{step.op_type}")
        step.outputs[0].name = names.fresh(f"{step.name}_0")
    ir.convenience.replace_nodes_and_values(graph, node, [node], steps, [output], [steps[-1].outputs[0]])
