"""Operators on integers, written as float operators between DequantizeLinear and QuantizeLinear.

    y = QLinearX(x, s_x, z_x, ...)    is    y = QuantizeLinear(X(DequantizeLinear(x, s_x, z_x), ...), s_y, z_y)

with weights as float constants. What quantises its input by itself (DynamicQuantizeMatMul, DynamicQuantizeLSTM) reads
the input, what has quantised weights alone (MatMulNBits, GatherBlockQuantized) reads float weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.numerics.bit_packing import unpack
from graphopt.quantization.back.float_builder import FloatBuilder, Refused, kept_attributes
from graphopt.quantization.back.numbers import dequantised, nbits_weight
from graphopt.rewriting.constants import array

Writer = Callable[[FloatBuilder], Sequence[ir.Value | None]]


def _conv(b: FloatBuilder) -> Sequence[ir.Value | None]:
    _channels_first(b)
    x = b.real(b.input(0), b.input(1), b.input(2))
    w = b.weight(b.input(3), b.input(4), b.input(5), 0)
    bias = b.bias(b.input(8), [b.input(1), b.input(4)])
    inputs = [x, w] if bias is None else [x, w, bias]
    y = b.op("Conv", inputs, ir.DataType.FLOAT, attributes=kept_attributes(b.node, "channels_last"))
    return [b.integers(y, b.input(6), b.input(7))]


def _channels_first(b: FloatBuilder) -> None:
    if b.node.attributes.get_int("channels_last", 0):
        raise Refused("its channels stand last, as in no operator of ONNX")


def _operand(b: FloatBuilder, index: int) -> ir.Value:
    """An operand of a product: a constant with a scale per column, or an activation."""
    value = b.input(index)
    if array(value) is not None:
        return b.weight(value, b.input(index + 1), b.input(index + 2), -1)
    return b.real(value, b.input(index + 1), b.input(index + 2))


def _matmul(b: FloatBuilder) -> Sequence[ir.Value | None]:
    y = b.op("MatMul", [_operand(b, 0), _operand(b, 3)], ir.DataType.FLOAT)
    return [b.integers(y, b.input(6), b.input(7))]


def _gemm(b: FloatBuilder) -> Sequence[ir.Value | None]:
    channel = 0 if b.node.attributes.get_int("transB", 0) else 1
    a = b.real(b.input(0), b.input(1), b.input(2))
    w = b.weight(b.input(3), b.input(4), b.input(5), channel)
    alpha = b.node.attributes.get_float("alpha", 1.0) or 1.0
    bias = b.bias(b.input(6), [b.input(1), b.input(4)], alpha)
    y = b.op("Gemm", [a, w] if bias is None else [a, w, bias], ir.DataType.FLOAT, attributes=kept_attributes(b.node))
    return [y if b.input(7) is None else b.integers(y, b.input(7), b.input(8))]


def _unary(op_type: str, *left_out: str) -> Writer:
    def write(b: FloatBuilder) -> Sequence[ir.Value | None]:
        _channels_first(b)
        x = b.real(b.input(0), b.input(1), b.input(2))
        attributes = kept_attributes(b.node, "channels_last", *left_out)
        y = b.op(op_type, [x], ir.DataType.FLOAT, attributes=attributes)
        return [b.integers(y, b.input(3), b.input(4))]

    return write


def _softmax(b: FloatBuilder) -> Sequence[ir.Value | None]:
    if (b.node.attributes.get_int("opset", 13) or 13) < 13 <= b.opset:
        raise Refused("it is a Softmax of an opset below 13, over all axes from one on")
    return _unary("Softmax", "opset")(b)


def _reduce_mean(b: FloatBuilder) -> Sequence[ir.Value | None]:
    x = b.real(b.input(0), b.input(1), b.input(2))
    axes = list(b.node.attributes.get_ints("axes", ()) or ())
    inputs: list[ir.Value | None] = [x]
    attributes = kept_attributes(b.node, "axes")
    if axes and b.opset >= 18:
        inputs.append(b.number(np.array(axes, np.int64), f"{b.node.outputs[0].name}_axes", ir.DataType.INT64))
    elif axes:
        attributes.append(ir.AttrInt64s("axes", axes))
    y = b.op("ReduceMean", inputs, ir.DataType.FLOAT, attributes=attributes)
    return [b.integers(y, b.input(3), b.input(4))]


def _binary(op_type: str) -> Writer:
    def write(b: FloatBuilder) -> Sequence[ir.Value | None]:
        operands = [b.real(*(b.input(start + i) for i in range(3))) for start in (0, 3)]
        return [b.integers(b.op(op_type, operands, ir.DataType.FLOAT), b.input(6), b.input(7))]

    return write


def _where(b: FloatBuilder) -> Sequence[ir.Value | None]:
    operands = [b.real(*(b.input(start + i) for i in range(3))) for start in (1, 4)]
    return [b.integers(b.op("Where", [b.input(0), *operands], ir.DataType.FLOAT), b.input(7), b.input(8))]


def _concat(b: FloatBuilder) -> Sequence[ir.Value | None]:
    operands = [b.real(*(b.input(start + i) for i in range(3))) for start in range(2, len(b.node.inputs), 3)]
    y = b.op("Concat", operands, ir.DataType.FLOAT, attributes=kept_attributes(b.node))
    return [b.integers(y, b.input(0), b.input(1))]


def _with_bias(b: FloatBuilder, product: ir.Value, bias: ir.Value | None) -> ir.Value:
    return product if bias is None else b.op("Add", [product, bias], product.dtype)


def _dynamic_matmul(b: FloatBuilder) -> Sequence[ir.Value | None]:
    x = b.input(0)
    assert x is not None
    w = b.weight(b.input(1), b.input(2), b.input(3), -1)
    return [_with_bias(b, b.op("MatMul", [b.dynamic(x), w], ir.DataType.FLOAT), b.input(4))]


def _matmul_to_float(b: FloatBuilder) -> Sequence[ir.Value | None]:
    x = b.real(b.input(0), b.input(2), b.input(4))
    w = b.weight(b.input(1), b.input(3), b.input(5), -1)
    return [_with_bias(b, b.op("MatMul", [x, w], ir.DataType.FLOAT), b.input(6))]


def _matmul_nbits(b: FloatBuilder) -> Sequence[ir.Value | None]:
    attributes = b.node.attributes
    number = {key: int(attributes.get_int(key, 0) or 0) for key in ("N", "K", "bits", "block_size")}
    if b.input(4) is not None:
        raise Refused("its columns are in groups of another order (g_idx)")
    bits = number["bits"] or 4
    if bits not in (2, 4, 8) or attributes.get_int("weight_prepacked", 0) != 0:
        raise Refused(f"weights of {bits} bits in this layout are not read")
    scales = b.constant(b.input(2), "scale")
    weight = nbits_weight(
        b.constant(b.input(1), "weight"), scales, b.optional(b.input(3), "zero point"),
        outputs=number["N"], inputs=number["K"], bits=bits, block=number["block_size"],
    )  # fmt: skip
    kind = ir.DataType.from_numpy(scales.dtype)
    w = b.stored(b.input(1), weight, kind)
    return [_with_bias(b, b.op("MatMul", [b.input(0), w], kind), b.input(5))]


def _gather_blocks(b: FloatBuilder) -> Sequence[ir.Value | None]:
    data, scales = b.constant(b.input(0), "table"), b.constant(b.input(2), "scale")
    zeros = b.optional(b.input(3), "zero point")
    attributes = b.node.attributes
    gathered = int(attributes.get_int("gather_axis", 0) or 0)
    axis = int(attributes.get_int("quantize_axis", 1) or 0) % data.ndim
    block = int(attributes.get_int("block_size", 128) or 0)
    if data.dtype == np.uint8:
        bits = int(attributes.get_int("bits", 4) or 4)
        data = unpack(data, bits)
        if zeros is None:
            zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        else:
            zeros = unpack(zeros, bits, scales.shape[-1])
    table = dequantised(data, scales, zeros, axis, block or data.shape[axis])
    kind = ir.DataType.from_numpy(scales.dtype)
    weight = b.stored(b.input(0), table, kind)
    return [b.op("Gather", [weight, b.input(1)], kind, attributes=[ir.AttrInt64("axis", gathered)])]


def _lstm(b: FloatBuilder) -> Sequence[ir.Value | None]:
    x = b.input(0)
    assert x is not None
    weights = []
    for index, scale in ((1, 8), (2, 10)):
        stored = b.input(index)
        q, s = b.constant(stored, "weight"), b.constant(b.input(scale), "scale")
        zero = b.optional(b.input(scale + 1), "zero point")
        # (directions, inputs, 4 hidden) with a scale a direction, or a direction and column
        shape = (q.shape[0], 1, s.size // q.shape[0])
        offset = 0 if zero is None else zero.reshape(shape).astype(np.float32)
        numbers = (q.astype(np.float32) - offset) * s.reshape(shape).astype(np.float32)
        weights.append(b.stored(stored, np.ascontiguousarray(numbers.swapaxes(1, 2))))
    inputs = [b.dynamic(x), *weights, *(b.input(i) for i in range(3, 8))]
    while inputs[-1] is None:
        inputs.pop()
    outputs = [
        ir.Value(name=b.names.fresh(f"{v.name}_float") if v.name else "", type=v.type, shape=v.shape)
        for v in b.node.outputs
    ]
    b.insert(
        ir.Node("", "LSTM", inputs, kept_attributes(b.node), outputs=outputs, name=b.names.fresh(f"{b.node.name}_LSTM"))
    )
    return [v if v.name else None for v in outputs]


WRITERS: dict[str, Writer] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearWhere": _where,
    "QLinearConcat": _concat,
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearSoftmax": _softmax,
    "QLinearAveragePool": _unary("AveragePool"),
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearReduceMean": _reduce_mean,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": _matmul_to_float,
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_blocks,
    "DynamicQuantizeLSTM": _lstm,
}
"""How each operator is written in float, by its type."""
