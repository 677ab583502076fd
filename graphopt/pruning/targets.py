"""What a layer is fitted to: its own output, or the sum that it enters, above zero where only a Relu reads it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.rewriting.layers import Layer
from graphopt.rewriting.nodes import is_onnx


@dataclass(frozen=True)
class Target:
    """What a layer is fitted to.

    Attributes:
        total: name of the tensor that is compared: the layer's output, or the sum that it enters.
        relu: only what is above zero counts.
    """

    total: str
    relu: bool


def target_of(layer: Layer, unfitted: set[ir.Node]) -> Target:
    """Follow the output through sums whose other side is final, to the Relu behind them if there is one.

    Args:
        layer: the layer to fit.
        unfitted: nodes of layers that are fitted later; what depends on them is not final.
    """
    value = layer.linear.output
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        node = uses[0].node
        if not is_onnx(node, "Add") or node.graph is not layer.linear.node.graph:
            break
        other = node.inputs[1 - uses[0].idx]
        if other is None or other is value or not _same_shape(other, value) or _depends(other, unfitted):
            break
        value = node.outputs[0]
    uses = list(value.uses())
    relu = bool(uses) and not value.is_graph_output() and all(is_onnx(u.node, "Relu") for u in uses)
    return Target(value.name or "", relu)


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    return one.shape is not None and one.shape == other.shape


def _depends(value: ir.Value, nodes: set[ir.Node]) -> bool:
    seen: set[ir.Node] = set()
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        pending += [v.producer() for v in node.inputs if v is not None]
    return False
