"""Integer kernels written as operators (QLinearConv, ...), with their results in float beside them.

    i = QLinearX(..., s, z)    is followed by    f = DequantizeLinear(i, s, z),  q = QuantizeLinear(f, s, z)

and what read i reads q, the same integers. So a model whose tensors are integers has tensors to compare, and places to
cut at. Tools name i after the tensor that it stands for, `x_quantized`; f is called `x` then.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.rewriting.names import Names

SCALED_BY = {
    "QLinearConv": (6, 7), "QLinearMatMul": (6, 7), "QLinearAdd": (6, 7), "QLinearMul": (6, 7), "QGemm": (7, 8),
    "QLinearWhere": (7, 8), "QLinearConcat": (0, 1), "QLinearSigmoid": (3, 4), "QLinearLeakyRelu": (3, 4),
    "QLinearAveragePool": (3, 4), "QLinearGlobalAveragePool": (3, 4), "QLinearSoftmax": (3, 4),
    "QLinearReduceMean": (3, 4),
}  # fmt: skip
"""Which inputs of an operator are scale and zero point of its result, by the schemas of ONNX and ONNX Runtime."""

SUFFIX = "_quantized"


def add_floats(model: ir.Model) -> None:
    """Give the integer results of the main graph a tensor in float; the model is changed in place."""
    names = Names(model)
    for node in list(model.graph):
        places = SCALED_BY.get(node.op_type)
        if places is None or len(node.inputs) <= max(places):
            continue
        scale, zero = (node.inputs[place] for place in places)
        if scale is None or zero is None:
            continue
        integers = node.outputs[0]
        readers = [(use.node, use.idx) for use in integers.uses()]
        stem = str(integers.name).removesuffix(SUFFIX)
        real = ir.Value(
            name=names.fresh(stem), type=ir.TensorType(scale.dtype or ir.DataType.FLOAT), shape=integers.shape
        )
        again = ir.Value(name=names.fresh(f"{stem}{SUFFIX}"), type=integers.type, shape=integers.shape)
        dequantize = ir.node(
            "DequantizeLinear", [integers, scale, zero], outputs=[real], name=names.fresh(f"{stem}_DequantizeLinear")
        )
        quantize = ir.node(
            "QuantizeLinear", [real, scale, zero], outputs=[again], name=names.fresh(f"{stem}_QuantizeLinear")
        )
        model.graph.insert_after(node, [dequantize, quantize])
        for reader, index in readers:
            reader.replace_input_with(index, again)
