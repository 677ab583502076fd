"""From a pruned ONNX model back to the parameters of the module it was exported from.

Parameters are followed by their uses: operand i of a node of the dense model is operand i of the same node of the
pruned one, which may have another name there (a bias that took over constants). The node remembers which positions of
each axis are left (`graphopt.analysis.parameters`), and `Moved` tells which element of which parameter stands at each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.parameters import KEPT
from graphopt.fx.layout import Moved

Array = npt.NDArray[Any]
ORIGIN = "graphopt.origin"
"""Key of a node's `meta`: its number in the dense model; nodes that a pass inserted have none."""


@dataclass
class Carried:
    """What becomes of the module's parameters.

    Attributes:
        values: new arrays by parameter, also of those that only changed their values.
        kept: by parameter, the positions left of every axis.
        biases: what layers that had no bias add now, by the name of their weight; on top of a bias they have.
        problems: what cannot be carried over: a sentence and the parameter it is about.
    """

    values: dict[str, Array] = field(default_factory=dict)
    kept: dict[str, list[npt.NDArray[np.intp]]] = field(default_factory=dict)
    biases: dict[str, Array] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def number_nodes(model: ir.Model) -> None:
    """Give every node of the dense model a number that clones and passes keep."""
    for number, node in enumerate(model.graph):
        node.meta[ORIGIN] = number


def carry_over(
    dense: ir.Model, pruned: ir.Model, moved: Mapping[str, Moved], parameters: Mapping[str, tuple[int, ...]]
) -> Carried:
    """Find the new value and the kept positions of every parameter.

    Args:
        dense: the exported model, its nodes numbered.
        pruned: what passes made of it.
        moved: how stored tensors of the dense model follow from parameters (`Exported.moved`).
        parameters: shapes of the module's parameters and buffers, by name.
    """
    found = Carried()
    after = {node.meta[ORIGIN]: node for node in pruned.graph if ORIGIN in node.meta}
    elements: dict[str, tuple[Array, Array]] = {}
    for node in dense.graph:
        now = after.get(node.meta[ORIGIN])
        for index, value in enumerate(node.inputs):
            name = value.name or "" if value is not None else ""
            if value is None or not value.is_initializer() or not (name in moved or name in parameters):
                continue
            operand = now.inputs[index] if now is not None and index < len(now.inputs) else None
            array = shapes.constant(operand)
            if now is None or array is None:
                found.problems.append((f"'{name}' is not read by {node.name or node.op_type} any more", name))
                continue
            _place(found, elements, name, array, now.meta.get(KEPT, {}).get(index, {}), moved, parameters)
        if now is not None:
            _added_bias(found, node, now)
    for name, (new, alive) in elements.items():
        places = [np.flatnonzero(alive.any(tuple(b for b in range(alive.ndim) if b != a))) for a in range(alive.ndim)]
        box = np.ix_(*places)
        if alive.ndim and not alive[box].all():
            found.problems.append((f"what is left of '{name}' is no box", name))
            continue
        found.kept[name], found.values[name] = places, new[box] if alive.ndim else new
    return found


def _place(
    found: Carried,
    elements: dict[str, tuple[Array, Array]],
    name: str,
    array: Array,
    kept: Mapping[int, Array],
    moved: Mapping[str, Moved],
    parameters: Mapping[str, tuple[int, ...]],
) -> None:
    """Write the elements of one operand to where they stand in the parameters."""
    source = moved.get(name)
    names = list(dict.fromkeys(source.parameters())) if source is not None else [name]
    numbers, start = {}, 0
    for each in names:
        size = int(np.prod(parameters[each], dtype=np.int64))
        numbers[each] = np.arange(start, start + size, dtype=np.int64).reshape(parameters[each])
        start += size
    places = source.evaluate(numbers) if source is not None else numbers[name]
    for axis, positions in kept.items():
        places = np.take(places, positions, axis)
    if places.shape != array.shape:
        found.problems.append((f"'{name}' became {list(array.shape)}, which is more than a cut", name))
        return
    for each in names:
        first = int(numbers[each].flat[0]) if numbers[each].size else 0
        mine = (places >= first) & (places < first + numbers[each].size)
        at = places[mine] - first
        new, alive = np.zeros(numbers[each].size, array.dtype), np.zeros(numbers[each].size, dtype=bool)
        new[at], alive[at] = array[mine], True
        before = elements.get(each)
        shape = parameters[each]
        new, alive = new.reshape(shape), alive.reshape(shape)
        if before is None:
            elements[each] = new, alive
        elif not np.array_equal(before[1], alive) or not np.allclose(before[0], new, rtol=1e-6, atol=1e-7):
            found.problems.append((f"the uses of '{each}' were cut or refitted differently", each))


def _added_bias(found: Carried, node: ir.Node, now: ir.Node) -> None:
    """A bias where a layer had none, and constants that a pass adds behind a product."""
    weight = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if weight is None or node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
        return
    extra: Array | None = None
    had = len(node.inputs) > 2 and node.inputs[2] is not None
    if not had and node.op_type != "MatMul" and len(now.inputs) > 2:
        extra = shapes.constant(now.inputs[2])
    uses = list(now.outputs[0].uses())
    if len(uses) == 1 and ORIGIN not in uses[0].node.meta and uses[0].node.op_type == "Add":
        added = shapes.constant(uses[0].node.inputs[1 - uses[0].idx])
        extra = added if extra is None or added is None else extra + added.ravel()
    if extra is not None:
        found.biases[weight] = np.asarray(extra).ravel()
