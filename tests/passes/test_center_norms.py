"""center-norms: layer norms become RMS norms where whatever writes their input can be centred, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, reasons, run
from golden import random_feeds as golden_feeds
from random_graphs import random_graph
from text_graph import graph

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import analyse
from graphopt.base import PassResult
from graphopt.passes.center_norms import CenterNorms
from graphopt.registry import pass_class
from graphopt.rewriting.centring import restore_layer_norms
from graphopt.rewriting.names import Names
from graphopt.verify import compare, random_feeds

CENTER = CenterNorms()
CONTRIB = '"com.microsoft" : 1'
# w and c have means (3, 0) and 2 along the channels
WRITER = "float[2,2] w = {2.0, 4.0, 1.0, -1.0}, float[2] c = {1.0, 3.0}"
CENTRED = "float[2,2] w = {-1.0, 1.0, 1.0, -1.0}, float[2] c = {-1.0, 1.0}"
NORM = "float[2] g = {2.0, 3.0}, float[2] b = {0.5, 0.0}, float[2,1] h = {1.0, 5.0}"


def test_layer_normalization_becomes_what_runtimes_fuse() -> None:
    result = expect(
        f"""a (float[N,2] x) => (float[N,1] y) <{WRITER}, {NORM}>
        {{ t = MatMul(x, w)  s = Add(t, c)  n = LayerNormalization<epsilon=0.25>(s, g, b)  y = MatMul(n, h) }}""",
        f"""a (float[N,2] x) => (float[N,1] y) <{CENTRED}, {NORM}, float two = {{2.0}}, float e = {{0.25}}>
        {{ t = MatMul(x, w)  s = Add(t, c)
           p = Pow(s, two)  m = ReduceMean<axes=[-1], keepdims=1>(p)  v = Add(m, e)  r = Sqrt(v)
           q = Div(s, r)  k = Mul(q, g)  n = Add(k, b)  y = MatMul(n, h) }}""",
        CENTER,
    )
    assert result.notes == ["1 layer norms are RMS norms now; what writes their input is centred"]


def test_opset_23_has_an_operator_for_it() -> None:
    head = '<ir_version: 10, opset_import: ["" : 23]>\n'
    expect(
        f"""{head}a (float[N,2] x) => (float[N,1] y) <{WRITER}, {NORM}>
        {{ s = Gemm(x, w, c)  n = LayerNormalization<epsilon=0.25>(s, g, b)  y = MatMul(n, h) }}""",
        f"""{head}a (float[N,2] x) => (float[N,1] y) <{CENTRED}, {NORM}>
        {{ s = Gemm(x, w, c)  k = RMSNormalization<axis=-1, epsilon=0.25, stash_type=1>(s, g)  n = Add(k, b)
           y = MatMul(n, h) }}""",
        CENTER,
    )


def test_a_written_out_norm_loses_its_subtraction() -> None:
    rest = """p = Pow(d, two)  m = ReduceMean<axes=[1], keepdims=1>(p)  v = Add(m, e)  r = Sqrt(v)
              q = Div(d, r)  n = Mul(q, g)  y = MatMul(n, h)"""
    scalars = "float two = {2.0}, float e = {0.25}"
    expect(
        f"""a (float[N,2] x) => (float[N,1] y) <{WRITER}, {NORM}, {scalars}>
        {{ s = Gemm(x, w, c)  u = ReduceMean<axes=[-1], keepdims=1>(s)  d = Sub(s, u)  {rest} }}""",
        f"""a (float[N,2] x) => (float[N,1] y) <{CENTRED}, {NORM}, {scalars}>
        {{ d = Gemm(x, w, c)  {rest} }}""",
        CENTER,
    )


def test_the_residual_sum_of_the_fused_operator_is_centred_too() -> None:
    head = f'<ir_version: 8, opset_import: ["" : 17, {CONTRIB}]>\n'
    wider = "float[2,4] w = {1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 4.0, 0.0}, float[4] z = {1.0, 1.0, 1.0, 5.0}"
    after = "float[2,4] w = {-2.0, -1.0, 0.0, 3.0, -1.0, -1.0, 3.0, -1.0}, float[4] z = {-1.0, -1.0, -1.0, 3.0}"
    norm = "float[4] g = {1.0, 2.0, 3.0, 4.0}, float[4] b = {1.0, 0.0, 0.0, 0.0}"
    expect(
        f"""{head}a (float[1,N,2] x) => (float[1,N,4] y, float[1,N,4] k) <{wider}, {norm}>
        {{ s = MatMul(x, w)  i = Mul(x, x)  t = MatMul(i, w)
           n, , , u = com.microsoft.SkipLayerNormalization<epsilon=0.5>(s, t, g, b, z)
           y = Relu(n)  k = com.microsoft.SkipLayerNormalization<epsilon=0.5>(u, s, g, b) }}""",
        f"""{head}a (float[1,N,2] x) => (float[1,N,4] y, float[1,N,4] k) <{after}, {norm}>
        {{ s = MatMul(x, w)  i = Mul(x, x)  t = MatMul(i, w)
           m, , , u = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.5>(s, t, g, z)  n = Add(m, b)
           y = Relu(n)  l = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.5>(u, s, g)  k = Add(l, b) }}""",
        CENTER,
    )


# -- whole streams -----------------------------------------------------------------------------------------------------

BLOCK = """
    n1 = LayerNormalization(s0, g1, b1)  a0 = MatMul(n1, wa)  a1 = Relu(a0)  a2 = MatMul(a1, wo)  a3 = Add(a2, bo)
    s1 = Add(s0, a3)
    n2 = LayerNormalization(s1, g2, b2)  f0 = MatMul(n2, w1)  f1 = Tanh(f0)  f2 = MatMul(f1, w2)  s2 = Add(s1, f2)
    n3 = LayerNormalization(s2, g3, b3)"""
WEIGHTS = {
    "g1": (12,), "b1": (12,), "g2": (12,), "b2": (12,), "g3": (12,), "b3": (12,),
    "wa": (12, 8), "wo": (8, 12), "bo": (12,), "w1": (12, 20), "w2": (20, 12),
}  # fmt: skip


def vit() -> ir.Model:
    """Patches, class token, position embedding, two residual branches, the class token's head."""
    return graph(
        "(float[n,3,8,8] x) => (float[n,5] y)",
        f"""p0 = Conv<strides=[4,4]>(x, wp, bp)  p1 = Reshape(p0, flat)  p2 = Transpose<perm=[0,2,1]>(p1)
        sh = Shape(x)  n = Gather(sh, zero)  ts = Concat<axis=0>(n, rest)  t = Expand(cls, ts)
        c = Concat<axis=1>(t, p2)  s0 = Add(c, pos)  {BLOCK}
        h = Gather<axis=1>(n3, first)  y = MatMul(h, head)""",
        **WEIGHTS,
        wp=(12, 3, 4, 4), bp=(12,), cls=(1, 1, 12), pos=(1, 5, 12), head=(12, 5),
        flat=np.array([0, 12, -1]), zero=np.array([0]), rest=np.array([1, 12]), first=np.array(0),
    )  # fmt: skip


def gpt() -> ir.Model:
    """A table of tokens that is the head as well, and a table of positions."""
    return graph(
        "(int64[n,t] x) => (float[n,t,30] y)",
        f"""e = Gather(table, x)  sh = Shape(x)  l = Gather(sh, one)  ps = Slice(positions, zero, l, zero)
        s0 = Add(e, ps)  {BLOCK}  tt = Transpose<perm=[1,0]>(table)  y = MatMul(n3, tt)""",
        **WEIGHTS,
        table=(30, 12), positions=(9, 12), zero=np.array([0]), one=np.array([1]),
    )  # fmt: skip


def channels_first() -> ir.Model:
    """Convolutions, a norm over axis 1 with the scale of the branch before its sum, and a transpose around a norm."""
    return graph(
        "(float[n,3,8,8] x) => (float[n,4,8,8] y)",
        """s0 = Conv(x, w0, b0)
        m = ReduceMean<axes=[1]>(s0)  d = Sub(s0, m)  p = Pow(d, two)  v = ReduceMean<axes=[1]>(p)  e = Add(v, eps)
        r = Sqrt(e)  q = Div(d, r)  k = Mul(q, g)  n = Add(k, b)
        f0 = Conv<pads=[1,1,1,1]>(n, w1, b1)  f1 = Relu(f0)  f2 = Conv(f1, w2, b2)  f3 = Mul(f2, gamma)
        s1 = Add(s0, f3)  t = Transpose<perm=[0,2,3,1]>(s1)  n1 = LayerNormalization(t, g1, b3)
        t1 = Transpose<perm=[0,3,1,2]>(n1)  y = Conv(t1, w3)""",
        w0=(12, 3, 1, 1), b0=(12,), g=(12, 1, 1), b=(12, 1, 1), w1=(16, 12, 3, 3), b1=(16,), w2=(12, 16, 1, 1),
        b2=(12,), gamma=(12, 1, 1), g1=(12,), b3=(12,), w3=(4, 12, 1, 1), two=np.float32(2), eps=np.float32(0.1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [vit, gpt, channels_first])
def test_a_stream_is_centred_and_its_units_are_exact(make) -> None:
    model = make()
    centred = model.clone()
    result = CenterNorms(copies=1).run(centred, context())
    assert not result.skipped
    assert not any(node.op_type in {"LayerNormalization", "Sub"} for node in centred.graph)
    assert compare(model, centred, random_feeds(model, 0)).worst_relative < 1e-5
    coupling = analyse(centred)
    stream = {u.id for u in coupling.units if any(m.parameter == "w2" and m.axis in {0, 1} for m in u.members)}
    assert all(unit.exact for unit in coupling.units if unit.id in stream)
    certificate = certify(centred, coupling, choose(coupling, 0.5, 1))
    assert certificate.holds, certificate
    assert certificate.effect > 1e-2
    assert certificate.control is not None
    assert certificate.control > 1e-2


def test_a_shared_table_is_copied_or_stays() -> None:
    model = gpt()
    result = CenterNorms(copies=0.5).run(model, context())
    assert "table is read by others too: the stream has a centred copy of its own (+1440 bytes)" in result.notes
    assert not np.allclose(model.graph.initializers["table"].const_value.numpy().mean(axis=1), 0)
    kept = CenterNorms(copies=0).run(gpt(), context())
    assert not kept.changed
    assert reasons(kept) == "table: others read it too, and a copy would add more than copies=0 of the model"


def test_half_precision_is_normalised_in_single_precision() -> None:
    """Squares of 300 do not fit float16."""

    def half(*shape: int) -> np.ndarray:
        return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float16)

    model = graph(
        "(float16[n,6] x) => (float16[n,4] y)",
        "s = MatMul(x, w)  n = LayerNormalization(s, g, b)  y = MatMul(n, h)",
        w=300 * half(6, 8), g=half(8), b=half(8, 1)[:, 0], h=half(8, 4),
    )  # fmt: skip
    feeds = golden_feeds(model)
    before = run(model, feeds)
    CENTER.run(model, context())
    assert [n.op_type for n in model.graph if n.op_type == "Cast"] == ["Cast", "Cast"]
    assert_close(run(model, feeds), before, tolerance=5e-3)


def blocked(signature: str, body: str, **parameters) -> PassResult:
    model = graph(signature, body, **parameters)
    result = CENTER.run(model, context())
    assert any(node.op_type == "LayerNormalization" for node in model.graph)
    return result


OBSTACLES = {
    "Relu gives what a norm reads": "t = MatMul(x, w)  s = Relu(t)  n = LayerNormalization(s, g)  y = MatMul(n, h)",
    "x: it is an input of the graph": "n = LayerNormalization(x, g6)  y = MatMul(n, h6)",
    "it reads 's', mean and all": """s = MatMul(x, w)  n = LayerNormalization(s, g)  k = MatMul(s, h)  m = MatMul(n, h)
        y = Add(k, m)""",
    "(post-norm)": "s = MatMul(x, w)  n = LayerNormalization(s, g)  u = Add(n, s)  y = MatMul(u, h)",
    "scales channel by channel with computed numbers": """t = MatMul(x, w)  u = Exp(t)  v = MatMul(x, w)  s = Mul(u, v)
        n = LayerNormalization(s, g)  y = MatMul(n, h)""",
    "joins channels of several tensors": """a = MatMul(x, w)  b = MatMul(x, w)  s = Concat<axis=1>(a, b)
        n = LayerNormalization(s, g16)  y = MatMul(n, h16)""",
    "its mean and deviation are read": """s = MatMul(x, w)  n, m = LayerNormalization(s, g)  k = MatMul(n, h)
        y = Add(k, m)""",
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_keeps_a_stream_from_being_centred(reason: str) -> None:
    sizes = {"w": (6, 8), "g": (8,), "g6": (6,), "g16": (16,), "h": (8, 4), "h6": (6, 4), "h16": (16, 4)}
    used = {name: size for name, size in sizes.items() if f", {name})" in OBSTACLES[reason]}
    result = blocked("(float[n,6] x) => (float[n,4] y)", OBSTACLES[reason], **used)
    assert not result.changed
    assert reason in reasons(result)


def test_a_stream_that_the_graph_gives_out_stays() -> None:
    result = blocked(
        "(float[n,6] x) => (float[n,4] y, float[n,8] s)",
        "s = MatMul(x, w)  n = LayerNormalization(s, g)  y = MatMul(n, h)",
        w=(6, 8), g=(8,), h=(8, 4),
    )  # fmt: skip
    assert "is an output of the graph, mean and all" in reasons(result)


def test_only_the_stream_with_the_obstacle_stays() -> None:
    result = blocked(
        "(float[n,6] x) => (float[n,4] y)",
        """s = MatMul(x, w)  n = LayerNormalization(s, g)  r = Relu(n)  k = LayerNormalization(r, g)
        y = MatMul(k, h)""",
        w=(6, 8), g=(8,), h=(8, 4),
    )  # fmt: skip
    assert result.changed
    assert "Relu gives what a norm reads" in reasons(result)


def test_grouped_convolutions_cannot_be_centred() -> None:
    result = blocked(
        "(float[n,6,4,4] x) => (float[n,4,4,6] y)",
        """d = Conv<group=6>(x, w)  t = Transpose<perm=[0,2,3,1]>(d)  y = LayerNormalization(t, g)""",
        w=(6, 1, 1, 1), g=(6,),
    )  # fmt: skip
    assert "it is a grouped convolution" in reasons(result)


def test_random_graphs_compute_what_they_did() -> None:
    fired = 0
    for seed in range(200):
        model = random_graph(seed)
        centred = model.clone()
        if not CENTER.run(centred, context()).changed:
            continue
        fired += 1
        assert compare(model, centred, random_feeds(model, seed)).worst_relative < 1e-4, seed
        restore_layer_norms(centred.graph, Names(centred))
        assert compare(model, centred, random_feeds(model, seed)).worst_relative < 1e-4, seed
    assert fired >= 3


# -- back, and prune ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_norms_that_lost_nothing_are_written_back(opset: int) -> None:
    model = graph(
        "(float[n,6] x) => (float[n,8] y)",
        "[first] s = MatMul(x, w)  [norm] n = LayerNormalization<epsilon=0.5>(s, g, b)  [last] y = MatMul(n, h)",
        opset=opset, w=(6, 8), g=(8,), b=(8,), h=(8, 8),
    )  # fmt: skip
    centred = model.clone()
    CENTER.run(centred, context())
    assert restore_layer_norms(centred.graph, Names(centred)) == 0
    assert [n.op_type for n in centred.graph] == ["MatMul", "LayerNormalization", "MatMul"]
    assert [n.name for n in centred.graph] == ["first", "norm", "last"]
    assert [v.name for n in centred.graph for v in n.outputs] == ["s", "n", "y"]
    assert compare(model, centred, random_feeds(model, 0)).worst_relative < 1e-5


def test_prune_keeps_rms_norms_where_channels_of_their_stream_went() -> None:
    model = vit()
    result = pass_class("prune")(params=0.4, score="l2", multiple=1).run(model, context())
    assert "3 layer norms whose channels were cut are RMS norms now (see center-norms)" in result.notes
    assert not any(node.op_type in {"LayerNormalization", "Pad"} for node in model.graph)
    run(model, golden_feeds(model))


def test_prune_keeps_layer_norms_where_the_stream_stays() -> None:
    """Whoever excludes the head keeps the stream that it reads."""
    model = vit()
    result = pass_class("prune")(params=0.6, score="l2", multiple=1, exclude=("head",)).run(model, context())
    assert sum(node.op_type == "LayerNormalization" for node in model.graph) == 3
    assert not any("RMS norms" in note for note in result.notes)
    run(model, golden_feeds(model))
