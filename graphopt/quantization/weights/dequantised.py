"""Weights as the standard's DequantizeLinear gives them: for runtimes that know a product by it (TensorRT).

    w = integers * scale        zero points are 0; one scale a row, or (from opset 21 on) one for every block of a row

Numbers of 4 bits are those of opset 21, for matrices alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.quantization.rounding.interface import Rounding, WeightGrid
from graphopt.quantization.weights.readers import RECURRENT, Reader, Weight
from graphopt.rewriting.edit import drop_if_unused, new_initializer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx

OPSET_BLOCKS = 21
"""From here on DequantizeLinear takes blocks and numbers of 4 bits."""
OPSET_CHANNELS = 13
"""From here on it takes one scale a channel."""


def dequantise_reason(weight: Weight, bits: int, block: int | None) -> str | None:
    """Why DequantizeLinear cannot give a weight; None where it can."""
    rank = weight.array.ndim
    for reader in weight.readers:
        node = reader.node
        if is_onnx(node, *RECURRENT):
            return f"no runtime takes DequantizeLinear before {node.op_type}"
        if is_onnx(node, "ConvTranspose") and node.attributes.get_int("group", 1) != 1:
            return "the output channels of its groups lie along two axes, and DequantizeLinear has scales along one"
        if is_onnx(node, "MatMul") and rank != 2:
            return f"its weight has {rank} axes, and DequantizeLinear has scales along one"
        if not is_onnx(node, "MatMul", "Gemm", "Gather") and (bits == 4 or block is not None):
            return "DequantizeLinear has blocks, and numbers of 4 bits, for matrices alone"
        if is_onnx(node, "Gather") and rank != 2:
            return f"its table has {rank} axes, not 2"
    if len({_axis(reader) for reader in weight.readers}) > 1:
        return "one of its readers takes it transposed"
    return None


def _axis(reader: Reader) -> int:
    """The axis of the constant along which rows are counted."""
    return 0 if reader.rows_first else 1


def dequantise(weight: Weight, names: Names, *, bits: int, block: int | None, rounding: Rounding) -> None:
    """Let DequantizeLinear of integers stand for a weight, under its name; `dequantise_reason` found no objection.

    Args:
        weight: to store as integers.
        names: of the model, whose opset is `OPSET_BLOCKS` at least where there are blocks or 4 bits, else 13.
        bits: 4 or 8.
        block: columns that share a scale; None: one scale a row.
        rounding: called with the key of the first reader.
    """
    reader, like, dtype = weight.readers[0], weight.array, weight.tensor.dtype
    matrices = reader.matrices(like).astype(np.float64)
    block = None if block is None or block >= matrices.shape[2] else block
    rounded = rounding(reader.key, matrices, WeightGrid(bits, True, True, block))
    old, axis = weight.value, _axis(reader)
    producer = old.producer()
    graph = old.graph if producer is None else producer.graph
    assert isinstance(graph, ir.Graph)
    if block is None:
        attributes, scale = {"axis": axis}, rounded.scale.reshape(-1)
    else:
        attributes = {"axis": 1 - axis, "block_size": block}
        scale = rounded.scale[0] if reader.rows_first else rounded.scale[0].T
    kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    integers = reader.restored(rounded.integers, like)
    inputs = [
        new_initializer(graph, names.fresh(f"{old.name}_quantized"), integers, kind),
        new_initializer(graph, names.fresh(f"{old.name}_scale"), scale, dtype),
    ]
    node = ir.node("DequantizeLinear", inputs, attributes, name=names.fresh(f"{old.name}_DequantizeLinear"))
    new, name = node.outputs[0], old.name
    new.name = names.fresh(f"{node.name}_0")
    old.replace_all_uses_with(new)
    graph.insert_before(producer if producer is not None else graph[0], node)
    drop_if_unused(old)
    new.name, new.type, new.shape = name, ir.TensorType(dtype), ir.Shape(like.shape)
