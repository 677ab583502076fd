"""Small graphs in which a unit is easily called exact, or removed, wrongly: one case for each way to go wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from text_graph import graph

from graphopt.analysis.certificate import certify, spare_axes, zero_units
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import analyse
from graphopt.base import Context
from graphopt.model import check
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.target import Target
from graphopt.verify import compare, random_feeds


@dataclass(frozen=True)
class Case:
    """A graph and how many of its units are exact."""

    exact: int
    signature: str
    body: str
    parameters: dict[str, Any] = field(default_factory=dict)
    opset: int = 17


def case(exact: int, signature: str, body: str, opset: int = 17, **parameters: Any) -> Case:
    return Case(exact, signature, body, parameters, opset)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


IMAGE, VECTOR = "(float[n,3,8,8] x) => (float[n,2,8,8] y)", "(float[n,6] x) => (float[n,2] y)"
TOKENS = "(float[n,5,8] x) => (float[n,5,8] y)"
CASES = {
    "Gemm whose second operand is computed reads its constants": case(
        0,
        "(float[3,4] x) => (float[2,5] y)",
        "h = MatMul(x, w1)  s = Sigmoid(h)  t = Transpose<perm=[1,0]>(s)  g = Gemm(a, t)  y = MatMul(g, w2)",
        w1=(4, 6),
        a=(2, 6),
        w2=(3, 5),
    ),
    "Gemm with a computed bias keeps it": case(
        6,
        VECTOR,
        "h = MatMul(x, w1)  s = Sigmoid(h)  c = MatMul(x, w3)  y = Gemm<alpha=0.5, beta=2.0>(s, w2, c)",
        w1=(6, 6),
        w2=(6, 2),
        w3=(6, 2),
    ),
    "Gemm with beta 0 has no use for a bias": case(
        6,
        VECTOR,
        "h = MatMul(x, w1)  s = Sigmoid(h)  y = Gemm<beta=0.0, alpha=0.5>(s, w2, c)",
        w1=(6, 6),
        w2=(6, 2),
        c=(2,),
    ),
    "Conv with a computed bias keeps it": case(
        6,
        IMAGE,
        """h = Conv(x, w1)  s = Sigmoid(h)  m = ReduceMean<axes=[0,2,3], keepdims=0>(x)  b = MatMul(m, wb)
           y = Conv(s, w2, b)""",
        w1=(6, 3, 1, 1),
        w2=(2, 6, 1, 1),
        wb=(3, 2),
    ),
    "a constant matrix times a vector": case(
        5, "(float[6] x) => (float[2] y)", "h = MatMul(w1, x)  r = Relu(h)  y = MatMul(w2, r)", w1=(5, 6), w2=(2, 5)
    ),
    "a norm over the inputs of a weight sees what their removal takes": case(
        0,
        IMAGE,
        """s = ReduceL2<axes=[1,2,3]>(v)  q = Div(v, s)  w = Mul(q, g)  h = Conv<pads=[1,1,1,1]>(x, w0)  r = Relu(h)
           z = Conv<pads=[1,1,1,1]>(r, w, b)  a = Relu(z)  y = Conv(a, w2)""",
        w0=(4, 3, 3, 3),
        v=(5, 4, 3, 3),
        g=(5, 1, 1, 1),
        b=(5,),
        w2=(2, 5, 1, 1),
    ),
    "a product of constants has no producer": case(
        0, "(float[3,2] x) => (float[3,2] y)", "c = MatMul(k, w)  y = Add(x, c)", k=(3, 4), w=(4, 2)
    ),
    "a parameter that is added in one place and multiplied in another is zero in both": case(
        6,
        "(float[n,5,4] x) => (float[n,5,2] y)",
        "h = MatMul(x, w1)  a = Add(h, p)  s = Sigmoid(a)  z = Mul(s, p)  y = MatMul(z, w2)",
        w1=(4, 6),
        p=np.tile(floats(1, 6), (5, 1)),
        w2=(6, 2),
    ),
    "1 / 0 is no constant": case(
        0, VECTOR, "h = MatMul(x, w1)  s = Reciprocal(h)  y = MatMul(s, w2)", w1=(6, 6), w2=(6, 2)
    ),
    "normalisation by position (opset 8) has whole planes": case(
        4,
        "(float[n,3] x) => (float[n,2] y)",
        """h = MatMul(x, w1)  r = Reshape(h, to)  z = BatchNormalization<spatial=0>(r, s, b, m, v)  f = Flatten(z)
           y = MatMul(f, w2)""",
        8,
        w1=(3, 8),
        to=ints(-1, 4, 2),
        s=(4, 2),
        b=(4, 2),
        m=(4, 2),
        v=np.abs(floats(4, 2)),
        w2=(8, 2),
    ),
    "normalisation with more outputs is in training": case(
        0,
        IMAGE,
        "h = Conv(x, w1)  z, n1, n2, n3, n4 = BatchNormalization(h, s, b, m, v)  y = Conv(z, w2)",
        9,
        w1=(4, 3, 1, 1),
        s=(4,),
        b=(4,),
        m=(4,),
        v=np.abs(floats(4)),
        w2=(2, 4, 1, 1),
    ),
    "a size that the graph tells": case(
        0,
        "(float[n,3,8,8] x) => (float[n,2,8,8] y, int64[4] s)",
        "h = Conv(x, w1)  s = Shape(h)  y = Conv(h, w2)",
        w1=(4, 3, 1, 1),
        w2=(2, 4, 1, 1),
    ),
    "Slice of a parameter": case(
        8,
        TOKENS,
        """a = Slice(w, i0, i8, i0)  b = Slice(w, i8, i16, i0)  ta = Transpose(a)  tb = Transpose(b)
           q = MatMul(x, ta)  v = MatMul(x, tb)  m = Mul(q, v)  y = MatMul(m, wo)""",
        w=(16, 8),
        i0=ints(0),
        i8=ints(8),
        i16=ints(16),
        wo=(8, 8),
    ),
    "Slice of a parameter with steps": case(
        16,
        TOKENS,
        "a = Slice(w, i0, i16, i0, i2)  t = Transpose(a)  q = MatMul(x, t)  y = MatMul(q, wo)",
        w=(16, 8),
        i0=ints(0),
        i2=ints(2),
        i16=ints(16),
        wo=(8, 8),
    ),
    "Split of a parameter": case(
        16,
        TOKENS,
        """a, b = Split<axis=0>(w)  ta = Transpose(a)  tb = Transpose(b)  q = MatMul(x, ta)  v = MatMul(x, tb)
           m = Concat<axis=2>(q, v)  y = MatMul(m, wo)""",
        11,
        w=(16, 8),
        wo=(16, 8),
    ),
    "Gather of a parameter": case(
        16,
        TOKENS,
        "a = Gather<axis=0>(w, i)  t = Transpose(a)  q = MatMul(x, t)  y = MatMul(q, wo)",
        w=(16, 8),
        wo=(5, 8),
        i=ints(3, 1, 4, -1, 5),
    ),
    "Slice of two axes that both become uneven": case(
        16,
        "(float[4,6] x) => (float[5,2] y)",
        "h = MatMul(w0, x)  g = MatMul(h, w1)  s = Slice(g, a, b, c, d)  p = MatMul(w3, s)  y = MatMul(p, w2)",
        w0=(7, 4),
        w1=(6, 9),
        a=ints(1, 0),
        b=ints(7, 9),
        c=ints(0, 1),
        d=ints(1, 2),
        w3=(5, 6),
        w2=(5, 2),
    ),
    "Pad that cuts": case(
        9,
        IMAGE,
        "h = Conv(x, w1)  s = Pad(h, p)  y = Conv(s, w2)",
        w1=(9, 3, 1, 1),
        w2=(2, 4, 1, 1),
        p=ints(0, -2, 0, 0, 0, -3, 0, 0),
    ),
    "Expand to a computed shape of fewer axes": case(
        6,
        "(float[n,3] x) => (float[n,2] y)",
        "h = MatMul(x, w1)  s = Shape(h)  k = Gather(s, one)  e = Expand(h, k)  y = MatMul(e, w2)",
        w1=(3, 6),
        one=ints(1),
        w2=(6, 2),
    ),
    "a weight that passes Identity and Cast": case(
        5,
        VECTOR,
        "w = Identity(w0)  b = Cast<to=1>(b0)  h = MatMul(x, w)  a = Add(h, b)  r = Relu(a)  y = MatMul(r, w2)",
        w0=(6, 5),
        b0=floats(5).astype(np.float64),
        w2=(5, 2),
    ),
    "a depthwise convolution reads what dies with it": case(
        6,
        IMAGE,
        "h = Conv(x, w1)  s = Sigmoid(h)  d = Conv<group=6, pads=[1,1,1,1]>(s, k)  r = Relu(d)  y = Conv(r, w2)",
        w1=(6, 3, 1, 1),
        k=(6, 1, 3, 3),
        w2=(2, 6, 1, 1),
    ),
    "a dead group of a transposed convolution passes on a constant that it reads": case(
        3,  # places that are written; no group, and no place that is read
        IMAGE,
        "h = Conv(x, w1)  s = Sigmoid(h)  t = ConvTranspose<group=2>(s, k)  y = Conv(t, w2)",
        w1=(6, 3, 1, 1),
        k=(6, 3, 1, 1),
        w2=(2, 6, 1, 1),
    ),
    "a dead group of a transposed convolution that reads zeros": case(
        2 + 3 + 3,  # groups, places in them that are read, places that are written
        IMAGE,
        "h = Conv(x, w1)  r = Relu(h)  t = ConvTranspose<group=2>(r, k)  y = Conv(t, w2)",
        w1=(6, 3, 1, 1),
        k=(6, 3, 1, 1),
        w2=(2, 6, 1, 1),
    ),
    "a head of zero values is zero whatever attends to it": case(
        4 + 2 + 2,  # heads, places that queries and keys meet in, places of the values
        TOKENS,
        """q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
           q4 = Reshape(q, s)  k4 = Reshape(k, s)  v4 = Reshape(v, s)
           qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
           e = MatMul(qt, kt)  p = Softmax<axis=-1>(e)  o = MatMul(p, vt)  ot = Transpose<perm=[0,2,1,3]>(o)
           f = Reshape(ot, flat)  y = MatMul(f, wo)""",
        wq=(8, 8),
        wk=(8, 8),
        wv=(8, 8),
        wo=(8, 8),
        s=ints(0, 0, 4, 2),
        flat=ints(0, 0, 8),
    ),
    "one channel, counted from the back, stays; others go": case(
        5,
        "(float[n,6] x) => (float[n,2] y)",
        "h = MatMul(x, w1)  k = Gather<axis=1>(h, i)  u = Unsqueeze(k, one)  m = Mul(h, u)  y = MatMul(m, w2)",
        w1=(6, 6),
        i=np.array(-5),
        one=ints(1),
        w2=(6, 2),
    ),
    "heads of queries that share keys and values by Gather": case(
        2 + 2 + 2,  # heads of keys and values, places of queries and keys, of values; queries alone are not exact
        TOKENS,
        """q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
           q4 = Reshape(q, sq)  k4 = Reshape(k, sk)  v4 = Reshape(v, sk)
           qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
           kc = Gather<axis=1>(kt, i)  vc = Gather<axis=1>(vt, i)
           e = MatMul(qt, kc)  p = Softmax<axis=-1>(e)  o = MatMul(p, vc)  ot = Transpose<perm=[0,2,1,3]>(o)
           f = Reshape(ot, flat)  y = MatMul(f, wo)""",
        wq=(8, 8),
        wk=(8, 4),
        wv=(8, 4),
        wo=(8, 8),
        sq=ints(0, 0, 4, 2),
        sk=ints(0, 0, 2, 2),
        i=ints(0, 0, 1, 1),
        flat=ints(0, 0, -1),
    ),
    "heads of queries that share keys and values by Expand": case(
        2 + 2 + 2,
        TOKENS,
        """q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
           q4 = Reshape(q, sq)  k5 = Reshape(k, sk)  v5 = Reshape(v, sk)
           qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,4,1]>(k5)
           vt = Transpose<perm=[0,2,3,1,4]>(v5)
           ke = Expand(kt, ek)  ve = Expand(vt, ev)  kc = Reshape(ke, ck)  vc = Reshape(ve, cv)
           e = MatMul(qt, kc)  p = Softmax<axis=-1>(e)  o = MatMul(p, vc)  ot = Transpose<perm=[0,2,1,3]>(o)
           f = Reshape(ot, flat)  y = MatMul(f, wo)""",
        wq=(8, 8),
        wk=(8, 4),
        wv=(8, 4),
        wo=(8, 8),
        sq=ints(0, 0, 4, 2),
        sk=ints(0, 0, 2, 1, 2),
        ek=ints(1, 2, 2, 2, 5),
        ev=ints(1, 2, 2, 5, 2),
        ck=ints(0, 4, 2, 5),
        cv=ints(0, 4, 5, 2),
        flat=ints(0, 0, -1),
    ),
    "a running sum over another axis keeps zeros": case(
        5,
        "(float[n,4,3] x) => (float[n,4,2] y)",
        "h = MatMul(x, w1)  c = CumSum(h, one)  y = MatMul(c, w2)",
        w1=(3, 5),
        one=np.array(1),
        w2=(5, 2),
    ),
    "constants that a computed weight reads are taken as zero": case(
        0,
        IMAGE,
        "h = Conv(x, w1)  s = Sigmoid(h)  w = Mul(w2, two)  y = Conv(s, w)",
        w1=(6, 3, 1, 1),
        w2=(2, 6, 1, 1),
        two=np.float32(2),
    ),
    "channels that become positions of one channel": case(
        0,
        "(float[n,3,2,2] x) => (float[n,2] y)",
        "h = Conv(x, w1)  d = DepthToSpace<blocksize=2>(h)  r = Relu(d)  f = Flatten(r)  y = MatMul(f, w2)",
        w1=(4, 3, 1, 1),
        w2=(16, 2),
    ),
    "groups of channels over an image of unknown size": case(
        8,
        "(float[n,3,h,w] x) => (float[n,2,h,w] y)",
        """c = Conv(x, w1)  r = Reshape(c, to)  i = InstanceNormalization(r, one, zero)  s = Shape(c)  b = Reshape(i, s)
           m = Mul(b, g)  a = Add(m, e)  y = Conv(a, w2)""",
        w1=(8, 3, 1, 1),
        to=ints(0, 4, -1),
        one=np.ones(4, np.float32),
        zero=np.zeros(4, np.float32),
        g=(8, 1, 1),
        e=(8, 1, 1),
        w2=(2, 8, 1, 1),
    ),
    "a mean of integers is rounded": case(
        0,
        "(int32[n,6] x) => (int32[n] y)",
        "h = MatMul(x, w)  y = ReduceMean<axes=[1], keepdims=0>(h)",
        w=np.arange(-10, 20, dtype=np.int32).reshape(6, 5),
    ),
    "Resize with sizes of some axes": case(
        5,
        "(float[n,3,8,8] x) => (float[n,2,16,16] y)",
        """h = Conv(x, w1)  r = Relu(h)  m = Resize<mode="linear", axes=[1,2,3]>(r, "", "", to)  y = Conv(m, w2)""",
        18,
        w1=(5, 3, 1, 1),
        w2=(2, 5, 1, 1),
        to=ints(5, 16, 16),
    ),
    "Resize by hardly more than 1": case(
        0,
        "(float[1,3,8,8] x) => (float[1,2,16,16] y)",
        """h = Conv(x, w1)  m = Resize<mode="nearest">(h, "", by)  y = Conv(m, w2)""",
        13,
        w1=(5, 3, 1, 1),
        w2=(2, 5, 1, 1),
        by=np.array([1, 1.1, 2, 2], np.float32),
    ),
    "groups of channels with a scale by channel": case(
        8,
        IMAGE,
        """h = Conv(x, w1)  i = GroupNormalization<num_groups=4>(h, g, e)  r = Sigmoid(i)  y = Conv(r, w2)""",
        21,
        w1=(8, 3, 1, 1),
        g=(8,),
        e=(8,),
        w2=(2, 8, 1, 1),
    ),
    "groups of channels with a scale by group": case(
        4,
        IMAGE,
        """h = Conv(x, w1)  i = GroupNormalization<num_groups=4>(h, g, e)  r = Relu(i)
           y = Conv<pads=[1,1,1,1]>(r, w2)""",
        18,
        w1=(8, 3, 1, 1),
        g=(4,),
        e=(4,),
        w2=(2, 8, 3, 3),
    ),
    "quantised values that are read as integers": case(
        5,
        VECTOR,
        """h = MatMul(x, w1)  q = QuantizeLinear(h, s, z)  i = Cast<to=1>(q)  y = MatMul(i, w2)""",
        w1=(6, 5),
        s=np.float32(0.1),
        z=np.uint8(128),
        w2=(5, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_exact_units_are_exact_and_all_units_can_go(name: str, seed: int) -> None:
    given = CASES[name]
    model = graph(given.signature, given.body, opset=given.opset, **given.parameters)
    coupling = analyse(model)
    exact = {unit.id for unit in coupling.units if unit.exact}
    assert len(exact) == given.exact
    random = np.random.default_rng(seed)
    chosen = {unit.id for unit in coupling.units if random.random() < (0.3, 0.6, 0.15, 0.5)[seed]}
    dead = spare_axes(coupling, chosen & exact)
    if dead:
        assert certify(model, coupling, dead, seed=seed).holds
    pruned = model.clone()
    remove_units(pruned, coupling, spare_axes(coupling, chosen))
    check(pruned)
    compare(pruned, pruned, random_feeds(pruned, seed))  # it runs
    zeroed = model.clone()
    zero_units(zeroed, coupling, dead)
    shrunk = zeroed.clone()
    if Shrink().run(shrunk, Context(Target("cpu", "ort"), None, None, 0, 1, Silent())).changed:
        assert compare(zeroed, shrunk, random_feeds(zeroed, seed)).worst_relative < 1e-4


def test_a_parameter_that_is_an_output_stays_what_it_is() -> None:
    model = graph(VECTOR, "h = MatMul(x, w1)  a = Add(h, b)  y = MatMul(a, w2)", w1=(6, 5), b=(5,), w2=(5, 2))
    model.graph.outputs.append(model.graph.initializers["b"])
    coupling = analyse(model)
    assert len(coupling.units) == 5
    assert certify(model, coupling, {2, 3}).holds


def test_copies_of_a_shared_vector_replace_it() -> None:
    model = graph(
        "(float[n,3,4,4] x) => (float[n,2,4,4] y)",
        "a = Conv(x, w1, b)  c = Conv(x, w2, b)  d = Conv(a, w3)  e = Conv(c, w4)  y = Add(d, e)",
        w1=(4, 3, 1, 1),
        w2=(4, 3, 1, 1),
        b=(4,),
        w3=(2, 4, 1, 1),
        w4=(2, 4, 1, 1),
    )
    coupling = analyse(model)
    remove_units(model, coupling, {1, 6, 7})
    left = model.graph.initializers.values()
    assert all(value.uses() for value in left)
    assert sorted(value.const_value.size for value in left if len(value.const_value.shape) == 1) == [2, 3]


def test_what_is_inserted_has_a_type_and_a_shape() -> None:
    """Removals follow each other, and each analyses the model that the last one left."""
    model = graph(
        IMAGE,
        "h = Conv(x, w1)  s = Slice(h, a, b, c, d)  g = Sigmoid(s)  y0 = Conv(g, w2, b2)  y = MatMul(y0, w3)",
        w1=(9, 3, 1, 1),
        w2=(2, 5, 1, 1),
        b2=(2,),
        w3=(8, 8),
        a=ints(0),
        b=ints(9),
        c=ints(1),
        d=ints(2),
    )
    remove_units(model, analyse(model), {2, 5})
    assert all(v.shape is not None and v.dtype is not None for node in model.graph for v in node.outputs)
