"""Shapes behind operators that onnx has no inference for: ONNX Runtime's own (domain com.microsoft), mostly.

For inference alone, such a node is taken for a call of a small function of standard operators whose results have the
same shapes. So one run of onnx's inference passes through all of them, and symbolic dimensions stay symbolic. Results
that are not listed, and operators that are not, stay without a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN = "graphopt.shapes"
"""Domain of the functions that stand in; it exists only in the copy of the model that inference sees."""

Attributes = dict[str, Any]
Body = Callable[["onnx.NodeProto", Attributes], str]

_LIKE_FIRST = (
    *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasAdd", "BiasDropout", "RotaryEmbedding", "Inverse", "Trilu"),
    *(
        "SimplifiedLayerNormalization",
        "MeanVarianceNormalization",
        "GroupNorm",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearSoftmax",
        "MoE",
    ),
    *("QMoE", "BiasSoftmax", "GemmaRotaryEmbedding"),
)


def _like_first(node: onnx.NodeProto, given: Attributes) -> str:
    return "o0 = Identity(i0)"


def _skip(node: onnx.NodeProto, given: Attributes) -> str:
    return "o0 = Identity(i0) o3 = Identity(i0)"


def _embedding(node: onnx.NodeProto, given: Attributes) -> str:
    return "o0 = Gather(i2, i0) o2 = Identity(o0)"


def _matmul(node: onnx.NodeProto, given: Attributes) -> str:
    if given.get("transBatchA") or given.get("transBatchB"):
        return ""
    swap = 'Einsum <equation="...ij->...ji">'
    left = f"a = {swap} (i0)" if given.get("transA") else "a = Identity(i0)"
    right = f"b = {swap} (i1)" if given.get("transB") else "b = Identity(i1)"
    return f"{left}  {right}  o0 = MatMul(a, b)"


def _gemm(node: onnx.NodeProto, given: Attributes) -> str:
    return f"o0 = Gemm <transA={given.get('transA', 0)}, transB={given.get('transB', 0)}> (i0, i1)"


def _quantized_gemm(node: onnx.NodeProto, given: Attributes) -> str:
    like = "i8" if len(node.input) > 8 and node.input[8] else "i1"
    return (
        f"g = Gemm <transA={given.get('transA', 0)}, transB={given.get('transB', 0)}> (i0, i3) o0 = CastLike(g, {like})"
    )


def _integer_matmul(node: onnx.NodeProto, given: Attributes) -> str:
    return "p = MatMulInteger(i0, i1) o0 = Cast <to=1> (p)"


def _blocks_matmul(node: onnx.NodeProto, given: Attributes) -> str:
    return f"""last = Constant <value_ints=[-1]> ()  rows = ReduceSum(i0, last)
               n = Constant <value_ints=[{given["N"]}]> ()  wide = ConstantOfShape(n)  like = CastLike(wide, rows)
               o0 = Mul(rows, like)"""


def _halves(node: onnx.NodeProto, given: Attributes) -> str:
    return "o0, gate = Split <axis=-1> (i0)"


def _fused_attention(node: onnx.NodeProto, given: Attributes) -> str:
    sizes = given.get("qkv_hidden_sizes")
    if not sizes:
        return "p = MatMul(i0, i1)  q, k, o0 = Split <axis=-1> (p)"
    return f"p = MatMul(i0, i1)  s = Constant <value_ints={list(sizes)}> ()  q, k, o0 = Split <axis=-1> (p, s)"


def _attention(node: onnx.NodeProto, given: Attributes) -> str:
    if len(node.input) < 3 or not node.input[2]:  # queries, keys and values of a head side by side, or keys and values
        return ""
    return """last = Constant <value_ints=[-1]> ()  rows = ReduceSum(i0, last)
              one = Constant <value_ints=[1]> ()  columns = ReduceSum(i2, one)  o0 = Mul(rows, columns)"""


def _grouped_attention(node: onnx.NodeProto, given: Attributes) -> str:
    if len(node.input) > 1 and node.input[1]:
        return "o0 = Identity(i0)"
    heads, shared = given["num_heads"], given["kv_num_heads"]
    return f"""split = Constant <value_ints=[0, 0, {heads + 2 * shared}, -1]> ()  s = Reshape(i0, split)
               sizes = Constant <value_ints=[{heads}, {shared}, {shared}]> ()  q, k, v = Split <axis=2> (s, sizes)
               flat = Constant <value_ints=[0, 0, -1]> ()  o0 = Reshape(q, flat)"""


def _like(op_type: str, *names: str, operands: str = "i0") -> Body:
    """Shaped as a standard operator with the same attributes."""

    def body(node: onnx.NodeProto, given: Attributes) -> str:
        kept = ", ".join(
            f'{name}="{given[name].decode()}"' if isinstance(given[name], bytes) else f"{name}={_text(given[name])}"
            for name in names
            if name in given
        )
        if given.get("channels_last"):
            return ""
        return f"o0 = {op_type} <{kept}> ({operands})" if kept else f"o0 = {op_type}({operands})"

    return body


def _quantized(node: onnx.NodeProto, given: Attributes) -> str:
    operands = ", ".join(f"i{k}" for k in range(len(node.input)))
    return f"o0 = {node.op_type} <axis={given.get('axis', 1)}> ({operands})"


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, Iterable) else str(value)


def _joined(node: onnx.NodeProto, given: Attributes) -> str:
    operands = ", ".join(f"i{k}" for k in range(2, len(node.input), 3))
    return f"o0 = Concat <axis={given['axis']}> ({operands})"


_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "kernel_shape", "pads", "strides")
_BODIES: dict[str, Body] = {
    **dict.fromkeys(_LIKE_FIRST, _like_first),
    "SkipLayerNormalization": _skip,
    "SkipSimplifiedLayerNormalization": _skip,
    "EmbedLayerNormalization": _embedding,
    "FusedMatMul": _matmul,
    "TransposeMatMul": _matmul,
    "FusedGemm": _gemm,
    "FusedConv": _like("Conv", *_WINDOW, operands="i0, i1"),
    "QGemm": _quantized_gemm,
    "MatMulIntegerToFloat": _integer_matmul,
    "DynamicQuantizeMatMul": _integer_matmul,
    "MatMulNBits": _blocks_matmul,
    "BiasSplitGelu": _halves,
    "Attention": _fused_attention,
    "QAttention": _fused_attention,
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _grouped_attention,
    "QuantizeLinear": _quantized,
    "DequantizeLinear": _quantized,
    "QLinearAdd": _like("Add", operands="i0, i3"),
    "QLinearMul": _like("Mul", operands="i0, i3"),
    "QLinearConcat": _joined,
    "QLinearAveragePool": _like("AveragePool", *_POOL),
    "QLinearGlobalAveragePool": _like("GlobalAveragePool"),
}
_STANDARD = {"SimplifiedLayerNormalization", "MeanVarianceNormalization"}
"""Operators of the default domain without inference; ONNX Runtime adds the first of them."""


def stand_in(model: onnx.ModelProto) -> None:
    """Replace nodes without inference by calls of functions that are shaped alike, in place."""
    import onnx

    known = {(function.domain, function.name) for function in model.functions}
    for number, node in enumerate(list(_nodes(model.graph))):
        contrib = node.domain == "com.microsoft" and (node.domain, node.op_type) not in known
        body = _BODIES.get(node.op_type) if contrib or node.op_type in _STANDARD else None
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        text = body(node, given) if body is not None else ""
        if not text:
            continue
        name = f"{node.op_type}_{number}"
        model.functions.append(_function(name, node, text))
        node.op_type, node.domain = name, DOMAIN
        del node.attribute[:]
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _function(name: str, node: onnx.NodeProto, text: str) -> onnx.FunctionProto:
    """A function with the signature of a node; results that the body does not write are left out of it."""
    import onnx

    inputs = ", ".join(f"i{k}" for k in range(len(node.input)))
    outputs = [f"o{k}" for k in range(len(node.output))]
    written = [output for output in outputs if f"{output} =" in text or f"{output}," in text]
    head = f'<opset_import: ["" : 15], domain: "{DOMAIN}">\n{name} ({inputs}) => ({", ".join(written)})'
    function = onnx.parser.parse_function(f"{head}\n{{\n{text}\n}}")
    del function.output[:]
    function.output.extend(outputs)
    return function


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
