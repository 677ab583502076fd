"""Operators that TVM's ONNX importer lacks or gets wrong, in Relax: mostly what ONNX Runtime fuses others into.

The importer looks at names alone; here those of com.microsoft have their domain in front of them (`qualify`), so that
its Attention is not the standard's. Formulas follow the operators' definitions in ONNX and in ONNX Runtime's
docs/ContribOperators.md. What of an operator is not written here is refused before (`refusal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.backends.tvm_attention import attention_refusal, contrib_attention, standard_attention
from graphopt.backends.tvm_converter import CONTRIB, Converter, at, number

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ONNX_DOMAINS = ("", "ai.onnx")


def qualified(domain: str, op_type: str) -> str:
    """The name of an operator, with its domain where that is not the standard's."""
    return op_type if domain in ONNX_DOMAINS else f"{domain}.{op_type}"


def qualify(graph: onnx.GraphProto) -> None:
    """Give operators of com.microsoft that are converted here their qualified names, in bodies too."""
    for node in graph.node:
        if node.domain == CONTRIB and qualified(node.domain, node.op_type) in CONVERTERS:
            node.op_type = qualified(node.domain, node.op_type)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                qualify(body)


def refusal(node: ir.Node) -> str | None:
    """Why a node of `CONVERTERS` cannot be converted; None where it can."""
    name = qualified(node.domain, node.op_type)
    for place, value in enumerate(node.inputs):
        if value is not None and place in LACKING_INPUTS.get(name, ()):
            return f"its input {value.name!r} (number {place}) has no counterpart in TVM"
    attributes = node.attributes
    lacking = [key for key in LACKING_ATTRIBUTES.get(name, ()) if key in attributes and attributes[key].value]
    if lacking:
        return f"its attribute {lacking[0]!r} has no counterpart in TVM"
    computed = OUTPUTS.get(name, (0,))
    extra = [v for k, v in enumerate(node.outputs) if k not in computed and (v.uses() or v.is_graph_output())]
    if extra:
        return f"TVM does not compute its output {extra[0].name!r}"
    if name in (f"{CONTRIB}.Attention", f"{CONTRIB}.MultiHeadAttention", "Attention"):
        return attention_refusal(node, name)
    activation = node.attributes.get_string("activation", "Relu")
    if name in (f"{CONTRIB}.FusedConv", f"{CONTRIB}.FusedGemm") and activation not in ACTIVATIONS:
        return f"its activation {activation} has no counterpart in TVM"
    return None


def _activated(name: str, alpha: float, beta: float) -> Callable[[Any], Any]:
    from tvm import relax

    def clipped(x: Any) -> Any:
        return relax.op.clip(x, alpha, beta)

    def hard(x: Any) -> Any:
        return relax.op.clip(relax.op.add(relax.op.multiply(x, number(x, alpha)), number(x, beta)), 0, 1)

    made: dict[str, Callable[[Any], Any]] = {
        "Relu": relax.op.nn.relu,
        "Tanh": relax.op.tanh,
        "Sigmoid": relax.op.sigmoid,
        "LeakyRelu": lambda x: relax.op.nn.leakyrelu(x, alpha),
        "Clip": clipped,
        "HardSigmoid": hard,
    }
    return made[name]


ACTIVATIONS = {"Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": (0.01,), "Clip": (), "HardSigmoid": (0.2, 0.5)}
"""What ONNX Runtime fuses behind Conv and Gemm, with the defaults of its parameters."""


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _fused_conv(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """activation(Conv(x, w, b) + z)."""
    from tvm import relax

    x = bb.normalize(own("Conv", inputs[:3], attrs))
    if at(inputs, 3) is not None:
        x = bb.normalize(relax.op.add(x, inputs[3]))
    name = _text(attrs.get("activation", "Relu"))
    given = attrs.get("activation_params", ACTIVATIONS[name])
    return _activated(name, *(*given, 0.0, 0.0)[:2])(x)


def _fused_gemm(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """activation(Gemm(a, b, c))."""
    name = _text(attrs.get("activation", "Relu"))
    alpha, beta = (*ACTIVATIONS[name], 0.0, 0.0)[:2]
    given = attrs.get("activation_alpha", alpha), attrs.get("activation_beta", beta)
    return _activated(name, *given)(bb.normalize(own("Gemm", inputs[:3], attrs)))


def _fused_product(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """alpha a b, either matrix turned first."""
    from tvm import relax

    sides = []
    for x, key in zip(inputs[:2], ("transA", "transB"), strict=True):
        rank = len(x.ty.shape)
        order = [*range(rank - 2), rank - 1, rank - 2]
        sides.append(relax.op.permute_dims(x, order) if attrs.get(key, 0) and rank > 1 else x)
    product = bb.normalize(relax.op.matmul(*sides))
    alpha = float(attrs.get("alpha", 1.0))
    return product if alpha == 1 else relax.op.multiply(product, number(product, alpha))


def _swish(alpha: float) -> Converter:
    """x sigmoid(alpha x)."""

    def convert(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
        from tvm import relax

        factor = float(attrs.get("alpha", alpha))
        inner = inputs[0] if factor == 1 else relax.op.multiply(inputs[0], number(inputs[0], factor))
        return relax.op.multiply(inputs[0], relax.op.sigmoid(inner))

    return convert


def _celu(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """max(0, x) + alpha min(0, exp(x / alpha) - 1)."""
    from tvm import relax

    x, alpha = inputs[0], float(attrs.get("alpha", 1.0))
    below = relax.op.subtract(relax.op.exp(relax.op.divide(x, number(x, alpha))), number(x, 1.0))
    below = relax.op.multiply(relax.op.minimum(below, number(x, 0.0)), number(x, alpha))
    return relax.op.add(relax.op.nn.relu(x), below)


def _lp_norm(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """x / |x|, and 0 where the norm is 0."""
    from tvm import relax

    x, axes = inputs[0], [int(attrs.get("axis", -1))]
    if int(attrs.get("p", 2)) == 1:
        norm = relax.op.sum(relax.op.abs(x), axes, keepdims=True)
    else:
        norm = relax.op.sqrt(relax.op.sum(relax.op.multiply(x, x), axes, keepdims=True))
    norm = bb.normalize(norm)
    zero = relax.op.equal(norm, number(x, 0.0))
    return relax.op.divide(x, relax.op.where(zero, number(x, 1.0), norm))


def _rms_norm(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """gamma x / sqrt(mean(x^2) + epsilon)."""
    from tvm import relax

    x, axis = inputs[0], int(attrs.get("axis", -1))
    axes = list(range(axis % len(x.ty.shape), len(x.ty.shape)))
    return relax.op.nn.rms_norm(x, inputs[1], axes=axes, epsilon=float(attrs.get("epsilon", 1e-5)))


def _skip_norm(simplified: bool) -> Converter:
    """The norm of x + skip + bias, and (fourth) that sum."""

    def convert(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
        import numpy as np
        from tvm import relax

        beta, bias = (None, at(inputs, 3)) if simplified else (at(inputs, 3), at(inputs, 4))
        total = relax.op.add(inputs[0], inputs[1])
        if bias is not None:
            total = relax.op.add(total, bias)
        total = bb.emit(total)
        epsilon = float(attrs.get("epsilon", 1e-12))
        if simplified:
            found = relax.op.nn.rms_norm(total, inputs[2], axes=[-1], epsilon=epsilon)
        else:
            if beta is None:
                width = int(inputs[2].ty.shape[0])
                beta = relax.const(np.zeros(width, str(inputs[2].ty.dtype)))
            found = relax.op.nn.layer_norm(total, inputs[2], beta, axes=[-1], epsilon=epsilon)
        unread = number(total, 0.0)
        return relax.Tuple([bb.emit(found), unread, unread, total])

    return convert


def _expand(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """TVM's own fails on open sizes where the wanted shape is a constant; a 1 there keeps the size that is there."""
    import tvm
    from tvm import relax, tirx

    x, shape = inputs
    sizes = None if x.ty.shape is None else list(x.ty.shape)
    is_open = sizes is not None and any(not isinstance(size, tirx.IntImm) for size in sizes)
    if sizes is None or not is_open or not isinstance(shape, tvm.ir.GenericConst):
        return own("Expand", inputs, attrs)
    wanted = [int(size) for size in shape.value.numpy()]
    rank = max(len(sizes), len(wanted))
    have = [1] * (rank - len(sizes)) + sizes
    want = [1] * (rank - len(wanted)) + wanted
    unclear = [k for k in range(rank) if want[k] != 1 and not isinstance(have[k], (int, tirx.IntImm))]
    if unclear:
        raise ValueError(f"whether axis {unclear[0]}, of open size, is stretched to {want[unclear[0]]} is not known")
    return relax.op.broadcast_to(x, [h if w == 1 else w for h, w in zip(have, want, strict=True)])


def _range(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """TVM's own gives the result a size of its own, even where it is a size of an input (positions in a sequence)."""
    import tvm
    from tvm import relax, tirx

    start, limit, step = inputs
    fixed = [x.value.numpy() for x in (start, step) if isinstance(x, tvm.ir.GenericConst)]
    is_size = tvm.ir.is_prim_expr(limit) and str(getattr(limit, "dtype", None) or limit.ty) == "int64"
    if len(fixed) < 2 or not is_size or int(fixed[0]) < 0 or int(fixed[1]) != 1:
        return own("Range", inputs, attrs)
    first = tirx.IntImm("int64", int(fixed[0]))
    # Nothing is left of a size below the first number.
    last = limit if int(fixed[0]) == 0 else tirx.max(limit, first)
    return relax.op.arange(first, last, tirx.IntImm("int64", 1), "int64")


CONVERTERS: dict[str, Converter] = {
    "Attention": standard_attention,
    "Celu": _celu,
    "Expand": _expand,
    "LpNormalization": _lp_norm,
    "Range": _range,
    "SimplifiedLayerNormalization": _rms_norm,
    "Swish": _swish(1.0),
    f"{CONTRIB}.Attention": contrib_attention(packed=True),
    f"{CONTRIB}.FusedConv": _fused_conv,
    f"{CONTRIB}.FusedGemm": _fused_gemm,
    f"{CONTRIB}.FusedMatMul": _fused_product,
    f"{CONTRIB}.MultiHeadAttention": contrib_attention(packed=False),
    f"{CONTRIB}.QuickGelu": _swish(1.702),
    f"{CONTRIB}.SimplifiedLayerNormalization": _rms_norm,
    f"{CONTRIB}.SkipLayerNormalization": _skip_norm(simplified=False),
    f"{CONTRIB}.SkipSimplifiedLayerNormalization": _skip_norm(simplified=True),
}
"""What is converted here, by qualified name."""

OUTPUTS = {f"{CONTRIB}.{name}": (0, 3) for name in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")}
"""Outputs that are computed, where not the first alone."""

LACKING_INPUTS = {
    "Attention": (4, 5, 6),
    f"{CONTRIB}.Attention": (4, 6),
    f"{CONTRIB}.MultiHeadAttention": (6, 7, 8, 9),
}
"""Inputs that are not converted: states of earlier calls."""

LACKING_ATTRIBUTES = {
    "Attention": ("qk_matmul_output_mode", "softcap"),
    f"{CONTRIB}.Attention": ("do_rotary", "past_present_share_buffer"),
    f"{CONTRIB}.FusedMatMul": ("transBatchA", "transBatchB"),
}
"""Attributes that are not converted where they are not 0."""
