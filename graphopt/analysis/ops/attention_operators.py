"""The attention operators: of ONNX (opset 23), and of ONNX Runtime's own domain as its exports hold them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Factors
from graphopt.analysis.ops.attention import HEADS, Attention, Kind, Layout, Part
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    return int(node.attributes.get_int(name, default) or 0)


def _dims(node: ir.Node, index: int) -> tuple[shapes.Dim, ...] | None:
    """Shape of an operand; None where there is none, or it is unknown."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else shapes.dims(value)


def _present(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _written(node: ir.Node, outputs: dict[int, Kind]) -> dict[int, Kind]:
    return {k: kind for k, kind in outputs.items() if k < len(node.outputs) and node.outputs[k].name}


def _size(fused: shapes.Dim, heads: int) -> int | None:
    """Positions in a head."""
    return fused // heads if isinstance(fused, int) and heads > 0 and fused % heads == 0 else None


def _mask_axis(node: ir.Node, index: int, heads: int) -> dict[int, int]:
    """The axis of heads of something that is added to the scores [B, heads, S, L]."""
    shape = _dims(node, index)
    return {index: len(shape) - 3} if shape is not None and len(shape) > 2 and shape[-3] == heads > 1 else {}


@rule
class StandardAttention(Attention):
    """Attention (opset 23): q, k, v [B, S, heads x size] with q_num_heads, kv_num_heads, or [B, heads, S, size]."""

    ops = ("Attention",)

    def layout(self, node: ir.Node) -> Layout | str:
        known = [_dims(node, index) for index in range(3)]
        q, k, v = known
        if q is None or k is None or v is None or not len(q) == len(k) == len(v):
            return "the rank of an operand is unknown"
        split = len(q) == 4
        heads, shared = (q[1], k[1]) if split else (_int(node, "q_num_heads"), _int(node, "kv_num_heads"))
        if not isinstance(heads, int) or not isinstance(shared, int) or not heads or not shared:
            return "its number of heads is unknown"
        size, values = (q[3], v[3]) if split else (_size(q[2], heads), _size(v[2], shared))
        if not isinstance(size, int) or not isinstance(values, int):
            return "the size of its heads is unknown"
        kinds: tuple[Kind, ...] = ("q", "k", "v")
        parts = [Part(kind, k, 1, 3) if split else Part(kind, k, 2) for k, kind in enumerate(kinds)]
        past: tuple[tuple[Kind, int], ...] = (("k", 4), ("v", 5))
        parts += [Part(kind, index, 1, 3) for kind, index in past if _present(node, index)]
        present = _written(node, {1: "k", 2: "v"})
        masks = _mask_axis(node, 3, heads)
        return Layout(heads, shared, size, values, parts, masks, split=split, present=present)

    def resize(self, node: ir.Node, heads: int, shared: int, size: int, values: int) -> None:
        if "q_num_heads" in node.attributes:
            node.attributes.add(ir.AttrInt64("q_num_heads", heads))
            node.attributes.add(ir.AttrInt64("kv_num_heads", shared))


@rule
class FusedAttention(Attention):
    """com.microsoft.Attention: x [B, S, D] times weights [D, Nq + Nk + Nv] plus bias; past and present [2, B, ...]."""

    ops = ("Attention",)
    domain = "com.microsoft"

    def layout(self, node: ir.Node) -> Layout | str:
        weight, heads = _dims(node, 1), _int(node, "num_heads")
        if weight is None or not isinstance(weight[1], int) or not heads:
            return "the shape of its weight is unknown"
        if _present(node, 4) or _present(node, 6) or _int(node, "do_rotary"):
            return "queries and keys are rotated" if _int(node, "do_rotary") else "its past holds all heads"
        given = list(node.attributes.get_ints("qkv_hidden_sizes", ()) or ()) or [weight[1] // 3] * 3
        size, values = _size(given[0], heads), _size(given[2], heads)
        if size is None or values is None or given[0] != given[1]:
            return "its hidden sizes do not divide by its heads"
        if len(node.outputs) > 1 and node.outputs[1].name:
            return "its cache holds all heads"
        kinds: tuple[Kind, ...] = ("q", "k", "v")
        operands = [1, 2] if _present(node, 2) else [1]
        starts = (0, given[0], given[0] + given[1])
        parts = [
            Part(kind, operand, 2 - operand, start=start)
            for operand in operands
            for kind, start in zip(kinds, starts, strict=True)
        ]
        return Layout(heads, heads, size, values, parts, _mask_axis(node, 5, heads))

    def inner(self, node: ir.Node) -> tuple[int, int] | None:
        return 0, 1

    def resize(self, node: ir.Node, heads: int, shared: int, size: int, values: int) -> None:
        node.attributes.add(ir.AttrInt64("num_heads", heads))
        node.attributes.add(ir.AttrInt64s("qkv_hidden_sizes", [heads * size, heads * size, heads * values]))


@rule
class MultiHeadAttention(Attention):
    """com.microsoft.MultiHeadAttention: q, k, v apart or packed in [B, S, heads, 3, size], with a bias of all three."""

    ops = ("MultiHeadAttention",)
    domain = "com.microsoft"

    def layout(self, node: ir.Node) -> Layout | str:
        q, k, v, heads = _dims(node, 0), _dims(node, 1), _dims(node, 2), _int(node, "num_heads")
        if q is None or not heads:
            return "the rank of an operand is unknown"
        if len(q) == 5 or (k is not None and len(k) == 5):
            return "queries, keys and values are packed in one operand"
        if k is None or v is None:
            return "the rank of an operand is unknown"
        size, values = _size(q[2], heads), v[3] if len(v) == 4 else _size(v[2], heads)
        if size is None or not isinstance(values, int):
            return "the size of its heads is unknown"
        parts = [Part("q", 0, 2)]
        parts.append(Part("k", 1, 1, 3) if len(k) == 4 else Part("k", 1, 2))
        parts.append(Part("v", 2, 1, 3) if len(v) == 4 else Part("v", 2, 2))
        if _present(node, 3):
            fused = heads * size
            parts += [Part("q", 3, 0), Part("k", 3, 0, start=fused), Part("v", 3, 0, start=2 * fused)]
        past: tuple[tuple[Kind, int], ...] = (("k", 6), ("v", 7))
        parts += [Part(kind, index, 1, 3) for kind, index in past if _present(node, index)]
        present = _written(node, {1: "k", 2: "v"})
        return Layout(heads, heads, size, values, parts, _mask_axis(node, 5, heads), present=present)

    def resize(self, node: ir.Node, heads: int, shared: int, size: int, values: int) -> None:
        node.attributes.add(ir.AttrInt64("num_heads", heads))


@rule
class GroupQueryAttention(Attention):
    """com.microsoft.GroupQueryAttention: heads of queries in groups that share keys and values."""

    ops = ("GroupQueryAttention",)
    domain = "com.microsoft"

    def layout(self, node: ir.Node) -> Layout | str:
        q, heads, shared = _dims(node, 0), _int(node, "num_heads"), _int(node, "kv_num_heads")
        if q is None or not heads or not shared:
            return "the rank of an operand is unknown"
        packed = not _present(node, 1)
        size = _size(q[2], heads + 2 * shared if packed else heads)
        if size is None:
            return "the size of its heads is unknown"
        if _int(node, "kv_cache_bit_width"):
            return "its cache is quantised"
        if packed:
            starts = (0, heads * size, (heads + shared) * size)
            parts = [Part("q", 0, 2), Part("k", 0, 2, start=starts[1]), Part("v", 0, 2, start=starts[2])]
        else:
            parts = [Part("q", 0, 2), Part("k", 1, 2), Part("v", 2, 2)]
        past: tuple[tuple[Kind, int], ...] = (("k", 3), ("v", 4))
        parts += [Part(kind, index, 1, 3) for kind, index in past if _present(node, index)]
        masks = _mask_axis(node, 10, heads) | ({11: 0} if _present(node, 11) else {})
        present = _written(node, {1: "k", 2: "v"})
        return Layout(heads, shared, size, size, parts, masks, positions=False, present=present)

    def resize(self, node: ir.Node, heads: int, shared: int, size: int, values: int) -> None:
        node.attributes.add(ir.AttrInt64("num_heads", heads))
        node.attributes.add(ir.AttrInt64("kv_num_heads", shared))


class _Rotary(OpRule):
    """Pairs of positions in a head are rotated by an angle that depends on the place: whole heads go."""

    cosines: int
    """Operand of the cosines; the sines are the next one."""

    def label(self, node: ir.Node, g: Labeller) -> None:
        name, shape = where(node), _dims(node, 0)
        x = g.operand(node, 0, role="producer")
        for index in range(1, len(node.inputs)):
            g.freeze(g.operand(node, index), f"{name}: angles have no units")
        axis, heads = self._heads(node, shape)
        if axis is None:
            g.freeze(x, f"{name}: its number of heads is unknown")
            return
        g.freeze(x, f"{name}: positions in a head are rotated together", but=(0, 1, axis) if axis == 2 else (0, 1, 2))
        passing = {a: f for a, f in x.items() if a < 2 or (axis == 1 and a == 2)}
        if axis == 2 and 2 in x:
            vector = g.table.product(x[2])
            closed = g.table.box(vector.reshape(heads, -1), name, HEADS).get(HEADS, ())
            flat: Factors = tuple(np.repeat(labels, len(vector) // heads) for labels in closed)
            passing[2] = flat
        g.set(node.outputs[0], passing)

    def _heads(self, node: ir.Node, shape: tuple[shapes.Dim, ...] | None) -> tuple[int | None, int]:
        """(axis, number) of the heads."""
        if shape is None:
            return None, 0
        if len(shape) == 4:
            return 1, 0
        heads, cosines = _int(node, "num_heads"), _dims(node, self.cosines)
        if not heads and cosines is not None and isinstance(cosines[-1], int) and isinstance(shape[2], int):
            heads = shape[2] // (2 * cosines[-1]) if cosines[-1] else 0
        return (2, heads) if heads and _size(shape[2], heads) is not None else (None, 0)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None:
                d.set(node.outputs[0], axis, np.where(values == 0, 0.0, np.nan))

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        mask, heads = r.operand_mask(node, 0, 2), _int(node, "num_heads")
        shape = _dims(node, 0)
        if heads and mask is not None and shape is not None and len(shape) == 3:
            node.attributes.add(ir.AttrInt64("num_heads", int(mask.reshape(heads, -1).any(axis=1).sum())))
        elif heads and shape is not None and len(shape) == 4 and r.operand_mask(node, 0, 1) is not None:
            node.attributes.add(ir.AttrInt64("num_heads", r.operand_count(node, 0, 1)))


@rule
class RotaryEmbedding(_Rotary):
    """RotaryEmbedding (opset 23): x, cosines, sines, places."""

    ops = ("RotaryEmbedding",)
    cosines = 1


@rule
class MicrosoftRotaryEmbedding(_Rotary):
    """com.microsoft.RotaryEmbedding: x, places, cosines, sines."""

    ops = ("RotaryEmbedding",)
    domain = "com.microsoft"
    cosines = 2
