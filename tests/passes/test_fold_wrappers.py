"""fold-wrappers: each exact case folds and computes the same, each near miss stays and says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from factorised import exact, factorise, wrapper_nodes
from text_graph import graph

from graphopt.passes.fold_wrappers import FoldWrappers

RNG = np.random.default_rng(0)
TOKENS = "(float[n,t,16] x) => (float[n,t,16] y)"
IMAGE = "(float[n,16,6,6] x) => (float[n,16,h,w] y)"


def tokens(*shape: int) -> dict[str, np.ndarray]:
    return {"x": RNG.normal(size=shape or (2, 5, 16)).astype(np.float32)}


def image() -> dict[str, np.ndarray]:
    return tokens(2, 16, 6, 6)


def reasons(result: Any) -> str:
    return "\n".join(f"{skip.node}: {skip.reason}" for skip in result.skipped)


def folded(model: ir.Model, feeds: dict[str, np.ndarray], into: list[str]) -> None:
    """Every wrapper goes, into these."""
    nodes = len(model.graph)
    result = exact(model, FoldWrappers(), feeds)
    assert not reasons(result)
    assert wrapper_nodes(model) == 0
    assert [row["folded into"] for row in result.details["folded wrappers"]] == into
    assert len(model.graph) < nodes


def stays(model: ir.Model, feeds: dict[str, np.ndarray], why: str) -> None:
    nodes = wrapper_nodes(model)
    result = exact(model, FoldWrappers(), feeds)
    assert not result.changed
    assert why in reasons(result)
    assert wrapper_nodes(model) == nodes


# -- a dense layer in front or behind -----------------------------------------------------------------------------


def test_an_inner_wrapper_into_the_layer_in_front_and_its_bias() -> None:
    model = graph(TOKENS, "a = MatMul(x, v) b = Add(a, c) y = MatMul(b, w)", v=(16, 16), c=(16,), w=(16, 16))
    folded(factorise(model, {"y": {"right": 8}}), tokens(), ["a"])
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "MatMul"]


@pytest.mark.parametrize("front", ["Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, v, c)", "ConvTranspose(x, v, c)"])
def test_convolutions_in_front_of_any_kernel(front: str) -> None:
    model = graph(IMAGE, f"a = {front} y = Conv<pads=[1,1,1,1]>(a, w)", v=(16, 16, 3, 3), c=(16,), w=(16, 16, 3, 3))
    folded(factorise(model, {"y": {"right": 4}}), image(), ["a"])


def test_pooling_by_means_and_flattening_lie_between() -> None:
    model = graph(
        "(float[n,16,6,6] x) => (float[n,16] y)",
        "a = Conv(x, v) g = GlobalAveragePool(a) f = Flatten(g) y = Gemm(f, w, c)",
        v=(16, 16, 1, 1), w=(16, 16), c=(16,),
    )  # fmt: skip
    folded(factorise(model, {"y": {"right": 8}}), image(), ["a"])


def test_an_outer_wrapper_into_the_layer_behind_with_its_bias_before_it() -> None:
    model = graph(
        "(float[n,16] x) => (float[n,8] y)",
        "a = Gemm<transB=1>(x, w, c) y = Gemm(a, v, d)",
        w=(16, 16), c=(16,), v=(16, 8), d=(8,),
    )  # fmt: skip
    folded(factorise(model, {"a": {"left": 8}}), tokens(3, 16), ["y"])
    model = graph(
        TOKENS, "a = MatMul(x, w) b = Add(a, c) y = MatMul(b, v)", w=(16, 16), c=(16,), v=(16, 16)
    )  # fmt: skip
    folded(factorise(model, {"a": {"left": 4}}), tokens(), ["y"])


def test_an_outer_wrapper_into_padded_convolutions_behind() -> None:
    body = "a = Conv(x, w, c) b = Conv<pads=[1,1,1,1]>(a, v) e = Conv(a, u) y = Add(b, e)"
    model = graph(IMAGE, body, w=(16, 16, 1, 1), c=(16,), v=(16, 16, 3, 3), u=(16, 16, 1, 1))
    folded(factorise(model, {"a": {"left": 4}}), image(), ["b, e"])


def test_groups_take_blocks_that_do_not_reach_over_them() -> None:
    body = "a = Conv<group=2>(x, v) y = Conv(a, w)"
    weights = {"v": (16, 8, 1, 1), "w": (16, 16, 1, 1)}
    folded(factorise(graph(IMAGE, body, **weights), {"y": {"right": 8}}), image(), ["a"])
    stays(factorise(graph(IMAGE, body, **weights), {"y": {"right": 16}}), image(), "reach over the groups of")
    body = "a = Conv(x, w) y = Conv<group=2>(a, v)"
    folded(factorise(graph(IMAGE, body, **weights), {"a": {"left": 4}}), image(), ["y"])
    stays(factorise(graph(IMAGE, body, **weights), {"a": {"left": 16}}), image(), "mix channels")


# -- what lies between ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["Relu(a)", "Softmax(a)", "Sigmoid(a)", "Add(a, x)"])
def test_nothing_folds_across_an_activation_or_a_sum(between: str) -> None:
    body = f"a = MatMul(x, v) b = {between} y = MatMul(b, w)"
    stays(factorise(graph(TOKENS, body, v=(16, 16), w=(16, 16)), {"y": {"right": 8}}), tokens(), "no linear layer")
    stays(factorise(graph(TOKENS, body, v=(16, 16), w=(16, 16)), {"a": {"left": 8}}), tokens(), "reads it")


def test_another_reader_keeps_the_wrapper_where_it_is() -> None:
    body = "a = MatMul(x, v) b = MatMul(a, w) r = Relu(a) y = Add(b, r)"
    model = factorise(graph(TOKENS, body, v=(16, 16), w=(16, 16)), {"b": {"right": 8}})
    stays(model, tokens(), "Relu reads the same without a wrapper")
    model = graph("(float[n,t,16] x) => (float[n,t,16] y, float[n,t,16] a)", "a = MatMul(x, v) y = MatMul(a, w)",
                  v=(16, 16), w=(16, 16))  # fmt: skip
    stays(factorise(model, {"y": {"right": 8}}), tokens(), "the caller reads the same")


def test_readers_that_share_a_wrapper_fold_together_and_others_not() -> None:
    body = "a = MatMul(x, v) q = MatMul(a, w1) k = MatMul(a, w2) y = Add(q, k)"
    weights = {"v": (16, 16), "w1": (16, 16), "w2": (16, 16)}
    layers = {"q": {"right": 8}, "k": {"right": 8}}
    folded(factorise(graph(TOKENS, body, **weights), layers, same=True), tokens(), ["a", "a"])
    stays(factorise(graph(TOKENS, body, **weights), layers), tokens(), "in different ways")


def test_a_fused_projection_is_mixed_only_where_it_is_read() -> None:
    body = "a = MatMul(x, v) p, q = Split<axis=-1>(a, parts) r = Relu(p) s = Transpose<perm=[1,0,2]>(q) " \
           "u = Transpose<perm=[1,0,2]>(s) z = MatMul(u, w) y = Add(z, r)"  # fmt: skip
    model = graph(TOKENS, body, v=(16, 32), w=(16, 16), parts=np.array([16, 16]))
    folded(factorise(model, {"z": {"right": 8}}), tokens(), ["a"])


def test_sparse_neighbours_keep_their_zeros() -> None:
    body = "a = MatMul(x, v) y = MatMul(a, w)"
    both = {"a": {"right": 8}, "y": {"right": 8}}
    result = exact(factorise(graph(TOKENS, body, v=(16, 16), w=(16, 16)), both), FoldWrappers(), tokens())
    assert "is sparse, and would lose its zeros" in reasons(result)
    v = RNG.normal(size=(16, 16)).astype(np.float32)
    v[::4] = v[1::4] = 0  # of some other tool
    stays(factorise(graph(TOKENS, body, v=v, w=(16, 16)), {"y": {"right": 8}}), tokens(), "is sparse")


@pytest.mark.parametrize(("left", "right", "made"), [(8, 8, 8), (4, 8, 8), (8, 4, 8)])
def test_of_two_wrappers_between_two_cores_one_stays(left: int, right: int, made: int) -> None:
    model = graph(TOKENS, "a = MatMul(x, v) b = Add(a, c) y = MatMul(b, w)", v=(16, 16), c=(16,), w=(16, 16))
    factorise(model, {"a": {"left": left}, "y": {"right": right}})
    assert wrapper_nodes(model) == 10
    result = exact(model, FoldWrappers(), tokens())
    assert wrapper_nodes(model) == 5
    assert [row["side"] for row in result.details["folded wrappers"]] == ["in"]
    (product,) = [n for n in model.graph if n.op_type == "MatMul" and len(n.inputs[1].shape) == 4]
    assert list(product.inputs[1].shape) == [16 // made, 1, made, made]


def test_two_wrappers_of_convolutions_become_one_with_its_bias() -> None:
    model = graph(IMAGE, "a = Conv(x, v, c) y = Conv(a, w)", v=(16, 16, 1, 1), c=(16,), w=(16, 16, 1, 1))
    factorise(model, {"a": {"left": 4}, "y": {"right": 8}})
    exact(model, FoldWrappers(), image())
    assert [n.attributes.get_int("group", 1) for n in model.graph if n.op_type == "Conv"] == [1, 2, 1]


def test_blocks_that_do_not_nest_stay_two() -> None:
    model = graph("(float[n,24] x) => (float[n,24] y)", "a = MatMul(x, v) y = MatMul(a, w)", v=(24, 24), w=(24, 24))
    model = factorise(model, {"a": {"left": 8}, "y": {"right": 12}})
    stays(model, tokens(3, 24), "do not nest")


# -- attention -------------------------------------------------------------------------------------------------------

HEADS = """
q = MatMul(x, wq)  k = MatMul(x, wk)  v0 = MatMul(x, wv)  v = Add(v0, bv)
qs = Reshape(q, cut)  qt = Transpose<perm=[0,2,1,3]>(qs)
ks = Reshape(k, cut)  kt = Transpose<perm=[0,2,3,1]>(ks)
vs = Reshape(v, cut)  vt = Transpose<perm=[0,2,1,3]>(vs)
s = MatMul(qt, kt)  p = Softmax<axis=-1>(s)  o = MatMul(p, vt)
ot = Transpose<perm=[0,2,1,3]>(o)  oj = Reshape(ot, joined)  y = MatMul(oj, wo)
"""


def attention(kv: int = 16, **shapes: Any) -> ir.Model:
    return graph(
        TOKENS, HEADS, wq=(16, 16), wk=(16, kv), wv=(16, kv), bv=(kv,), wo=(16, 16),
        cut=np.array([0, 0, 2, 8]), joined=np.array([0, 0, 16]), **shapes,
    )  # fmt: skip


def test_an_inner_wrapper_of_o_goes_through_attention_into_v() -> None:
    folded(factorise(attention(), {"y": {"right": 8}}), tokens(), ["v0"])
    folded(factorise(attention(), {"y": {"right": 4}}), tokens(), ["v0"])


def test_an_outer_wrapper_of_v_goes_through_attention_into_o() -> None:
    folded(factorise(attention(), {"v0": {"left": 8}}), tokens(), ["y"])


def test_of_two_wrappers_on_either_side_of_attention_one_stays() -> None:
    model = factorise(attention(), {"v0": {"left": 8}, "y": {"right": 4}})
    exact(model, FoldWrappers(), tokens())
    assert wrapper_nodes(model) == 5


def test_blocks_that_reach_over_heads_stay() -> None:
    stays(factorise(attention(), {"y": {"right": 16}}), tokens(), "of several heads")
    stays(factorise(attention(), {"v0": {"left": 16}}), tokens(), "of several heads")


def test_queries_and_keys_do_not_commute_with_wrappers() -> None:
    stays(factorise(attention(), {"q": {"left": 8}}), tokens(), "MatMul reads it")


def test_heads_merged_with_the_batch_are_told_apart() -> None:
    body = """
    q = MatMul(x, wq)  v = MatMul(x, wv)
    qs = Reshape(q, cut)  qt = Transpose<perm=[0,2,1,3]>(qs)  qb = Reshape(qt, batched)
    vs = Reshape(v, cut)  vt = Transpose<perm=[0,2,1,3]>(vs)  vb = Reshape(vt, batched)
    kb = Transpose<perm=[0,2,1]>(qb)  s = MatMul(qb, kb)  p = Softmax<axis=-1>(s)  o = MatMul(p, vb)
    os = Reshape(o, split)  ot = Transpose<perm=[0,2,1,3]>(os)  oj = Reshape(ot, joined)  y = MatMul(oj, wo)
    """
    for batch, sizes in (("3", [3, 2, 5, 8]), ("n", [-1, 2, 5, 8])):
        for block in (8, 16):
            model = graph(
                f"(float[{batch},5,16] x) => (float[{batch},5,16] y)", body,
                wq=(16, 16), wv=(16, 16), wo=(16, 16), cut=np.array([0, 0, 2, 8]), batched=np.array([-1, 5, 8]),
                split=np.array(sizes), joined=np.array([0, 0, 16]),
            )  # fmt: skip
            factorise(model, {"y": {"right": block}})
            if block == 8:
                folded(model, tokens(3, 5, 16), ["v"])
            else:
                stays(model, tokens(3, 5, 16), "of several heads")


FUSED = """
qkv = MatMul(x, wqkv)  b = Add(qkv, bias)  q, k, v = Split<axis=2>(b, parts)  size = Shape(v)
qs = Reshape(q, cut)  qt = Transpose<perm=[0,2,1,3]>(qs)
ks = Reshape(k, cut)  kt = Transpose<perm=[0,2,3,1]>(ks)
vs = Reshape(v, cut)  vt = Transpose<perm=[0,2,1,3]>(vs)
s = MatMul(qt, kt)  p = Softmax<axis=-1>(s)  o = MatMul(p, vt)
ot = Transpose<perm=[0,2,1,3]>(o)  oj = Reshape(ot, size)  y = MatMul(oj, wo)
"""


def test_fused_projections_are_mixed_in_their_values_alone() -> None:
    for layer, side, block, into in (("y", "right", 4, "qkv"), ("qkv", "left", 8, "")):
        model = graph(TOKENS, FUSED, wqkv=(16, 48), bias=(48,), wo=(16, 16), parts=np.array([16, 16, 16]),
                      cut=np.array([0, 0, 2, 8]))  # fmt: skip
        factorise(model, {layer: {side: block}})
        if into:
            before = model.graph.initializers["wqkv"].const_value.numpy()
            folded(model, tokens(), [into])
            after = model.graph.initializers["wqkv"].const_value.numpy()
            assert np.array_equal(before[:, :32], after[:, :32])
            assert not np.allclose(before[:, 32:], after[:, 32:])
        else:
            stays(model, tokens(), "MatMul reads it")


def test_a_product_of_channels_with_themselves_moves_nothing() -> None:
    body = "a = MatMul(x, v) t = Identity(a) b = Mul(a, t) y = MatMul(b, w)"
    model = graph(TOKENS, body, v=(16, 16), w=(16, 16))
    stays(factorise(model, {"y": {"right": 8}}), tokens(), "reads it twice")


GROUPED = """
q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
qs = Reshape(q, cut)  qt = Transpose<perm=[0,2,1,3]>(qs)
ks = Reshape(k, cutkv)  kt = Transpose<perm=[0,2,1,3]>(ks)  ku = Unsqueeze(kt, two)  ke = Expand(ku, copies)
kf = Reshape(ke, heads)  kk = Transpose<perm=[0,1,3,2]>(kf)
vs = Reshape(v, cutkv)  vt = Transpose<perm=[0,2,1,3]>(vs)  vu = Unsqueeze(vt, two)  ve = Expand(vu, copies)
vf = Reshape(ve, heads)
s = MatMul(qt, kk)  p = Softmax<axis=-1>(s)  o = MatMul(p, vf)
ot = Transpose<perm=[0,2,1,3]>(o)  oj = Reshape(ot, joined)  y = MatMul(oj, wo)
"""


def grouped() -> ir.Model:
    return graph(
        "(float[n,5,16] x) => (float[n,5,16] y)", GROUPED, wq=(16, 16), wk=(16, 8), wv=(16, 8), wo=(16, 16),
        cut=np.array([0, 0, 4, 4]), cutkv=np.array([0, 0, 2, 4]), two=np.array([2]), copies=np.array([1, 1, 2, 1, 1]),
        heads=np.array([0, 4, 5, 4]), joined=np.array([0, 0, 16]),
    )  # fmt: skip


def test_grouped_queries_fold_only_where_a_group_is_mixed_alike() -> None:
    stays(factorise(grouped(), {"y": {"right": 4}}), tokens(), "in different ways")
    model = factorise(grouped(), {"y": {"right": 4}})
    name = next(n for n in model.graph.initializers if n.endswith("in_blocks"))
    value = model.graph.initializers[name]
    equal = value.const_value.numpy()[[0, 0, 1, 1]]  # heads 0 and 1 share values, and 2 and 3
    value.const_value = ir.tensor(np.ascontiguousarray(equal), name=name)
    folded(model, tokens(), ["v"])
    folded(factorise(grouped(), {"v": {"left": 4}}), tokens(), ["y"])


# -- scales, shifts, norms, diagonals -------------------------------------------------------------------------------


def test_constants_in_front_go_into_wrappers_and_biases() -> None:
    body = "s = Softmax(x) a = Mul(s, g) b = Add(a, h) c = Sub(b, k) z = MatMul(c, w) y = Add(z, d)"
    model = graph(TOKENS, body, g=(16,), h=(16,), k=(16,), w=(16, 16), d=(16,))
    factorise(model, {"z": {"right": 8}})
    result = exact(model, FoldWrappers(), tokens())
    assert [row["wrapper"] for row in result.details["folded wrappers"]] == ["Sub(c)", "Add(b)", "Mul(a)"]
    assert "Mul" not in {node.op_type for node in model.graph}


def test_the_affine_of_a_norm_goes_into_all_its_readers_or_stays() -> None:
    body = "a = LayerNormalization(x, g, h) p = Gemm(a, w, d) q = Gemm(a, v, e) y = Add(p, q)"
    weights = {"g": (16,), "h": (16,), "w": (16, 16), "v": (16, 16), "d": (16,), "e": (16,)}
    signature = "(float[n,16] x) => (float[n,16] y)"
    model = factorise(graph(signature, body, **weights), {"p": {"right": 8}, "q": {"right": 4}})
    result = exact(model, FoldWrappers(), tokens(3, 16))
    assert result.changed
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert len(norm.inputs) == 2 and (norm.inputs[1].const_value.numpy() == 1).all()
    model = factorise(graph(signature, body, **weights), {"p": {"right": 8}})
    stays(model, tokens(3, 16), "no linear layer")


def test_a_shift_that_no_bias_can_take_stays() -> None:
    model = graph(TOKENS, "s = Softmax(x) a = Add(s, h) y = MatMul(a, w)", h=(16,), w=(16, 16))
    stays(factorise(model, {"y": {"right": 8}}), tokens(), "no linear layer")
    body = "s = Softmax(x) a = Add(s, h) y = Conv<pads=[1,1,1,1]>(a, w)"
    model = graph(IMAGE, body, h=(16, 1, 1), w=(16, 16, 3, 3))
    stays(factorise(model, {"y": {"right": 8}}), image(), "no linear layer")


@pytest.mark.parametrize("side", ["left", "right"])
def test_diagonal_wrappers_go_into_the_core(side: str) -> None:
    model = graph(TOKENS, "r = Relu(x) a = MatMul(r, w) b = Add(a, c) y = Relu(b)", w=(16, 16), c=(16,))
    folded(factorise(model, {"a": {side: 8}}, diagonal=True), tokens(), ["MatMul(a)"])
    model = graph(IMAGE, "r = Relu(x) a = Conv<pads=[1,1,1,1]>(r, w, c) y = Relu(a)", w=(16, 16, 3, 3), c=(16,))
    folded(factorise(model, {"a": {side: 8}}, diagonal=True), image(), ["Conv(a)"])


def test_models_without_wrappers_are_left_alone() -> None:
    model = graph(IMAGE, "a = Conv<group=4>(x, v) y = Conv(a, w)", v=(16, 4, 1, 1), w=(16, 16, 1, 1))
    assert not exact(model, FoldWrappers(), image()).changed
