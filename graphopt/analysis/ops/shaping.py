"""Operators whose results are sizes, not data: they carry no units.

The size that `Shape` reads is pinned to the dense one when units are removed; a consumer that needs the new size
(Reshape, Expand, Resize, ...) is rewritten by its own rule. So a size that ends in arithmetic, an attention scale for
instance, keeps its dense value.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where
from graphopt.analysis.size_vectors import pin_output


@rule
class Shape(OpRule):
    """Sizes of its input, optionally from `start` to `end`."""

    ops = ("Shape",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        """A size carries no units, and reading one does not hold on to them, unless the graph tells it."""
        x = g.of(node.inputs[0])
        if node.outputs[0].is_graph_output():
            g.freeze(x, f"{where(node)}: its size is an output of the graph")

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        if source is None or shape is None:
            return
        start = int(node.attributes.get_int("start", 0) or 0)
        stop = node.attributes.get_int("end", len(shape))
        listed = list(range(len(shape)))[slice(start, stop)]
        dense = {place: r.size(source, axis) for place, axis in enumerate(listed) if r.shortened(source, axis)}
        pin_output(r, node, {place: size for place, size in dense.items() if size is not None}, len(listed))


@rule
class Counting(OpRule):
    """Size counts all elements, removed ones too."""

    ops = ("Size",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        g.freeze_node(node, f"{where(node)}: counts every element")


@rule
class Source(OpRule):
    """Operators without data operands."""

    ops = (
        *("Constant", "Range", "RandomNormal", "RandomUniform"),
        *("HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"),
    )

    def label(self, node: ir.Node, g: Labeller) -> None:
        """Their results are never shortened."""
