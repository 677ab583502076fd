"""Attention in Relax: ONNX Runtime's Attention and MultiHeadAttention, and the standard's from opset 23."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.backends.tvm_converter import Converter, at, number

if TYPE_CHECKING:
    import onnx_ir as ir


def attention_refusal(node: ir.Node, name: str) -> str | None:
    """Why an attention, by its qualified name, cannot be converted; None where it can."""
    ranks = [None if v is None or v.shape is None else v.shape.rank() for v in node.inputs]
    if name == "Attention":
        return None if all(rank in (3, 4) for rank in ranks[:3]) else "the ranks of its inputs are not known"
    if name.endswith("MultiHeadAttention") and (len(ranks) < 3 or ranks[:3] != [3, 3, 3]):
        return "TVM takes it with queries, keys and values of three axes each"
    place = 4 if name.endswith("MultiHeadAttention") else 3
    mask = node.inputs[place] if len(node.inputs) > place else None
    return None if mask is None or ranks[place] in (2, 3) else "TVM takes its mask with two axes or three"


def _heads(bb: Any, x: Any, heads: int) -> Any:
    """(batch, positions, heads * size) as (batch, heads, positions, size)."""
    from tvm import relax

    batch, positions, width = x.ty.shape
    apart = relax.op.reshape(x, [batch, positions, heads, int(width) // heads])
    return bb.normalize(relax.op.permute_dims(apart, [0, 2, 1, 3]))


def _joined(bb: Any, x: Any) -> Any:
    """The reverse of `_heads`."""
    from tvm import relax

    batch, heads, positions, size = x.ty.shape
    turned = relax.op.permute_dims(x, [0, 2, 1, 3])
    return relax.op.reshape(turned, [batch, positions, int(heads) * int(size)])


def _attended(bb: Any, q: Any, k: Any, v: Any, *, scale: float, added: Sequence[Any], causal: bool) -> Any:
    """softmax(scale q k' + what is added) v, of (batch, heads, positions, size); few key heads serve many query heads.

    Args:
        bb: the block builder.
        q, k, v: queries, keys, values.
        scale: of the products.
        added: to them, each broadcastable.
        causal: whether a query sees the keys up to its own position alone.
    """
    from tvm import relax

    groups = int(q.ty.shape[1]) // int(k.ty.shape[1])
    if groups > 1:
        k, v = (bb.normalize(relax.op.repeat(x, groups, axis=1)) for x in (k, v))
    scores = relax.op.matmul(q, relax.op.permute_dims(k, [0, 1, 3, 2]))
    scores = bb.normalize(relax.op.multiply(scores, number(q, scale)))
    for bias in added:
        scores = bb.normalize(relax.op.add(scores, bias))
    if causal:
        seen = relax.op.tril(relax.op.ones_like(scores))
        visible = relax.op.greater(seen, number(q, 0.0))
        scores = relax.op.where(visible, scores, number(q, _lowest(q)))
    return bb.normalize(relax.op.matmul(relax.op.nn.softmax(scores, axis=-1), v))


def _lowest(x: Any) -> float:
    """The smallest number of the type of a tensor."""
    import numpy as np

    kind = str(x.ty.dtype)
    return float(np.finfo(kind).min) if kind in ("float16", "float32", "float64") else -1e30


def _key_bias(bb: Any, mask: Any, q: Any, filtered: float) -> Any:
    """What a mask of ones and zeros (batch, keys) or (batch, queries, keys) adds to the products."""
    from tvm import relax

    axes = [1, 2] if len(mask.ty.shape) == 2 else [1]
    hidden = relax.op.less_equal(mask, relax.const(0, str(mask.ty.dtype)))
    bias = relax.op.where(hidden, number(q, filtered), number(q, 0.0))
    return bb.normalize(relax.op.expand_dims(bias, axes))


def contrib_attention(packed: bool) -> Converter:
    """Attention (weights of queries, keys and values in one) and MultiHeadAttention of ONNX Runtime."""

    def convert(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
        from tvm import relax

        heads = int(attrs["num_heads"])
        bias = at(inputs, 2 if packed else 3)
        if packed:
            width = int(inputs[1].ty.shape[1])
            widths = [int(size) for size in attrs.get("qkv_hidden_sizes") or [width // 3] * 3]
            joint = relax.op.matmul(inputs[0], inputs[1])
            parts = _split(bb, joint if bias is None else relax.op.add(joint, bias), widths, 2)
            mask, extra = at(inputs, 3), at(inputs, 5)
        else:
            parts = list(inputs[:3])
            if bias is not None:
                widths = [int(part.ty.shape[2]) for part in parts]
                shifts = _split(bb, bias, widths, 0)
                parts = [bb.normalize(relax.op.add(x, b)) for x, b in zip(parts, shifts, strict=True)]
            mask, extra = at(inputs, 4), at(inputs, 5)
        q, k, v = (_heads(bb, part, heads) for part in parts)
        scale = float(attrs.get("scale", 0.0)) or 1 / math.sqrt(int(q.ty.shape[3]))
        added = [] if mask is None else [_key_bias(bb, mask, q, float(attrs.get("mask_filter_value", -10000.0)))]
        added += [] if extra is None else [extra]
        causal = bool(attrs.get("unidirectional", 0))
        return _joined(bb, _attended(bb, q, k, v, scale=scale, added=added, causal=causal))

    return convert


def _split(bb: Any, x: Any, widths: Sequence[int], axis: int) -> list[Any]:
    from tvm import relax

    ends = [sum(widths[: k + 1]) for k in range(len(widths) - 1)]
    parts = bb.emit(relax.op.split(x, ends, axis))
    return [bb.emit(relax.TupleGetItem(parts, k)) for k in range(len(widths))]


def standard_attention(bb: Any, inputs: Sequence[Any], attrs: Mapping[str, Any], own: Callable[..., Any]) -> Any:
    """Attention of the standard, from opset 23."""
    from tvm import relax

    flat = len(inputs[0].ty.shape) == 3
    counts = [int(attrs.get(key, 0)) for key in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    q, k, v = (_heads(bb, x, n) if flat else x for x, n in zip(inputs[:3], counts, strict=True))
    scale = float(attrs.get("scale", 0.0)) or 1 / math.sqrt(int(q.ty.shape[3]))
    mask, added = at(inputs, 3), []
    if mask is not None and str(mask.ty.dtype) == "bool":
        added = [relax.op.where(mask, number(q, 0.0), number(q, _lowest(q)))]
    elif mask is not None:
        added = [mask]
    found = _attended(bb, q, k, v, scale=scale, added=added, causal=bool(attrs.get("is_causal", 0)))
    return _joined(bb, found) if flat else found
