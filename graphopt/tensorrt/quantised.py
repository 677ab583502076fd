"""QuantizeLinear and DequantizeLinear as TensorRT takes them: symmetric, signed, constant, right at the layer.

Source of what the parser checks: onnx-tensorrt, onnxOpImporters.cpp for TensorRT 10.15, QuantDequantLinearHelper. Where
the file would be read as something else than it says, that is an error as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.files.opset import opset_of
from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs
from graphopt.tensorrt.findings import Finding, error, warning

PARSER = "onnx-tensorrt for TensorRT 10.15, QuantDequantLinearHelper"
GUIDE = "TensorRT documentation, Working with Quantized Types, Explicit Quantization"
LINEAR = ("QuantizeLinear", "DequantizeLinear")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FOUR_BITS = ("int4", "float4_e2m1fn")
TYPES = ("int8", *FOUR_BITS, "float8_e4m3fn")
CHANNELS = 4
REQUANTISE = "quantise the float model for this target (dequantize,quantize)"


def check_quantised(model: ir.Model) -> Iterator[Finding]:
    """Every Q and DQ, and every layer that reads one."""
    for graph in graphs(model):
        for node in graph:
            if is_onnx(node, *LINEAR):
                yield from _numbers(node, opset_of(model))
                yield from _scales(node, opset_of(model))
                if is_onnx(node, "QuantizeLinear"):
                    yield from _quantiser(node)
                else:
                    yield from _dequantiser(node)
            elif is_onnx(node, *LAYERS):
                yield from _layer(node)


def stored_type(node: ir.Node) -> np.dtype[Any] | None:
    """The type of the integers of a Q or DQ; None where the standard's default would be taken."""
    tensor = node.inputs[0] if is_onnx(node, "DequantizeLinear") else node.outputs[0]
    if tensor is not None and tensor.dtype is not None:
        return tensor.dtype.numpy()
    zero = array(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if zero is None else zero.dtype


def _numbers(node: ir.Node, opset: int) -> Iterator[Finding]:
    """Types and zero points."""
    kind = stored_type(node)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    points = array(zero)
    if kind is not None and kind.name == "int32":
        yield error(
            "float-bias",
            node,
            "it stores int32, which DequantizeLinear does not take: biases stay in float",
            REQUANTISE,
            PARSER,
        )
    elif kind is not None and kind.name == "uint8":
        yield error(
            "signed",
            node,
            "its integers are unsigned, and TensorRT would read them as int8 without a word",
            REQUANTISE,
            PARSER,
        )
    elif kind is not None and kind.name not in TYPES:
        yield error(
            "signed",
            node,
            f"its integers are {kind.name}; TensorRT takes int8, int4, float8, float4",
            REQUANTISE,
            PARSER,
        )
    if points is not None and np.any(np.asarray(points, np.float32) != 0):
        value = np.asarray(points, np.float32).reshape(-1)
        yield error(
            "zero-point", node, f"its zero point is {value[np.argmax(np.abs(value))]:g}, not 0", REQUANTISE, PARSER
        )
    elif zero is not None and zero.name and points is None:
        yield error("zero-point", node, "its zero point is computed", REQUANTISE, PARSER)
    elif points is None and is_onnx(node, "QuantizeLinear") and "output_dtype" not in node.attributes:
        yield error(
            "zero-point",
            node,
            "it has no zero point, so the standard says uint8, and TensorRT int8",
            "give it a zero point 0 of int8",
            PARSER,
        )
    scale = array(node.inputs[1])
    if points is not None and scale is not None and points.size != scale.size:
        yield error(
            "zero-point",
            node,
            f"it has {points.size} zero points and {scale.size} scales",
            "give it as many of either",
            PARSER,
        )


def _scales(node: ir.Node, opset: int) -> Iterator[Finding]:
    scale = array(node.inputs[1])
    data, first = node.inputs[0], array(node.inputs[0])
    if scale is None:
        yield error("scale", node, "its scale is computed: a scale of int8 tensors is a constant", REQUANTISE, GUIDE)
        return
    numbers = np.asarray(scale, np.float64)
    if not np.isfinite(numbers).all() or (numbers <= 0).any():
        yield error(
            "scale",
            node,
            f"its scale has {_worst(numbers)}, and must be positive and finite",
            "quantise this layer again, or leave it in float",
            PARSER,
        )
    if scale.size == 1:
        return
    shape = first.shape if first is not None else None
    if first is None and not _fake(data):
        yield error(
            "per-tensor",
            node,
            f"an activation has {scale.size} scales; per channel is for weights alone",
            "quantise activations with one scale a tensor",
            GUIDE,
        )
    if shape is None:
        return
    axis = int(node.attributes.get_int("axis", 1 if opset >= 13 else 0) or 0)
    if scale.ndim <= 1:
        if scale.size != shape[axis]:
            yield error(
                "axis",
                node,
                f"it has {scale.size} scales for {shape[axis]} channels of axis {axis}",
                "correct its axis",
                PARSER,
            )
        return
    ratios = [a / b for a, b in zip(shape, scale.shape, strict=False)] if scale.ndim == len(shape) else []
    if sum(r != 1 for r in ratios) != 1 or any(r % 1 for r in ratios):
        yield error(
            "blocks",
            node,
            f"scales of shape {list(scale.shape)} for {list(shape)} are blocks along other than one axis",
            "store weights in blocks along the input channels alone",
            PARSER,
        )


def _worst(numbers: np.ndarray[Any, Any]) -> str:
    bad = numbers[~np.isfinite(numbers) | (numbers <= 0)]
    return f"{bad[0]:g}"


def _fake(value: ir.Value | None) -> bool:
    """Whether what a DQ reads comes from a Q of a constant: a weight that TensorRT quantises itself."""
    made = value.producer() if value is not None else None
    return made is not None and is_onnx(made, "QuantizeLinear") and array(made.inputs[0]) is not None


def _quantiser(node: ir.Node) -> Iterator[Finding]:
    value = node.inputs[0]
    if value is None or array(value) is not None:
        return
    others = [use.node for use in value.uses() if use.node is not node and is_onnx(use.node, "QuantizeLinear")]
    own = array(node.inputs[1])
    if own is not None and any((a := array(n.inputs[1])) is None or not np.array_equal(a, own) for n in others):
        yield warning(
            "one-pair",
            node,
            f"{value.name!r} is quantised several times with different scales",
            "give the tensor one scale",
            GUIDE,
        )
    if node.outputs[0].is_graph_output():
        yield warning("border", node, "integers leave the model", "let the model give floats", GUIDE)


def _dequantiser(node: ir.Node) -> Iterator[Finding]:
    kind, stored = stored_type(node), array(node.inputs[0])
    readers = list(dict.fromkeys(use.node for use in node.outputs[0].uses()))
    if stored is not None and kind is not None and kind.name in FOUR_BITS:
        if stored.size % 2:
            yield error(
                "int4",
                node,
                "4-bit weights come in pairs, and it has an odd number of them",
                "leave this layer in int8 or float",
                PARSER,
            )
        wrong = next((n for n in readers if not is_onnx(n, "Gemm", "MatMul", "Transpose", "Reshape", "Cast")), None)
        if wrong is not None:
            yield error(
                "int4",
                wrong,
                f"it reads 4-bit weights, which matrix products alone take, not {wrong.op_type}",
                "leave this layer in int8 or float",
                GUIDE,
            )
    elif stored is None and kind is not None and kind.name in FOUR_BITS and not _fake(node.inputs[0]):
        yield error(
            "int4",
            node,
            "an activation of 4 bits: TensorRT takes int4 for weights alone",
            "quantise activations to int8",
            GUIDE,
        )
    if stored is not None and len([n for n in readers if is_onnx(n, *LAYERS)]) > 1:
        yield warning(
            "shared-weight",
            node,
            f"{len(readers)} layers read one dequantised weight",
            "give each its own DequantizeLinear, so that each is fused with its layer",
            GUIDE,
        )
    cast = next((n for n in readers if is_onnx(n, "Cast") and _leads_to_layer(n)), None)
    if cast is not None:
        yield error(
            "placement",
            cast,
            "a Cast parts DequantizeLinear from its layer, which then multiplies floats",
            "let DequantizeLinear give the layer's type (quantize{scheme=fp16} does, for this target)",
            GUIDE,
        )


def _leads_to_layer(cast: ir.Node) -> bool:
    return any(is_onnx(use.node, *LAYERS) for use in cast.outputs[0].uses())


def _dequantised(value: ir.Value | None) -> ir.Node | None:
    made = value.producer() if value is not None else None
    return made if made is not None and is_onnx(made, "DequantizeLinear") else None


def _is_weight(pair: ir.Node) -> bool:
    return array(pair.inputs[0]) is not None or _fake(pair.inputs[0])


def _layer(node: ir.Node) -> Iterator[Finding]:
    """A layer: integers on both sides, scales by output channel, biases in float."""
    pairs = [_dequantised(v) for v in node.inputs[:2]]
    weight = next((p for p in reversed(pairs) if p is not None and _is_weight(p)), None)
    activation = next((p for p in pairs if p is not None and not _is_weight(p)), None)
    convolves = is_onnx(node, "Conv", "ConvTranspose")
    if weight is None:
        constant = next((v for v in node.inputs[:2] if array(v) is not None), None)
        if activation is not None and constant is not None:
            yield warning(
                "both-sides",
                node,
                "its input is quantised and its weight is not: it multiplies floats",
                "quantise the weight as well, or take Q and DQ away",
                GUIDE,
            )
        return
    kind = stored_type(weight)
    if activation is None and kind is not None and kind.name == "int8":
        if convolves:
            yield error(
                "both-sides",
                node,
                "its weight is int8 and its input is float, which no convolution takes",
                "quantise the input as well, or leave the weight in float (dequantize)",
                GUIDE,
            )
        else:
            yield warning(
                "both-sides",
                node,
                "its weight is int8 and its input is float: it multiplies floats",
                "quantise the input as well",
                GUIDE,
            )
    yield from _channel_axis(node, weight)
    rows = array(weight.inputs[0])
    if rows is None:
        return
    if convolves and activation is not None and rows.ndim > 1:
        group = node.attributes.get_int("group", 1) or 1
        inputs = rows.shape[1] if is_onnx(node, "Conv") else rows.shape[0] // group
        if inputs % CHANNELS and not (group > 1 and inputs == 1):
            yield warning(
                "channels",
                node,
                f"an int8 convolution of {inputs} input channels (of a group): where they are no "
                f"multiple of {CHANNELS}, TensorRT was seen to find no implementation",
                "if the build says so, leave it in float (quantize{exclude=...})",
                "reports on TensorRT 11.3 (2026) and NVIDIA/TensorRT issue 1768",
            )
        if group > 1 and inputs == 1:
            yield warning(
                "depthwise",
                node,
                "an int8 depthwise convolution: TensorRT 8.5 and 8.6 were seen to find no implementation",
                "if the build says so, leave it in float (quantize{exclude=...})",
                "NVIDIA/TensorRT issues 3385 and 4060",
            )


def _channel_axis(node: ir.Node, weight: ir.Node) -> Iterator[Finding]:
    scale, data = array(weight.inputs[1]), array(weight.inputs[0])
    if data is None and weight.inputs[0] is not None:
        made = weight.inputs[0].producer()
        data = array(made.inputs[0]) if made is not None else None
    if scale is None or data is None or scale.size == 1 or scale.ndim > 1:
        return
    wanted = data.ndim - 1
    if is_onnx(node, "Conv"):
        wanted = 0
    elif is_onnx(node, "ConvTranspose"):
        wanted = 1
    elif is_onnx(node, "Gemm"):
        wanted = 0 if node.attributes.get_int("transB", 0) else 1
    axis = int(weight.attributes.get_int("axis", 1) or 0) % data.ndim
    if axis != wanted:
        yield error(
            "axis",
            node,
            f"the scales of its weight stand along axis {axis}, its output channels along {wanted}",
            "quantise the weight along its output channels",
            GUIDE,
        )
