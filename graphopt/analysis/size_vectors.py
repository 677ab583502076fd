"""Vectors of sizes that nodes compute with or read: what a removal writes into them.

A shape operand is rewritten privately for its node; the result of a Shape is pinned for all that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes

if TYPE_CHECKING:
    from graphopt.analysis.remove import Removal


def set_sizes(removal: Removal, node: ir.Node, index: int, axes: Sequence[int] | None = None) -> None:
    """Write the new sizes of shortened output axes into a shape operand, privately for this node.

    Entries that say "as the input" (0), "the rest" (-1) or "broadcast" (1) stay; a computed shape is patched.

    Args:
        removal: in progress.
        node: the node; `index`: its shape operand.
        axes: the axis that each entry sizes; None: the last axes of the result, as Expand counts them.
    """
    output = node.outputs[0]
    shape, operand = shapes.dims(output), node.inputs[index] if index < len(node.inputs) else None
    if shape is None or operand is None:
        return
    given = shapes.dims(operand)
    length = given[0] if given and isinstance(given[0], int) else len(shape)
    sized = range(len(shape) - length, len(shape)) if axes is None else axes
    new = {k: removal.count(output, a, 0) for k, a in enumerate(sized) if removal.shortened(output, a)}
    if not new:
        return
    known = shapes.elements(operand)
    if known is not None:
        new = {k: size for k, size in new.items() if known[k] not in {-1, 0, 1}}
    if new:
        set_entries(removal, node, index, new, length)


def set_entries(removal: Removal, node: ir.Node, index: int, new: dict[int, int], length: int) -> None:
    """Change entries of a vector of sizes, privately for this node; a computed one is patched.

    Args:
        removal: in progress.
        node: the node; `index`: its operand.
        new: entries by place.
        length: of the vector.
    """
    operand = node.inputs[index]
    assert operand is not None
    array = shapes.integer_array(operand)
    if array is not None:
        changed = array.copy()
        for place, size in new.items():
            changed[place] = size
        removal.set_input(node, index, changed.astype((operand.dtype or ir.DataType.INT64).numpy()))
    else:
        node.replace_input_with(index, _patched(removal, node, operand, new, length, before=True))


def pin_output(removal: Removal, node: ir.Node, values: dict[int, int], length: int) -> None:
    """Keep entries of a computed size vector at given values for all its consumers."""
    if not values:
        return
    output = node.outputs[0]
    users = list(output.uses())
    patched = _patched(removal, node, output, values, length, before=False)
    for use in users:
        use.node.replace_input_with(use.idx, patched)


def _patched(
    removal: Removal, node: ir.Node, vector: ir.Value, values: dict[int, int], length: int, *, before: bool
) -> ir.Value:
    """Concat of constants at `values` and the computed entries elsewhere."""
    pieces: list[ir.Value] = []
    nodes: list[ir.Node] = []
    for place in range(length):
        if place in values:
            size = np.asarray([values[place]], dtype=(vector.dtype or ir.DataType.INT64).numpy())
            pieces.append(removal.new_constant(f"{vector.name}_pinned", size, node.graph))
            continue
        index = removal.new_constant(f"{vector.name}_place", np.asarray([place], dtype=np.int64), node.graph)
        nodes.append(removal.new_node("Gather", [vector, index], f"{vector.name}_entry", vector, [1]))
        pieces.append(nodes[-1].outputs[0])
    nodes.append(removal.new_node("Concat", pieces, f"{vector.name}_sizes", vector, [length], axis=0))
    if before:
        node.prepend(nodes)
    else:
        node.append(nodes)
    return nodes[-1].outputs[0]
