"""What somebody quantised before: every pass leaves it as it is, or `dequantize` takes it back to float32."""

from __future__ import annotations

import onnx_ir as ir

QUANTISED_OPS = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
        "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits",
        "MatMulNBitsQkv", "MatMulBnb4", "MatMulFpQ4", "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight",
        "GatherBlockQuantized", "QGemm", "QMoE", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid",
        "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSoftmax", "QLinearReduceMean",
        "QLinearWhere", "QAttention", "QEmbedLayerNormalization", "QOrderedAttention", "QOrderedGelu",
        "QOrderedLayerNormalization", "QOrderedLongformerAttention", "QOrderedMatMul", "QuantizeWithOrder",
        "DequantizeWithOrder", "QuantizeBFP", "DequantizeBFP",
    }
)  # fmt: skip
"""Operators of ONNX and ONNX Runtime that mean: somebody quantised here already."""

_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")


def is_quantised(node: ir.Node | None) -> bool:
    """Whether the node itself is an operator of a quantised model."""
    return node is not None and node.domain in _DOMAINS and node.op_type in QUANTISED_OPS


def quantised_already(node: ir.Node) -> str | None:
    """Why a node belongs to a quantised layer; None where it does not.

    It does if it is an operator of a quantised model, if it reads what a DequantizeLinear writes (then a runtime makes
    one integer kernel of both), or if a QuantizeLinear reads what it writes.
    """
    if is_quantised(node):
        return f"quantised already: {node.op_type}"
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and _is_linear(producer, "DequantizeLinear"):
            return "quantised already: DequantizeLinear gives it an input"
    for value in node.outputs:
        if any(_is_linear(use.node, "QuantizeLinear") for use in value.uses()):
            return "quantised already: QuantizeLinear reads its result"
    return None


def _is_linear(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in _DOMAINS


def holds_quantised(model: ir.Model) -> dict[str, int]:
    """How often operators of quantised models occur, in bodies too, by type."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if is_quantised(node):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
