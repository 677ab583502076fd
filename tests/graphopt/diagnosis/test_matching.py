"""Which tensors of one model stand for which of another: by name, provenance, node, place, and why not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import context
from text_graph import graph

from graphopt.diagnosis.matching import match
from graphopt.model import infer_shapes
from graphopt.passes.fold_batchnorm import FoldBatchNorm
from graphopt.rewriting.nodes import FOLDED_FROM

FOLDED = "folded: a node of B computes it together with what is behind it"
ONES = {name: np.ones(4, np.float32) for name in ("s", "t", "m", "v")}


def found(a: ir.Model, b: ir.Model) -> dict[str, tuple[str, str]]:
    return {pair.name: (str(pair.b.name), pair.how) for pair in match(a, b)[0]}


def missing(a: ir.Model, b: ir.Model) -> dict[str, str]:
    return {tensor.tensor: tensor.reason for tensor in match(a, b)[1]}


def named(model: ir.Model) -> ir.Model:
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def test_equal_models_match_by_name() -> None:
    a = graph("(float[N,4] x) => (float[N,4] y)", "h = MatMul(x, w)  y = Relu(h)", w=(4, 4))
    assert found(a, a.clone()) == {"h": ("h", "name"), "y": ("y", "name")}
    assert missing(a, a.clone()) == {}


def test_only_floats_that_depend_on_an_input_are_matched() -> None:
    a = graph(
        "(float[N,4] x) => (float[N,4] y)", "wt = Transpose(w)  n = Shape(x)  h = MatMul(x, wt)  y = Relu(h)", w=(4, 4)
    )
    assert list(found(a, a.clone())) == ["h", "y"]


@pytest.mark.parametrize("linear", ["c = Conv(x, w)", "p = Conv(x, w)  c = Relu(p)"])
def test_a_folded_norm_is_what_its_convolution_computes_now(linear: str) -> None:
    body = f"{linear}  n = BatchNormalization(c, s, t, m, v)  y = Sigmoid(n)"
    a = named(graph("(float[N,3,8,8] x) => (float[N,4,6,6] y)", body, w=(4, 3, 3, 3), **ONES))
    b = a.clone()
    if not FoldBatchNorm().run(b, context()).changed:
        # Behind a Relu nothing can be folded, and nothing may be matched otherwise than by name.
        assert {how for _, how in found(a, b).values()} == {"name"}
        return
    assert found(a, b) == {"n": ("c", "provenance"), "y": ("y", "name")}
    assert missing(a, b) == {"c": FOLDED}


def test_a_folded_norm_behind_a_product_is_its_new_bias() -> None:
    body = "c = MatMul(x, w)  n = BatchNormalization(c, s, t, m, v)  y = Sigmoid(n)"
    a = named(graph("(float[N,3] x) => (float[N,4] y)", body, w=(3, 4), **(ONES | {"t": np.full(4, 2, np.float32)})))
    b = a.clone()
    assert FoldBatchNorm().run(b, context()).changed
    pairs = found(a, b)
    assert pairs["n"][1] == "provenance" and "c" not in pairs
    total = next(v for node in b.graph for v in node.outputs if v.name == pairs["n"][0])
    assert total.producer().op_type == "Add"


def test_a_node_that_replaced_others_gives_what_the_last_of_them_gave() -> None:
    a = named(graph("(float[N,4] x) => (float[N,4] y)", "h = Sigmoid(x)  s = Mul(x, h)  y = Neg(s)"))
    b = named(graph("(float[N,4] x) => (float[N,4] y)", "fast = HardSwish(x)  y = Neg(fast)"))
    assert "s" not in found(a, b)
    b.graph[0].metadata_props[FOLDED_FROM] = "node_h,node_s"
    assert found(a, b)["s"] == ("fast", "provenance")
    twice = named(graph("(float[N,4] x) => (float[N,4] y)", "p = Exp(x)  q = Exp(p)  y = Neg(q)"))
    for node in list(twice.graph)[:2]:
        node.metadata_props[FOLDED_FROM] = "node_h,node_s"
    assert "s" not in found(a, twice), "which of the two is not known"


def test_duplicates_keep_their_names() -> None:
    a = named(graph("(float[N,4] x) => (float[N,4] y)", "p = Relu(x)  q = Relu(x)  y = Add(p, q)"))
    b = named(graph("(float[N,4] x) => (float[N,4] y)", "p = Relu(x)  y = Add(p, p)"))
    b.graph[0].metadata_props[FOLDED_FROM] = "node_q"
    assert found(a, b) == {"p": ("p", "name"), "y": ("y", "name")}
    assert missing(a, b) == {"q": FOLDED}


def test_integers_of_a_node_are_taken_where_they_are_dequantised() -> None:
    scale = {"s": np.float32(0.1), "z": np.uint8(3)}
    a = named(graph("(float[N,4] x) => (float[4,N] y)", "t = Transpose(x)  y = Sigmoid(t)"))
    b = graph(
        "(float[N,4] x) => (float[4,N] y)",
        "q = QuantizeLinear(x, s, z)  i = Transpose(q)  d = DequantizeLinear(i, s, z)  y = Sigmoid(d)",
        **{name: np.asarray(value) for name, value in scale.items()},
    )
    b.graph[1].name = "node_t"
    assert found(a, b) == {"t": ("d", "node"), "y": ("y", "name")}


def test_a_relu_that_saturation_stands_for_is_matched_behind_it() -> None:
    a = graph("(float[N,4] x) => (float[N,4] y)", "h = MatMul(x, w)  r = Relu(h)  y = Exp(r)", w=(4, 4))
    for name, how in (("r", {"h": ("r", "place"), "r": ("d", "name")}), ("h", {"h": ("h", "name")})):
        b = graph(
            "(float[N,4] x) => (float[N,4] y)",
            f"{name} = MatMul(x, w)  q = QuantizeLinear({name}, s, z)  d = DequantizeLinear(q, s, z)  y = Exp(d)",
            w=(4, 4), s=np.asarray(0.1, np.float32), z=np.asarray(0, np.uint8),
        )  # fmt: skip
        assert found(a, b) == {**how, "y": ("y", "name")}


def test_renamed_tensors_are_matched_by_their_place() -> None:
    a = graph("(float[N,4] x) => (float[N,4] y)", "h = MatMul(x, w)  r = Relu(h)  y = Tanh(r)", w=(4, 4))
    b = graph(
        "(float[N,4] x) => (float[N,4] y)",
        "i = QuantizeLinear(x, s, z)  d = DequantizeLinear(i, s, z)  one = MatMul(d, k)  two = Relu(one)"
        "  y = Tanh(two)",
        k=(4, 4), s=np.asarray(0.1, np.float32), z=np.asarray(3, np.uint8),
    )  # fmt: skip
    assert found(a, b) == {"h": ("one", "place"), "r": ("two", "place"), "y": ("y", "name")}


def test_places_that_several_nodes_fit_are_left() -> None:
    body = "{0} = MatMul(x, w)  {1} = MatMul(x, v)  y = Add({0}, {1})"
    signature, weights = "(float[N,4] x) => (float[N,4] y)", {"w": (4, 4), "v": (4, 4)}
    a, b = (graph(signature, body.format(*names), **weights) for names in (("p", "q"), ("one", "two")))
    assert found(a, b) == {"y": ("y", "name")}
    assert set(missing(a, b).values()) == {"B has nothing of its name, of its node's name or in its place"}
    apart = graph(signature, "one = MatMul(x, w)  two = Sigmoid(x)  y = Add(one, two)", w=(4, 4))
    mixed = graph(signature, "p = MatMul(x, w)  q = Sigmoid(x)  y = Add(p, q)", w=(4, 4))
    assert found(mixed, apart)["q"] == ("two", "place")


def test_attributes_tell_places_apart() -> None:
    a = graph("(float[N,1] x) => (float[N,1] y)", "p = LeakyRelu<alpha = 0.1>(x)  y = Exp(p)")
    b = graph("(float[N,1] x) => (float[N,1] y)", "r = LeakyRelu<alpha = 0.2>(x)  y = Exp(r)")
    assert list(found(a, b)) == ["y"]


def test_what_cannot_be_matched_says_why() -> None:
    a = graph("(float[N,4] x) => (float[N,4] y)", "h = MatMul(x, w)  y = MatMul(h, v)", w=(4, 6), v=(6, 4))
    pruned = graph("(float[N,4] x) => (float[N,4] y)", "h = MatMul(x, w)  y = MatMul(h, v)", w=(4, 5), v=(5, 4))
    assert missing(a, pruned) == {"h": "its shape is [N, 6], and [N, 5] in B"}
    integers = graph("(float[N,4] x) => (float[N,4] y)", "h = Cast<to = 6>(x)  f = Cast<to = 1>(h)  y = Neg(f)")
    infer_shapes(integers)
    assert missing(a, integers) == {"h": "h of B is int32, and nothing dequantises it"}
