"""equalize: channels of even ranges, by scales that commute with all that is between the layers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, random_feeds, reasons, run
from random_graphs import random_graph
from text_graph import graph

from graphopt.base import PassResult
from graphopt.passes.equalize import Equalize
from graphopt.rewriting.constants import float64

EXACTLY = Equalize()
ROUNDED = Equalize(power_of_two=False)
WIDE = np.array([64, 1, 1 / 64, 4], np.float32)


def magnitudes(model: ir.Model, name: str, axis: int) -> np.ndarray:
    """Largest magnitude of each slice of a parameter."""
    weight = float64(model.graph.initializers[name])
    assert weight is not None
    return np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(axis=1)


def equalised(model: ir.Model, what: Equalize = EXACTLY) -> PassResult:
    """Run the pass; the outputs must be equal, with powers of two to the last bit."""
    feeds = random_feeds(model)
    before = run(model, feeds)
    result = what.run(model, context())
    for got, wanted in zip(run(model, feeds), before, strict=True):
        if what.power_of_two:
            np.testing.assert_array_equal(got, wanted)
        else:
            assert_close([got], [wanted])
    return result


def test_rows_and_columns_meet_in_the_middle() -> None:
    result = expect(
        """a (float[N,2] x) => (float[N,1] y)
        <float[2,2] w = {16.0, 1.0, 4.0, 2.0}, float[2] b = {8.0, 1.0}, float[2,1] v = {1.0, 32.0}>
        { h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v) }""",
        """a (float[N,2] x) => (float[N,1] y)
        <float[2,2] w = {4.0, 4.0, 1.0, 8.0}, float[2] b = {2.0, 4.0}, float[2,1] v = {4.0, 8.0}>
        { h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v) }""",
        EXACTLY,
    )
    assert result.details["equalised channels"] == [
        {
            "written by": "Gemm(h)",
            "read by": "MatMul(y)",
            "channels": 2,
            "smallest scale": 0.25,
            "largest scale": 4.0,
        }
    ]
    assert reasons(result) == "MatMul(y): output 'y' of the graph"


def test_scales_need_no_power_of_two() -> None:
    w, v = np.diag([27.0, 3.0]).astype(np.float32), np.array([[3.0], [27.0]], np.float32)
    model = graph("(float[N,2] x) => (float[N,1] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)", w=w, v=v)
    equalised(model, ROUNDED)
    np.testing.assert_allclose(magnitudes(model, "w", 1), [9, 9], rtol=1e-6)
    np.testing.assert_allclose(magnitudes(model, "v", 0), [9, 9], rtol=1e-6)


PASSING = {
    "nothing": "a = Identity(h)",
    "relu": "a = Relu(h)",
    "leaky": "a = LeakyRelu<alpha=0.1>(h)",
    "clip at zero": "z = Constant<value_float=0.0>()  a = Clip(h, z)",
    "pooling": "p = MaxPool<kernel_shape=[2,2]>(h)  a = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(p)",
    "batch norm": "i = BatchNormalization(h, g, c, m, s)  a = Relu(i)",
    "factors": "q = Mul(h, k)  p = Add(q, k)  a = Relu(p)",
    "maximum of a constant": "a = Max(h, low)",
    "a gate": "t = GlobalAveragePool(x)  u = ReduceMean<axes=[1]>(t)  o = Sigmoid(u)  a = Mul(h, o)",
    "transposes": "t = Transpose<perm=[0,2,3,1]>(h)  r = Relu(t)  a = Transpose<perm=[0,3,1,2]>(r)",
    "a residual": "i = Conv<pads=[1,1,1,1]>(h, d)  j = Relu(i)  a = Add(h, j)",
    "a concatenation": "l, r = Split<axis=1>(h)  e = Relu(l)  a = Concat<axis=1>(e, r)",
    "depthwise": "e = Conv<group=4, pads=[1,1,1,1]>(h, f)  a = Relu(e)",
    "zeros": "n = Constant<value=int64[8] {0,0,1,1,0,0,1,1}>()  a = Pad(h, n)",
    "resizing": 'o = Constant<value=float[4] {1.0,1.0,2.0,2.0}>()  a = Resize<mode="nearest">(h, , o)',
}


@pytest.mark.parametrize("between", PASSING)
def test_what_scales_pass(between: str) -> None:
    random = np.random.default_rng(3)
    column = WIDE[:, None, None, None]
    model = graph(
        "(float[N,3,6,6] x) => (float[N,5,A,B] y)",
        f"h = Conv<pads=[1,1,1,1]>(x, w, b)  {PASSING[between]}  y = Conv(a, v)",
        w=(random.normal(size=(4, 3, 3, 3)) * column).astype(np.float32),
        b=(random.normal(size=4) * WIDE).astype(np.float32),
        v=(random.normal(size=(5, 4, 1, 1)) / WIDE[:, None, None]).astype(np.float32),
        d=(random.normal(size=(4, 4, 3, 3)) * column / WIDE[:, None, None]).astype(np.float32),
        f=(4, 1, 3, 3),
        k=(4, 1, 1),
        low=WIDE[:, None, None] / 10,
        g=(4,),
        c=(4,),
        m=(4,),
        s=np.ones(4, np.float32),
    )
    result = equalised(model)
    rows = magnitudes(model, "w", 0)
    assert rows.max() / rows.min() < 150, rows  # of 4096
    assert result.changed
    assert reasons(result) == "Conv(y): output 'y' of the graph"


STOPPING = {
    "Sigmoid": ("a = Sigmoid(h)", "Sigmoid 'Sigmoid(a)' is not positively homogeneous"),
    "ReLU6": (
        "z = Constant<value_float=0.0>()  s = Constant<value_float=6.0>()  a = Clip(h, z, s)",
        "Clip 'Clip(a)' has the bound 6, which would have to differ from channel to channel",
    ),
    "a square": ("a = Mul(h, h)", "Mul 'Mul(a)' mixes channels in a way that is not followed"),
    "an addend": ("e = Exp(x)  a = Add(h, e)", "Add 'Add(a)' adds 'e', whose scale is fixed"),
    "a norm": (
        "a = InstanceNormalization(h, q, q)",
        "InstanceNormalization 'InstanceNormalization(a)' takes the scales of all channels away together",
    ),
    "a body": (
        """c = Constant<value=bool {1}>()  a = If(c)<then_branch = t () => (float[N,4,6,6] p) { p = Tanh(h) },
        else_branch = e () => (float[N,4,6,6] o) { o = Relu(h) }>""",
        "If 'If(a)' reads it in a body",
    ),
    "a fill": (
        "n = Constant<value=int64[8] {0,0,1,1,0,0,1,1}>()  u = Constant<value_float=1.0>()  a = Pad(h, n, u)",
        "Pad 'Pad(a)' fills with another value than zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("between", STOPPING)
def test_what_stops_scales_is_named(between: str) -> None:
    body, reason = STOPPING[between]
    model = graph(
        "(float[N,4,6,6] x) => (float[N,5,A,B] y)",
        f"h = Conv(x, w)  {body.replace(chr(10), ' ')}  y = Conv(a, v)",
        w=WIDE[:, None, None, None] * np.ones((4, 4, 1, 1), np.float32),
        v=1 / WIDE[None, :, None, None],
        q=np.ones(4, np.float32),
    )
    result = equalised(model)
    assert f"Conv(h): {reason}" in reasons(result)
    np.testing.assert_array_equal(magnitudes(model, "w", 0), WIDE)


def test_an_output_keeps_its_scale() -> None:
    w = np.diag(WIDE)
    model = graph(
        "(float[N,4] x) => (float[N,4] h, float[N,1] y)", "h = MatMul(x, w)  y = MatMul(h, v)", w=w, v=1 / WIDE[:, None]
    )
    assert not equalised(model).changed
    np.testing.assert_array_equal(magnitudes(model, "w", 1), WIDE)


def test_values_of_attention_and_scales_of_norms() -> None:
    """Heads are moved, mixed over positions and moved back; a norm's scale writes what queries, keys, values read."""
    text = """n = LayerNormalization<axis=-1>(x, g, c)
    q = MatMul(n, wq)  k = MatMul(n, wk)  v0 = MatMul(n, wv)  vb = Add(v0, bv)
    to = Constant<value=int64[4] {0, 0, 2, 3}>()  back = Constant<value=int64[3] {0, 0, 6}>()
    q1 = Reshape(q, to)  q2 = Transpose<perm=[0,2,1,3]>(q1)  k1 = Reshape(k, to)  k2 = Transpose<perm=[0,2,3,1]>(k1)
    v1 = Reshape(vb, to)  v2 = Transpose<perm=[0,2,1,3]>(v1)  s = MatMul(q2, k2)  p = Softmax<axis=-1>(s)
    o = MatMul(p, v2)  o1 = Transpose<perm=[0,2,1,3]>(o)  o2 = Reshape(o1, back)  y = MatMul(o2, wo)"""
    spread = np.exp2(np.arange(-6, 6, 2)).astype(np.float32)
    square = np.random.default_rng(0).uniform(1, 2, (6, 6)).astype(np.float32)
    model = graph(
        "(float[N,T,6] x) => (float[N,T,6] y)", text,
        g=spread, c=spread, wq=square / spread[:, None], wk=square / spread[:, None],
        wv=square * spread / spread[:, None], bv=spread, wo=square / spread[:, None],
    )  # fmt: skip
    equalised(model)
    assert np.ptp(np.log2(magnitudes(model, "g", 0))) <= 6
    assert np.ptp(np.log2(magnitudes(model, "wv", 1))) <= 6


def test_shared_matrices_have_one_scale_and_shared_vectors_get_copies() -> None:
    w = (np.diag(WIDE) + 0.01).astype(np.float32)
    model = graph(
        "(float[N,4] x) => (float[N,1] y)",
        "h = Gemm(x, w, b)  r = Relu(h)  i = Gemm(r, u, b)  s = Relu(i)  y = MatMul(s, v)",
        w=w, u=1 / WIDE[:, None] * np.ones((1, 4), np.float32), b=np.ones(4, np.float32), v=(4, 1),
    )  # fmt: skip
    equalised(model)
    assert len(model.graph.initializers) == 5  # b, and a copy of it
    tied = graph(
        "(float[N,4] x) => (float[N,1] y)",
        "h = MatMul(x, w)  r = Relu(h)  i = MatMul(r, w)  s = Relu(i)  y = MatMul(s, v)",
        w=w, v=(4, 1),
    )  # fmt: skip
    result = equalised(tied)
    assert "MatMul(h): 'w' is the weight of several layers" in reasons(result)
    np.testing.assert_array_equal(float64(tied.graph.initializers["w"]), w)  # x has no scale, so neither has w


def test_sixteen_bits_stay_in_range() -> None:
    w = np.diag([2.0**14, 2.0**-14]).astype(np.float16)
    model = graph(
        "(float16[N,2] x) => (float16[N,1] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)",
        w=w, v=np.array([[2.0**-14], [1.0]], np.float16),
    )  # fmt: skip
    EXACTLY.run(model, context())
    np.testing.assert_array_equal(magnitudes(model, "w", 1), [2.0**10, 2.0**-10])


@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_random_graphs_compute_the_same_bits(seed: int) -> None:
    equalised(random_graph(seed))


@pytest.mark.parametrize("seed", range(0, 40, 5))
def test_random_graphs_compute_the_same(seed: int) -> None:
    equalised(random_graph(seed), ROUNDED)


def test_a_dead_channel_with_a_bias_stays_a_small_constant() -> None:
    """Lifted to the weights of the others, it would be the largest number of its tensor by far."""
    w, v = np.diag([1e-12, 8.0, 1.0]).astype(np.float32), np.array([[1.0], [1.0], [8.0]], np.float32)
    model = graph(
        "(float[N,3] x) => (float[N,1] y)", "h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v)",
        w=w, v=v, b=np.array([0.25, 0.5, 0.25], np.float32),
    )  # fmt: skip
    assert equalised(model).changed
    assert magnitudes(model, "b", 0).max() <= 0.5


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_channels_without_a_number_keep_their_scale(wrong: float) -> None:
    w = np.diag(WIDE) + np.array([wrong, 0, 0, 0], np.float32)
    model = graph("(float[N,4] x) => (float[N,1] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)", w=w, v=(4, 1))
    equalised(model)
    np.testing.assert_array_equal(magnitudes(model, "w", 1)[0], wrong)
