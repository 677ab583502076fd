"""Removing units: slice every parameter, rewrite every size, fold what dead units leave behind.

Names of nodes, values and parameters stay, so the model before and after can be matched tensor by tensor.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import node_key
from graphopt.analysis.scope import nodes_by_key, scopes, values_by_name
from graphopt.errors import GraphoptError
from graphopt.rewriting.edit import Names

if TYPE_CHECKING:
    from graphopt.analysis.dead_values import DeadValues
    from graphopt.analysis.rules import Use
    from graphopt.analysis.units import Coupling

Mask = npt.NDArray[np.bool_]

KEPT = "graphopt.kept"
"""Key of a node's `meta`: by operand and axis, the positions of the parameter as it once was that are left."""


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
    from graphopt.analysis.rules import rule_for

    removal = Removal(model, coupling, dead, values or coupling.dead_values(hypothetical=True))
    removal.check_no_axis_empties()
    nodes = [node for graph in scopes(model) for node in graph]
    for node in nodes:
        handler = rule_for(node)
        if handler is not None:
            handler.rewrite(node, removal)
    removal.slice_parameters()
    removal.shorten_annotations()
    removal.remember_kept()
    return removal.report


class Removal:
    """One removal in progress: what rules see of it, and the edits they ask for."""

    def __init__(self, model: ir.Model, coupling: Coupling, dead: set[int], values: DeadValues) -> None:
        self.model = model
        self.coupling = coupling
        self.values = values
        self.report = RemovalReport()
        self._alive = np.ones(len(coupling.units) + 1, dtype=bool)
        self._alive[list(dead)] = False
        self._uses: dict[tuple[str, int], Use] = {(use.node, use.index): use for use in coupling.uses}
        self._nodes = nodes_by_key(model)
        self._values = values_by_name(model)
        self._raw: dict[str, list[ir.Value]] = {}
        """Results that are scaled or added to before they get the name of the key: as large as it."""
        self._names = Names(model)

    # Questions -------------------------------------------------------------------------------------------------------

    def mask(self, value: ir.Value, axis: int) -> Mask | None:
        """Which positions of a computed value's axis stay; None where all do."""
        return self._mask(self.coupling.axis_units(value.name or "", axis))

    def shortened(self, value: ir.Value, axis: int) -> bool:
        """True where the axis loses positions."""
        return self.mask(value, axis) is not None

    def size(self, value: ir.Value, axis: int) -> int | None:
        """Size of an axis before the removal; None for a symbolic one."""
        shape = shapes.dims(value)
        found = shape[axis] if shape is not None else None
        return found if isinstance(found, int) else None

    def count(self, value: ir.Value, axis: int, default: int) -> int:
        """Size of an axis after the removal."""
        mask = self.mask(value, axis)
        return default if mask is None else int(mask.sum())

    def operand_mask(self, node: ir.Node, index: int, axis: int) -> Mask | None:
        """As `mask`, for an operand of a node, which may be a parameter."""
        use = self._uses.get((node_key(node), index))
        if use is not None:
            return self._mask(self.coupling.solution.units(use.axes.get(axis, ())))
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.mask(value, axis)

    def operand_count(self, node: ir.Node, index: int, axis: int) -> int:
        """Size of an operand's axis after the removal; its shape must be known."""
        mask = self.operand_mask(node, index, axis)
        if mask is not None:
            return int(mask.sum())
        value = node.inputs[index]
        size = self.size(value, axis) if value is not None else None
        assert size is not None
        return size

    def operand_places(
        self, node: ir.Node, index: int, axis: int, positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where dense positions of an operand's axis are after the removal; removed ones are left out."""
        mask = self.operand_mask(node, index, axis)
        if mask is None:
            return positions
        return (np.cumsum(mask) - 1)[positions[mask[positions]]]

    def _mask(self, factors: tuple[npt.NDArray[np.int64], ...]) -> Mask | None:
        if not factors:
            return None
        mask = np.logical_and.reduce([self._alive[vector] for vector in factors])
        return None if mask.all() else mask

    # Edits -----------------------------------------------------------------------------------------------------------

    def set_input(self, node: ir.Node, index: int, array: npt.NDArray[np.generic]) -> None:
        """Give a node a private constant operand."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self._constant(f"{node_key(node)}_input{index}", array, node.graph))

    def set_sizes(self, node: ir.Node, index: int, axes: Sequence[int] | None = None) -> None:
        """Write the new sizes of shortened output axes into a shape operand, privately for this node.

        Entries that say "as the input" (0), "the rest" (-1) or "broadcast" (1) stay; a computed shape is patched.

        Args:
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
        new = {k: self.count(output, a, 0) for k, a in enumerate(sized) if self.shortened(output, a)}
        if not new:
            return
        known = shapes.elements(operand)
        if known is not None:
            new = {k: size for k, size in new.items() if not isinstance(known[k], int) or known[k] > 1}  # type: ignore[operator]
        if new:
            self.set_entries(node, index, new, length)

    def set_entries(self, node: ir.Node, index: int, new: dict[int, int], length: int) -> None:
        """Change entries of a vector of sizes, privately for this node; a computed one is patched.

        Args:
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
            self.set_input(node, index, changed.astype((operand.dtype or ir.DataType.INT64).numpy()))
        else:
            node.replace_input_with(index, self._patch_vector(node, operand, new, length, before=True))

    def pin_output(self, node: ir.Node, values: dict[int, int], length: int) -> None:
        """Keep entries of a computed size vector at given values for all its consumers."""
        if not values:
            return
        output = node.outputs[0]
        users = list(output.uses())
        patched = self._patch_vector(node, output, values, length, before=False)
        for use in users:
            use.node.replace_input_with(use.idx, patched)

    def _patch_vector(
        self, node: ir.Node, vector: ir.Value, values: dict[int, int], length: int, *, before: bool
    ) -> ir.Value:
        """Concat of constants at `values` and the computed entries elsewhere."""
        pieces: list[ir.Value] = []
        nodes: list[ir.Node] = []
        for place in range(length):
            if place in values:
                size = np.asarray([values[place]], dtype=(vector.dtype or ir.DataType.INT64).numpy())
                pieces.append(self._constant(f"{vector.name}_pinned", size, node.graph))
                continue
            index = self._constant(f"{vector.name}_place", np.asarray([place], dtype=np.int64), node.graph)
            nodes.append(self._node("Gather", [vector, index], f"{vector.name}_entry", vector, [1]))
            pieces.append(nodes[-1].outputs[0])
        nodes.append(self._node("Concat", pieces, f"{vector.name}_sizes", vector, [length], axis=0))
        if before:
            node.prepend(nodes)
        else:
            node.append(nodes)
        return nodes[-1].outputs[0]

    def _node(
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

    def insert_gather(self, node: ir.Node, axis: int, places: npt.NDArray[np.int64]) -> None:
        """Put a Gather of places after the removal before the first operand of a node.

        A parameter is from then on read by the Gather, which takes over how it is sliced.
        """
        source = node.inputs[0]
        assert source is not None
        sizes = None if source.shape is None else list(source.shape)
        if sizes is not None:
            sizes = [len(places) if a == axis else self._left(node, a, size) for a, size in enumerate(sizes)]
        index = self._constant(f"{node_key(node)}_places", places, node.graph)
        gather = self._node("Gather", [source, index], f"{node_key(node)}_take", source, sizes, axis=axis)
        node.prepend(gather)
        node.replace_input_with(0, gather.outputs[0])
        use = self._uses.pop((node_key(node), 0), None)
        if use is not None:
            moved = dataclasses.replace(use, node=node_key(gather), index=0)
            self._uses[moved.node, 0] = moved
            self._nodes[moved.node] = gather

    def _left(self, node: ir.Node, axis: int, size: Any) -> Any:
        """Size of an axis of the first operand after the removal."""
        mask = self.operand_mask(node, 0, axis)
        return size if mask is None else int(mask.sum())

    def multiply_output(self, node: ir.Node, factor: float) -> None:
        """Scale the result of a node; the scaled tensor keeps the name."""
        output = node.outputs[0]
        array = np.asarray(factor, dtype=(output.dtype or ir.DataType.FLOAT).numpy())
        self._insert_after(node, "Mul", self._constant(f"{output.name}_factor", array, node.graph))

    def add_to_output(self, node: ir.Node, value: ir.Value) -> None:
        """Add a value, computed before the node, to its own result, before what was put behind it; keeps the name."""
        self._insert_after(node, "Add", value)

    def compute_before(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | float], stem: str) -> ir.Value:
        """The result of an operator that is put before a node; it is as large as its first input, which is a value.

        Numbers among the inputs become constants of the first one's type.
        """
        first = inputs[0]
        assert isinstance(first, ir.Value)
        kind = (first.dtype or ir.DataType.FLOAT).numpy()
        values = [
            v if isinstance(v, ir.Value) else self._constant(f"{stem}_factor", np.asarray(v, dtype=kind), node.graph)
            for v in inputs
        ]
        added = self._node(op_type, values, stem, first, first.shape)
        node.prepend(added)
        return added.outputs[0]

    def cast_before(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another type, cast before a node."""
        cast = self._node("Cast", [value], f"{value.name}_cast", value, value.shape, to=int(dtype))
        cast.outputs[0].type = ir.TensorType(dtype)
        node.prepend(cast)
        return cast.outputs[0]

    def change_operand(
        self, node: ir.Node, index: int, change: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
    ) -> bool:
        """Give a node `change` of what the removal leaves of a constant operand, privately; False: it is computed."""
        value = node.inputs[index]
        old = self._sliced(node, index, value) if value is not None else None
        if old is None:
            return False
        self._uses.pop((node_key(node), index), None)
        self.set_input(node, index, change(old.astype(np.float64)).astype(old.dtype))
        return True

    def pad_operand(self, node: ir.Node, index: int, counts: Mapping[int, int]) -> None:
        """Put zeros behind what is left of a computed operand, `counts` of them by axis."""
        source = node.inputs[index]
        assert source is not None
        shape = list(source.shape or ())
        array = np.zeros(2 * len(shape), dtype=np.int64)
        array[[len(shape) + axis for axis in counts]] = list(counts.values())
        left = [self.operand_count(node, index, a) if self._loses(node, index, a) else d for a, d in enumerate(shape)]
        sizes = [d + counts.get(a, 0) if isinstance(d, int) else d for a, d in enumerate(left)]
        pads = self._constant(f"{source.name}_pads", array, node.graph)
        pad = self._node("Pad", [source, pads], f"{source.name}_padded", source, sizes)
        node.prepend(pad)
        node.replace_input_with(index, pad.outputs[0])

    def _loses(self, node: ir.Node, index: int, axis: int) -> bool:
        return self.operand_mask(node, index, axis) is not None

    def cut_output(self, node: ir.Node, index: int, sizes: Mapping[int, int]) -> None:
        """Take the first positions of a result, so many by axis, under its name."""
        if index >= len(node.outputs) or not node.outputs[index].name:
            return
        name = node.outputs[index].name
        bounds = {"first": [0] * len(sizes), "end": list(sizes.values()), "axes": list(sizes)}
        values = [
            self._constant(f"{name}_{part}", np.asarray(numbers, dtype=np.int64), node.graph)
            for part, numbers in bounds.items()
        ]
        self._insert_after(node, "Slice", *values, index=index)

    def _insert_after(self, node: ir.Node, op_type: str, *operands: ir.Value, index: int = 0) -> None:
        """node -> op(node, operands), under the old output's name."""
        output = node.outputs[index]
        assert output.name is not None
        name = output.name
        users = list(output.uses())
        added = self._node(op_type, [output, *operands], f"{name}_{op_type}", output, output.shape)
        result = added.outputs[0]
        node.append(added)
        for use in users:
            use.node.replace_input_with(use.idx, result)
        outputs = node.graph.outputs if node.graph is not None else []
        for place, value in enumerate(outputs):
            if value is output:
                outputs[place] = result
        output.name, result.name = self._names.fresh(f"{name}_raw"), name
        self._values[name], self._values[output.name] = result, output
        if op_type != "Slice":  # what is sliced is larger
            self._raw.setdefault(name, []).append(output)

    def fold_constants(
        self,
        node: ir.Node,
        source: ir.Value,
        axis: int,
        *,
        weight: int,
        bias: int | None,
        transposed: bool = False,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        """Add what dead inputs contribute to the bias of a linear node: alpha X W + beta B; see module docstring.

        A bias that cannot take it (there is none to have, it is computed, or beta is 0) gets an Add behind the node.

        Args:
            node: the node.
            source: its data input, with the contracted `axis`.
            axis: the contracted axis.
            weight: index of the weight operand, laid out [out, in, ...], or [in, out] if `transposed`.
            bias: index of the bias operand; None where the operator has none.
            transposed: layout of the weight.
            alpha: factor of the product.
            beta: factor of the bias.
        """
        mask = self.mask(source, axis)
        if mask is None:
            return
        dead = np.flatnonzero(~mask)
        held = self.values.held(source, axis, ~self._alive)[dead]
        array = shapes.constant(node.inputs[weight])
        if array is None:  # nothing but zeros can be folded where the weight is computed
            held = np.where(held == 0, 0.0, np.nan)
        if np.isnan(held).any():
            self.report.assumed_zero.append(node.name or node_key(node))
        held = np.nan_to_num(held, nan=0.0)
        if array is None or not held.any():
            return
        rows = np.take(array, dead, axis=0 if transposed else 1).astype(np.float64)
        rows = rows if transposed else rows.reshape(*rows.shape[:2], -1).sum(axis=2).T
        delta = alpha * (held @ rows)
        kept = self.operand_mask(node, weight, 1 if transposed else 0)
        delta = delta if kept is None else delta[kept]
        self.report.folded.append(node.name or node_key(node))
        given = node.inputs[bias] if bias is not None and bias < len(node.inputs) else None
        old = self._sliced(node, bias, given) if bias is not None and given is not None else None
        if bias is None or not beta or (given is not None and old is None):
            shape = (-1,) if transposed or array.ndim == 2 else (-1, *(1,) * (array.ndim - 2))
            added = delta.astype(array.dtype).reshape(shape)
            self._insert_after(node, "Add", self._constant(f"{node_key(node)}_bias", added, node.graph))
            return
        delta = delta / beta if old is None else old.astype(np.float64) + delta / beta
        self._uses.pop((node_key(node), bias), None)
        self.set_input(node, bias, delta.astype(array.dtype))

    def _sliced(self, node: ir.Node, index: int, value: ir.Value) -> npt.NDArray[Any] | None:
        """What is left of a constant operand; None where it is computed."""
        array = shapes.constant(value)
        if array is None:
            return None
        for axis in range(array.ndim):
            mask = self.operand_mask(node, index, axis)
            array = array if mask is None else np.compress(mask, array, axis=axis)
        return array

    def _constant(self, name: str, array: npt.NDArray[Any], graph: ir.Graph | ir.Function | None) -> ir.Value:
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

    # Parameters and annotations --------------------------------------------------------------------------------------

    def check_no_axis_empties(self) -> None:
        """Refuse a removal that leaves nothing of an axis."""
        for name, axes in self.coupling.labelled():
            for axis, factors in axes.items():
                mask = self._mask(factors)
                if mask is not None and not mask.any():
                    raise GraphoptError(
                        f"removing these units would leave nothing of axis {axis}", where=name, hint="keep at least one"
                    )

    def slice_parameters(self) -> None:
        """Take the surviving slices of every parameter; a vector whose uses need different slices gets copies."""
        groups: dict[str, dict[tuple[Any, ...], list[Use]]] = defaultdict(lambda: defaultdict(list))
        for use in self._uses.values():
            masks = {axis: self._mask(self.coupling.solution.units(f)) for axis, f in use.axes.items()}
            key = tuple((axis, mask.tobytes()) for axis, mask in sorted(masks.items()) if mask is not None)
            groups[use.parameter][key].append(use)
        for name, by_mask in groups.items():
            value = self._values.get(name)
            if value is None or not any(by_mask):
                continue
            expected = sum(len(uses) for uses in by_mask.values())
            alone = len(by_mask) == 1 and expected == len(value.uses()) and not value.is_graph_output()
            dense = shapes.constant(value)
            assert dense is not None
            for key, uses in by_mask.items():
                if not key:
                    continue
                array = dense
                for axis, factors in uses[0].axes.items():
                    mask = self._mask(self.coupling.solution.units(factors))
                    if mask is not None:
                        array = np.compress(mask, array, axis=axis)
                array = np.ascontiguousarray(array)
                self.report.sliced[name] = (tuple(dense.shape), tuple(array.shape))
                if alone:
                    shapes.set_constant(value, array)
                    continue
                copy = self._constant(name, array, value.graph)
                for use in uses:
                    self._nodes[use.node].replace_input_with(use.index, copy)
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                self._forget(value)

    def _forget(self, value: ir.Value) -> None:
        """Take out an initializer that only had copies made of it; one that is listed as an input stays an input."""
        if not value.is_graph_input() and isinstance(value.graph, ir.Graph):
            del value.graph.initializers[value.name or ""]

    def remember_kept(self) -> None:
        """Tell every node which positions of its parameters are left, counted from the first removal of all."""
        for use in self.coupling.uses:
            for axis, factors in use.axes.items():
                mask = self._mask(self.coupling.solution.units(factors))
                node = self._nodes.get(use.node)
                if mask is not None and node is not None:
                    known = node.meta.get(KEPT, {})
                    left = known.get(use.index, {}).get(axis)
                    if left is None or len(left) != len(mask):  # a norm's gain is as wide as it was: see `padding`
                        left = np.arange(len(mask))
                    left = left[mask]
                    # never in place: clones share what is in `meta`
                    node.meta[KEPT] = {**known, use.index: {**known.get(use.index, {}), axis: left}}

    def shorten_annotations(self) -> None:
        """Bring the recorded shapes of activations up to date."""
        for name, axes in self.coupling.labelled():
            value = self._values.get(name)
            if value is None or value.shape is None or shapes.constant_tensor(value) is not None:
                continue
            sizes = list(value.shape)
            for axis, factors in axes.items():
                mask = self._mask(factors)
                if mask is not None:
                    sizes[axis] = int(mask.sum())
            for same in (value, *self._raw.get(name, ())):
                same.shape = ir.Shape(sizes)
