"""Residual sums that a layer computes in its kernel: which operand is the result of that layer, never quantised."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt.quantization.static.rules import RULES, Kind
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx


def fused_operands(graph: ir.Graph, sums: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """For each sum that a layer can compute: which of its inputs is the layer's result.

    Where two layers could, it is the one behind the longer branch: the other stands on the residual one. That does not
    depend on which layers are quantised, so that the same tensors are measured whatever is chosen.

    Args:
        graph: the main graph.
        sums: indices of activations by the name of a sum's output.
    """
    depth = _depths(graph)
    found: dict[str, int] = {}
    for node in graph:
        indices = sums.get(node.outputs[0].name or "", ()) if node.outputs else ()
        own = [i for i in indices if (v := node.inputs[i]) is not None and _is_layer(v.producer()) and sole_use(v)]
        if own and len(indices) > 1:
            found[node.outputs[0].name or ""] = max(own, key=lambda i: depth[_name(node.inputs[i])])
    return found


def _is_layer(node: ir.Node | None) -> bool:
    return node is not None and is_onnx(node, *RULES) and RULES[node.op_type].kind is Kind.COMPUTE


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""


def _depths(graph: ir.Graph) -> dict[str, int]:
    """How many layers stand one behind the other before each tensor, its own included."""
    depth: dict[str, int] = {}
    for node in graph:
        before = max((depth.get(_name(v), 0) for v in node.inputs), default=0)
        for value in node.outputs:
            depth[_name(value)] = before + _is_layer(node)
    return depth
