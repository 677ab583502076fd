"""Slices of parameters: what a removal leaves of them, of the shapes on record, and what it tells later readers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.analysis.remove import Removal
    from graphopt.analysis.rules import Use

KEPT = "graphopt.kept"
"""Key of a node's `meta`: by operand and axis, the positions of the parameter as it once was that are left."""


def check_no_axis_empties(removal: Removal) -> None:
    """Refuse a removal that leaves nothing of an axis."""
    for name, axes in removal.coupling.labelled():
        for axis, factors in axes.items():
            mask = removal.staying(factors)
            if mask is not None and not mask.any():
                raise GraphoptError(
                    f"removing these units would leave nothing of axis {axis}", where=name, hint="keep at least one"
                )


def slice_parameters(removal: Removal) -> None:
    """Take the surviving slices of every parameter; a vector whose uses need different slices gets copies."""
    groups: dict[str, dict[tuple[Any, ...], list[Use]]] = defaultdict(lambda: defaultdict(list))
    for use in removal.uses.values():
        masks = {axis: removal.use_mask(use, axis) for axis in use.axes}
        key = tuple((axis, mask.tobytes()) for axis, mask in sorted(masks.items()) if mask is not None)
        groups[use.parameter][key].append(use)
    for name, by_mask in groups.items():
        value = removal.by_name.get(name)
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
            for axis in uses[0].axes:
                mask = removal.use_mask(uses[0], axis)
                if mask is not None:
                    array = np.compress(mask, array, axis=axis)
            array = np.ascontiguousarray(array)
            removal.report.sliced[name] = (tuple(dense.shape), tuple(array.shape))
            if alone:
                shapes.set_constant(value, array)
                continue
            copy = removal.new_constant(name, array, value.graph)
            for use in uses:
                removal.nodes[use.node].replace_input_with(use.index, copy)
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            _forget(value)


def _forget(value: ir.Value) -> None:
    """Take out an initializer that only had copies made of it; one that is listed as an input stays an input."""
    if not value.is_graph_input() and isinstance(value.graph, ir.Graph):
        del value.graph.initializers[value.name or ""]


def remember_kept(removal: Removal) -> None:
    """Tell every node which positions of its parameters are left, counted from the first removal of all."""
    for use in removal.coupling.uses:
        for axis in use.axes:
            mask = removal.use_mask(use, axis)
            node = removal.nodes.get(use.node)
            if mask is not None and node is not None:
                known = node.meta.get(KEPT, {})
                left = known.get(use.index, {}).get(axis)
                if left is None or len(left) != len(mask):  # a norm's gain is as wide as it was: see `padding`
                    left = np.arange(len(mask))
                left = left[mask]
                # never in place: clones share what is in `meta`
                node.meta[KEPT] = {**known, use.index: {**known.get(use.index, {}), axis: left}}


def shorten_annotations(removal: Removal) -> None:
    """Bring the recorded shapes of activations up to date."""
    for name, axes in removal.coupling.labelled():
        value = removal.by_name.get(name)
        if value is None or value.shape is None or shapes.constant_tensor(value) is not None:
            continue
        sizes = list(value.shape)
        for axis, factors in axes.items():
            mask = removal.staying(factors)
            if mask is not None:
                sizes[axis] = int(mask.sum())
        for same in (value, *removal.raw.get(name, ())):
            same.shape = ir.Shape(sizes)
