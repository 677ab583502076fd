"""Removing units: slice every parameter, rewrite every size, fold what dead units leave behind.

Names of nodes, values and parameters stay, so the model before and after can be matched tensor by tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.parameters import check_no_axis_empties, remember_kept, shorten_annotations, slice_parameters
from graphopt.analysis.rules import node_key, rule_for
from graphopt.analysis.scope import nodes_by_key, scopes, values_by_name
from graphopt.analysis.survivors import Survivors
from graphopt.rewriting.names import Names

if TYPE_CHECKING:
    from graphopt.analysis.dead_values import DeadValues
    from graphopt.analysis.units import Coupling


@dataclass
class RemovalReport:
    """What a removal changed.

    Attributes:
        sliced: parameters that became smaller: name -> (shape before, shape after).
        folded: nodes whose bias took over the constants of dead units.
        assumed_zero: nodes that read a dead unit whose value is not known to be a constant; it was taken as zero.
    """

    sliced: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    assumed_zero: list[str] = field(default_factory=list)


def remove_units(
    model: ir.Model, coupling: Coupling, dead: set[int], values: DeadValues | None = None
) -> RemovalReport:
    """Remove units from a model in place.

    Args:
        model: the model that `coupling` was computed on, or a clone of it.
        coupling: result of `graphopt.analysis.units.analyse`.
        dead: unit ids.
        values: what dead units leave behind; by default what they would if their producers were zeroed.

    Raises:
        GraphoptError: an axis would become empty.
    """
    removal = Removal(model, coupling, dead, values or coupling.dead_values(hypothetical=True))
    check_no_axis_empties(removal)
    nodes = [node for graph in scopes(model) for node in graph]
    for node in nodes:
        handler = rule_for(node)
        if handler is not None:
            handler.rewrite(node, removal)
    slice_parameters(removal)
    shorten_annotations(removal)
    remember_kept(removal)
    return removal.report


class Removal(Survivors):
    """One removal in progress: what rules see of it, and the edits they ask for."""

    def __init__(self, model: ir.Model, coupling: Coupling, dead: set[int], values: DeadValues) -> None:
        super().__init__(coupling, dead)
        self.model = model
        self.values = values
        self.report = RemovalReport()
        self.nodes = nodes_by_key(model)
        self.by_name = values_by_name(model)
        self.raw: dict[str, list[ir.Value]] = {}
        """Results that are scaled or added to before they get the name of the key: as large as it."""
        self._names = Names(model)

    # Operands --------------------------------------------------------------------------------------------------------

    def set_input(self, node: ir.Node, index: int, array: npt.NDArray[np.generic]) -> None:
        """Give a node a private constant operand."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self.new_constant(f"{node_key(node)}_input{index}", array, node.graph))

    def change_operand(
        self, node: ir.Node, index: int, change: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
    ) -> bool:
        """Give a node `change` of what the removal leaves of a constant operand, privately; False: it is computed."""
        value = node.inputs[index]
        old = self.left_of(node, index, value) if value is not None else None
        if old is None:
            return False
        self.uses.pop((node_key(node), index), None)
        self.set_input(node, index, change(old.astype(np.float64)).astype(old.dtype))
        return True

    def left_of(self, node: ir.Node, index: int, value: ir.Value) -> npt.NDArray[Any] | None:
        """What is left of a constant operand; None where it is computed."""
        array = shapes.constant(value)
        if array is None:
            return None
        for axis in range(array.ndim):
            mask = self.operand_mask(node, index, axis)
            array = array if mask is None else np.compress(mask, array, axis=axis)
        return array

    def pad_operand(self, node: ir.Node, index: int, counts: Mapping[int, int]) -> None:
        """Put zeros behind what is left of a computed operand, `counts` of them by axis."""
        source = node.inputs[index]
        assert source is not None
        shape = list(source.shape or ())
        array = np.zeros(2 * len(shape), dtype=np.int64)
        array[[len(shape) + axis for axis in counts]] = list(counts.values())
        left = [self.operand_count(node, index, a) if self._loses(node, index, a) else d for a, d in enumerate(shape)]
        sizes = [d + counts.get(a, 0) if isinstance(d, int) else d for a, d in enumerate(left)]
        pads = self.new_constant(f"{source.name}_pads", array, node.graph)
        pad = self.new_node("Pad", [source, pads], f"{source.name}_padded", source, sizes)
        node.prepend(pad)
        node.replace_input_with(index, pad.outputs[0])

    def _loses(self, node: ir.Node, index: int, axis: int) -> bool:
        return self.operand_mask(node, index, axis) is not None

    def insert_gather(self, node: ir.Node, axis: int, places: npt.NDArray[np.int64]) -> None:
        """Put a Gather of places after the removal before the first operand of a node.

        A parameter is from then on read by the Gather, which takes over how it is sliced.
        """
        source = node.inputs[0]
        assert source is not None
        sizes = None if source.shape is None else list(source.shape)
        if sizes is not None:
            sizes = [len(places) if a == axis else self._left(node, a, size) for a, size in enumerate(sizes)]
        index = self.new_constant(f"{node_key(node)}_places", places, node.graph)
        gather = self.new_node("Gather", [source, index], f"{node_key(node)}_take", source, sizes, axis=axis)
        node.prepend(gather)
        node.replace_input_with(0, gather.outputs[0])
        use = self.uses.pop((node_key(node), 0), None)
        if use is not None:
            moved = dataclasses.replace(use, node=node_key(gather), index=0)
            self.uses[moved.node, 0] = moved
            self.nodes[moved.node] = gather

    def _left(self, node: ir.Node, axis: int, size: Any) -> Any:
        """Size of an axis of the first operand after the removal."""
        mask = self.operand_mask(node, 0, axis)
        return size if mask is None else int(mask.sum())

    # Results ---------------------------------------------------------------------------------------------------------

    def multiply_output(self, node: ir.Node, factor: float) -> None:
        """Scale the result of a node; the scaled tensor keeps the name."""
        output = node.outputs[0]
        array = np.asarray(factor, dtype=(output.dtype or ir.DataType.FLOAT).numpy())
        self.insert_after(node, "Mul", self.new_constant(f"{output.name}_factor", array, node.graph))

    def add_to_output(self, node: ir.Node, value: ir.Value) -> None:
        """Add a value, computed before the node, to its own result, before what was put behind it; keeps the name."""
        self.insert_after(node, "Add", value)

    def cut_output(self, node: ir.Node, index: int, sizes: Mapping[int, int]) -> None:
        """Take the first positions of a result, so many by axis, under its name."""
        if index >= len(node.outputs) or not node.outputs[index].name:
            return
        name = node.outputs[index].name
        bounds = {"first": [0] * len(sizes), "end": list(sizes.values()), "axes": list(sizes)}
        values = [
            self.new_constant(f"{name}_{part}", np.asarray(numbers, dtype=np.int64), node.graph)
            for part, numbers in bounds.items()
        ]
        self.insert_after(node, "Slice", *values, index=index)

    def take_output(self, node: ir.Node, axis: int, places: npt.NDArray[np.int64]) -> None:
        """Take some positions of the first result along an axis, under its name."""
        index = self.new_constant(f"{node.outputs[0].name}_places", places, node.graph)
        self.insert_after(node, "Gather", index, axis=axis)

    def insert_after(self, node: ir.Node, op_type: str, *operands: ir.Value, index: int = 0, **given: int) -> None:
        """node -> op(node, operands), under the old output's name."""
        output = node.outputs[index]
        assert output.name is not None
        name = output.name
        users = list(output.uses())
        added = self.new_node(op_type, [output, *operands], f"{name}_{op_type}", output, output.shape, **given)
        result = added.outputs[0]
        node.append(added)
        for use in users:
            use.node.replace_input_with(use.idx, result)
        outputs = node.graph.outputs if node.graph is not None else []
        for place, value in enumerate(outputs):
            if value is output:
                outputs[place] = result
        output.name, result.name = self._names.fresh(f"{name}_raw"), name
        self.by_name[name], self.by_name[output.name] = result, output
        if op_type not in {"Slice", "Gather"}:  # what is taken from is larger
            self.raw.setdefault(name, []).append(output)

    # Pieces ----------------------------------------------------------------------------------------------------------

    def compute_before(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | float], stem: str) -> ir.Value:
        """The result of an operator that is put before a node; it is as large as its first input, which is a value.

        Numbers among the inputs become constants of the first one's type.
        """
        first = inputs[0]
        assert isinstance(first, ir.Value)
        kind = (first.dtype or ir.DataType.FLOAT).numpy()
        values = [
            v if isinstance(v, ir.Value) else self.new_constant(f"{stem}_factor", np.asarray(v, dtype=kind), node.graph)
            for v in inputs
        ]
        added = self.new_node(op_type, values, stem, first, first.shape)
        node.prepend(added)
        return added.outputs[0]

    def cast_before(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another type, cast before a node."""
        cast = self.new_node("Cast", [value], f"{value.name}_cast", value, value.shape, to=int(dtype))
        cast.outputs[0].type = ir.TensorType(dtype)
        node.prepend(cast)
        return cast.outputs[0]

    def new_node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        stem: str,
        like: ir.Value,
        sizes: Iterable[Any] | None,
        **given: int,
    ) -> ir.Node:
        """A node with names, its output typed as `like` and of these sizes."""
        name = self._names.fresh(stem)
        node = ir.node(op_type, inputs, attributes=given, name=name)
        result = node.outputs[0]
        result.name, result.type = name, like.type
        result.shape = None if sizes is None else ir.Shape(list(sizes))
        return node

    def new_constant(self, name: str, array: npt.NDArray[Any], graph: ir.Graph | ir.Function | None) -> ir.Value:
        """A new initializer of the graph that needs it, which may be the body of an If, Loop or Scan."""
        name = self._names.fresh(name)
        value = ir.Value(
            name=name,
            const_value=ir.Tensor(array, name=name),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        (graph if isinstance(graph, ir.Graph) else self.model.graph).register_initializer(value)
        return value
