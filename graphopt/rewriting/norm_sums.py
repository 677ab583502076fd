"""Residual sums in front of layer norms, written so that a runtime keeps the two apart.

ONNX Runtime's optimiser makes one SkipLayerNormalization of Add and LayerNormalization. Its CPU kernel (1.31) is slower
than those of the two parts: at 384 channels the parts took 0.9 of its time for 1 token, 0.3 for 16, 0.16 for 128, and
the same at 64 to 1024 channels. Sum of two tensors gives the same bits as Add, and is not in the optimiser's pattern.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.files.opset import opset_of
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs
from graphopt.rewriting.streams import norm_input

FUSED = "SkipLayerNormalization"
"""What `graphopt.target.Target.slow_fusions` calls it."""

BROADCASTS = 8
"""Sum takes operands of different shapes from this opset on."""


def keep_sums_apart(model: ir.Model) -> list[str]:
    """Write as Sum each Add of two activations that a layer norm reads, in place; the labels of these nodes."""
    if opset_of(model) < BROADCASTS:
        return []
    done = []
    for graph in graphs(model):
        for node in graph:
            if not is_onnx(node, "Add") or any(v is None or constant(v) is not None for v in node.inputs):
                continue
            read = [norm_input(use.node) for use in node.outputs[0].uses()]
            if any(place is not None and place[0] is node.outputs[0] for place in read):
                node.op_type = "Sum"
                done.append(label(node))
    return done
