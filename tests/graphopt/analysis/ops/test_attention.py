"""Attention operators: units counted by hand, attributes rewritten, certificates for heads and positions together."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from certified import certified, exact, reasons
from text_graph import graph

from graphopt.analysis.certificate import spare_axes
from graphopt.analysis.cost import model_stats
from graphopt.analysis.remove import remove_units
from graphopt.errors import GraphoptError
from graphopt.verify import compare, random_feeds

_PROJECT = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  "
_WEIGHTS = {"wq": (10, 12), "wk": (10, 12), "wv": (10, 9), "wo": (9, 7)}
_LENGTHS = {"last": np.full(1, 4, np.int32), "total": np.array(5, np.int32)}
_ANGLES = {"at": np.arange(5)[None], "co": (8, 2), "si": (8, 2)}
CASES = {
    "apart": (_PROJECT + "a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v)", _WEIGHTS, 3, 4 + 3),
    "bias": (
        _PROJECT + "a = com.microsoft.MultiHeadAttention<num_heads=3, scale=0.3>(q, k, v, bias)",
        {**_WEIGHTS, "bias": (33,)},
        3,
        4 + 3,
    ),
    "bias of scores": (
        _PROJECT + "a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v,,, scores)",
        {**_WEIGHTS, "scores": (1, 3, 5, 5)},
        3,
        4 + 3,
    ),
    "standard": (_PROJECT + "a = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v)", _WEIGHTS, 3, 4 + 3),
    "shared keys": (
        _PROJECT + "a = Attention<q_num_heads=6, kv_num_heads=3, is_causal=1>(q, k, v)",
        {**_WEIGHTS, "wq": (10, 24), "wo": (18, 7)},
        3,
        4 + 3,
    ),
    "fused": (
        "a = com.microsoft.Attention<num_heads=3>(x, w, bias)",
        {"w": (10, 36), "bias": (36,), "wo": (12, 7)},
        3,
        4 + 4,
    ),
    "fused, other values": (
        "a = com.microsoft.Attention<num_heads=3, qkv_hidden_sizes=[12, 12, 9], unidirectional=1>(x, w, bias)",
        {"w": (10, 33), "bias": (33,), "wo": (9, 7)},
        3,
        4 + 3,
    ),
    "grouped": (
        _PROJECT + "a = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v,,, last, total)",
        {"wq": (10, 32), "wk": (10, 16), "wv": (10, 16), "wo": (32, 7), **_LENGTHS},
        2,
        0,  # the operator rotates positions, or may
    ),
    "grouped, packed, rotated": (
        """p = MatMul(x, wq)
           a = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>(p,,,,, last, total, c, s)""",
        {"wq": (10, 128), "wo": (64, 7), "c": (16, 8), "s": (16, 8), **_LENGTHS},
        2,
        0,  # the operator rotates positions, or may
    ),
    "rotated": (
        _PROJECT
        + """qr = com.microsoft.RotaryEmbedding(q, at, co, si)  kr = com.microsoft.RotaryEmbedding(k, at, co, si)
             a = com.microsoft.MultiHeadAttention<num_heads=3>(qr, kr, v)""",
        {**_WEIGHTS, **_ANGLES},
        3,
        3,  # positions of v: those of q and k are rotated together
    ),
    "rotated by the standard": (
        _PROJECT
        + """qr = RotaryEmbedding<num_heads=3>(q, co, si, at)  kr = RotaryEmbedding<num_heads=3>(k, co, si, at)
             a = Attention<q_num_heads=3, kv_num_heads=3>(qr, kr, v)""",
        {**_WEIGHTS, **_ANGLES},
        3,
        3,
    ),
}


def model_of(name: str) -> ir.Model:
    body, parameters, _, _ = CASES[name]
    signature = "(float[1,5,10] x) => (float[1,5,7] y)"
    return graph(signature, f"{body}  y = MatMul(a, wo)", opset=23, imports='"com.microsoft" : 1', **parameters)


@pytest.mark.parametrize("name", CASES)
def test_heads_and_positions_are_units(name: str) -> None:
    assert exact(certified(model_of(name))) == sum(CASES[name][2:])


def test_heads_of_queries_that_share_keys_are_units_too() -> None:
    """The same one of each group: a head of queries that is zero still averages the values, so it is not exact."""
    coupling = certified(model_of("shared keys"))
    rest = [unit for unit in coupling.units if not unit.exact]
    assert len(rest) == 2
    rows = {m.parameter: m.indices for m in rest[0].members}
    assert rows["wq"] == tuple(head * 4 + place for head in (0, 2, 4) for place in range(4))
    pruned = coupling.model.clone()
    remove_units(pruned, coupling, {rest[0].id})
    node = next(node for node in pruned.graph if node.op_type == "Attention")
    assert node.attributes.get_int("q_num_heads") == node.attributes.get_int("kv_num_heads") == 3
    compare(pruned, pruned, random_feeds(pruned, 0))  # it runs


def test_numbers_of_heads_and_sizes_are_rewritten_and_the_scale_is_pinned() -> None:
    model = model_of("fused, other values")
    coupling = certified(model)
    columns = {unit.id: next(m.indices for m in unit.members if m.parameter == "w") for unit in coupling.units}
    pruned = model.clone()
    remove_units(pruned, coupling, {next(unit for unit, at in columns.items() if set(range(4)) <= set(at))})
    node = pruned.graph[0]
    assert node.attributes.get_int("num_heads") == 2
    assert list(node.attributes.get_ints("qkv_hidden_sizes")) == [8, 8, 6]
    assert "scale" not in node.attributes
    pruned = model.clone()
    remove_units(pruned, coupling, {next(unit for unit, at in columns.items() if {0, 4, 8} <= set(at))})
    node = pruned.graph[0]
    assert node.attributes.get_int("num_heads") == 3
    assert list(node.attributes.get_ints("qkv_hidden_sizes")) == [9, 9, 9]
    assert node.attributes.get_float("scale") == pytest.approx(0.5)


def test_heads_of_split_operands_and_their_positions_are_units_at_once() -> None:
    body = _PROJECT
    for name in "qkv":
        body += f"{name}r = Reshape({name}, sizes)  {name}t = Transpose<perm=[0, 2, 1, 3]>({name}r)  "
    body += "c = Attention(qt, kt, vt)  cr = Transpose<perm=[0, 2, 1, 3]>(c)  a = Reshape(cr, flat)  y = MatMul(a, wo)"
    model = graph(
        "(float[b,5,10] x) => (float[b,5,7] y)",
        body,
        opset=23,
        sizes=np.array([0, 0, 3, -1]),
        flat=np.array([0, 0, -1]),
        **_WEIGHTS,
    )
    assert exact(certified(model)) >= 4 + 3


def test_a_cache_that_the_graph_is_given_freezes_the_heads() -> None:
    model = graph(
        "(float[1,5,10] x, float[1,3,2,4] pk, float[1,3,2,3] pv) => (float[1,5,7] y)",
        _PROJECT + "a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v,,,, pk, pv)  y = MatMul(a, wo)",
        imports='"com.microsoft" : 1',
        **_WEIGHTS,
    )
    coupling = certified(model)
    assert not coupling.units
    assert "an operand is never shortened" in reasons(coupling, "wv")


def test_attention_is_counted() -> None:
    inner = 5 * 10 * (12 + 12 + 9) + 5 * 9 * 7
    assert model_stats(model_of("apart")).macs == inner + 5 * 5 * (12 + 9)
    fused = 5 * 10 * 33 + 5 * 9 * 7
    assert model_stats(model_of("fused, other values")).macs == fused + 5 * 5 * (12 + 9)


def test_queries_do_not_vanish_beside_values_in_one_weight() -> None:
    model = model_of("fused")
    coupling = certified(model)
    values = coupling.parameter_axes("wo")[0]
    keys = {unit.id for unit in coupling.units} - {int(u) for vector in values for u in vector}
    with pytest.raises(GraphoptError, match="leave nothing"):
        remove_units(model.clone(), coupling, keys)
    assert spare_axes(coupling, keys) < keys
