"""Norms over pruned axes are exact: single operators and written out, in residual streams."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.frozen import frozen_axes
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse

CONTRIB = '"com.microsoft" : 1'

NORMS = {
    "LayerNormalization": "h = LayerNormalization(s, g, b)",
    "LayerNormalization without shift": "h = LayerNormalization(s, g)",
    "RMSNormalization": "h = RMSNormalization(s, g)",
    "SimplifiedLayerNormalization": "h = SimplifiedLayerNormalization<epsilon=0.1>(s, g)",
    "layer norm by Pow and Div": """
        m = ReduceMean(s, last)  d = Sub(s, m)  p = Pow(d, two)  v = ReduceMean(p, last)  e = Add(v, eps)
        r = Sqrt(e)  n = Div(d, r)  hg = Mul(n, g)  h = Add(hg, b)""",
    "layer norm by Mul and Reciprocal": """
        m = ReduceMean(s, last)  d = Sub(s, m)  d2 = Sub(s, m)  p = Mul(d, d)  v = ReduceMean(p, last)
        e = Add(eps, v)  r = Sqrt(e)  i = Reciprocal(r)  n = Mul(d2, i)  h = Mul(g, n)""",
    "layer norm by SquaredDifference": """
        m = ReduceMean(s, last)  d = Sub(s, m)  p = Mul(d, d)  v = ReduceMean(p, last)  e = Add(v, eps)  r = Sqrt(e)
        i = Reciprocal(r)  k = Mul(i, g)  sk = Mul(s, k)  mk = Mul(m, k)  bm = Sub(b, mk)  h = Add(sk, bm)""",
    "layer norm with statistics in double precision": """
        w = Cast<to=11>(s)  m = ReduceMean(w, last)  d = Sub(w, m)  p = Pow(d, two)  v = ReduceMean(p, last)
        e = Add(v, eps2)  r = Sqrt(e)  n = Div(d, r)  c = Cast<to=1>(n)  hg = Mul(c, g)  h = Add(hg, b)""",
    "RMS norm with statistics in double precision": """
        w = Cast<to=11>(s)  p = Pow(w, two)  v = ReduceMean(p, last)  e = Add(v, eps2)  r = Sqrt(e)
        n = Div(w, r)  c = Cast<to=1>(n)  h = Mul(g, c)""",
    "RMS norm by a power of -1/2": """
        p = Mul(s, s)  v = ReduceMean(p, last)  e = Add(v, eps)  r = Pow(e, half)  n = Mul(s, r)  h = Mul(g, n)""",
    "RMS norm by Div": """
        p = Pow(s, two)  v = ReduceMean(p, last)  e = Add(v, eps)  r = Sqrt(e)  n = Div(s, r)  h = Mul(n, g)""",
    "RMS norm by Reciprocal": """
        p = Mul(s, s)  v = ReduceMean(p, last)  e = Add(v, eps)  r = Sqrt(e)  i = Reciprocal(r)  n = Mul(s, i)
        h = Mul(g, n)""",
    "RMS norm by a quotient of one": """
        p = Mul(s, s)  v = ReduceMean(p, last)  e = Add(v, eps)  r = Sqrt(e)  i = Div(one, r)  n = Mul(s, i)
        h = Mul(g, n)""",
    "RMS norm without gain": """
        p = Mul(s, s)  v = ReduceMean(p, last)  e = Add(v, eps)  r = Sqrt(e)  h = Div(s, r)""",
    "LpNormalization": "h = LpNormalization(s)",
    "LayerNormalization over two axes": "h = LayerNormalization<axis=1>(s, g2, b2)",
    "RMSNormalization over two axes": "h = RMSNormalization<axis=1>(s, g2)",
    "layer norm over two axes by Pow and Div": """
        m = ReduceMean(s, both)  d = Sub(s, m)  p = Pow(d, two)  v = ReduceMean(p, both)  e = Add(v, eps)
        r = Sqrt(e)  n = Div(d, r)  hg = Mul(n, g2)  h = Add(hg, b2)""",
    "SkipLayerNormalization": """
        h, , , k = com.microsoft.SkipLayerNormalization(s, f1, g, b, c1)  z = Relu(k)  o = MatMul(z, w3)""",
    "SkipSimplifiedLayerNormalization": """
        h, , , k = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.1>(s, f1, g, c1)  z = Relu(k)
        o = MatMul(z, w3)""",
}


def stream(norm: str) -> ir.Model:
    """x -> embedding -> residual block around a norm -> norm -> head, with shifts everywhere."""
    body = f"""
        e0 = MatMul(x, w0)  e1 = Add(e0, c0)
        u = Relu(e1)  f0 = MatMul(u, w1)  f1 = Add(f0, c1)  s = Add(e1, f1)
        {norm}
        y = MatMul(h, w2)"""
    parameters = {
        "w0": (6, 16), "c0": (16,), "w1": (16, 16), "c1": (16,), "w2": (16, 5), "g": (16,), "b": (16,),
        "g2": (3, 16), "b2": (3, 16), "w3": (16, 4), "both": np.array([1, 2]),
        "last": np.array([-1]), "two": np.float32(2), "eps": np.float32(0.1), "one": np.float32(1),
        "half": np.float32(-0.5), "eps2": np.float64(0.1),
    }  # fmt: skip
    read = set(re.findall(r"\w+", body))
    used = {name: value for name, value in parameters.items() if name in read}
    outputs = "float[n,3,5] y, float[n,3,4] o" if "o =" in norm else "float[n,3,5] y"
    opset = 22 if "microsoft" in norm else 23  # fused operators come from files before RMSNormalization
    return graph(f"(float[n,3,6] x) => ({outputs})", body, opset=opset, imports=CONTRIB, **used)


def exact(coupling: Coupling) -> set[int]:
    return {unit.id for unit in coupling.units if unit.exact}


@pytest.mark.parametrize("name", NORMS)
def test_a_residual_stream_through_a_norm_is_exact(name: str) -> None:
    model = stream(NORMS[name])
    coupling = analyse(model)
    assert len([u for u in exact(coupling) if u <= 16]) == 16
    certificate = certify(model, coupling, choose(coupling, 0.5, 1))
    assert certificate.holds, certificate
    assert certificate.effect > 1e-2
    assert certificate.control is not None
    assert certificate.control > 1e-2


EXPORTED = """r = Reshape({0}, {1})  i = InstanceNormalization(r, o{2}, z{2})  q = Reshape(i, {3})  k = Mul(q, gc)
    n = Add(k, bc)"""
GROUPS = {  # units, and the norm
    "one group": (16, "n = GroupNormalization<num_groups=1>(s, g, b)"),
    "four groups": (16, "n = GroupNormalization<num_groups=4>(s, g, b)"),
    "one group as exported": (16, EXPORTED.format("s", "one", 1, "sizes")),
    "two groups as exported": (16, EXPORTED.format("s", "two", 2, "sizes")),
    "four groups, a free size": (16, f"sh = Shape(t)  {EXPORTED.format('t', 'four', 4, 'sh')}"),
}


def grouped(units: int, norm: str) -> ir.Model:
    free = "(t, four)" in norm
    body = f"{'t' if free else 's'} = Conv(x, w, c)  {norm}  a = Relu(n)  y = Conv(a, v)"
    constants = {name: np.full(int(name[1]), value, np.float32) for name, value in
                 [("o1", 1), ("o2", 1), ("o4", 1), ("z1", 0), ("z2", 0), ("z4", 0)]}  # fmt: skip
    parameters = {
        "w": (16, 3, 3, 3), "c": (16,), "v": (5, 16, 1, 1), "g": (16,), "b": (16,), "gc": (16, 1, 1), "bc": (16, 1, 1),
        **{name: np.array([0, groups, -1]) for name, groups in [("one", 1), ("two", 2), ("four", 4)]},
        "sizes": np.array([2, 16, 6, 6]), **constants,
    }  # fmt: skip
    read = set(re.findall(r"\w+", body))
    used = {name: value for name, value in parameters.items() if name in read}
    rows, result = ("float[n,3,h,8] x", "float[n,5,k,6] y") if free else ("float[2,3,8,8] x", "float[2,5,6,6] y")
    return graph(f"({rows}) => ({result})", body, opset=21, **used)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_lose_channels_or_go_whole(name: str) -> None:
    model = grouped(*GROUPS[name])
    coupling = analyse(model)
    assert len(exact(coupling)) == len(coupling.units) == GROUPS[name][0]
    certificate = certify(model, coupling, choose(coupling, 0.5, 3))
    assert certificate.holds, certificate
    assert certificate.effect > 1e-2


def test_scales_of_groups_are_reported_to_go_with_the_last_channel() -> None:
    model = grouped(*GROUPS["two groups as exported"])
    coupling = analyse(model)
    told = {frozen.tensor: frozen.reason for frozen in frozen_axes(coupling)}
    for name in ("o2", "z2"):
        assert told[name] == "InstanceNormalization 'i': an entry goes with the last channel of its group"
    whole = {unit.id for unit in coupling.units for m in unit.members if m.parameter == "w" and max(m.indices) < 8}
    remove_units(model, coupling, whole)
    norm = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    assert [list(value.shape) for value in norm.inputs[1:]] == [[1], [1]]


@pytest.mark.parametrize("name", [*NORMS, *GROUPS])
def test_what_was_pruned_can_be_pruned_again(name: str) -> None:
    model = stream(NORMS[name]) if name in NORMS else grouped(*GROUPS[name])
    coupling = analyse(model)
    remove_units(model, coupling, choose(coupling, 0.4, 1))
    again = analyse(model)
    assert {frozenset(m.parameter for m in u.members) for u in again.units if u.exact}
    certificate = certify(model, again, choose(again, 0.4, 2))
    assert certificate.holds, certificate
    assert certificate.effect > 1e-3


@pytest.mark.parametrize("name", ["four groups", "four groups, a free size"])
def test_what_lost_a_group_and_more_can_be_pruned_again(name: str) -> None:
    model = grouped(*GROUPS[name])
    coupling = analyse(model)
    gone = {0, 1, 2, 3, 6}
    remove_units(model, coupling, {u.id for u in coupling.units for m in u.members if m.role == "producer"
                                   and m.parameter == "w" and gone.issuperset(m.indices)})  # fmt: skip
    again = analyse(model)
    certificate = certify(model, again, choose(again, 0.4, 2))
    assert certificate.units
    assert certificate.holds, certificate
    assert certificate.effect > 1e-2


def test_a_group_norm_behind_a_norm_of_instances() -> None:
    """The Reshape into groups stands behind one InstanceNormalization and before another."""
    model = graph(
        "(float[2,3,8,8] x) => (float[2,5,6,6] y)",
        f"t = Conv(x, w, c)  s = InstanceNormalization(t, a, d)  {EXPORTED.format('s', 'two', 2, 'sizes')}"
        "  y = Conv(n, v)",
        opset=21, w=(16, 3, 3, 3), c=(16,), a=(16,), d=(16,), v=(5, 16, 1, 1), gc=(16, 1, 1), bc=(16, 1, 1),
        two=np.array([0, 2, 48, -1]), sizes=np.array([2, 16, 6, 6]),
        o2=np.ones(2, np.float32), z2=np.zeros(2, np.float32),
    )  # fmt: skip
    coupling = analyse(model)
    first = {u.id for u in coupling.units for m in u.members if m.parameter == "w" and max(m.indices) < 8}
    assert len(first) == 8
    for dead in (first, choose(coupling, 0.5, 1)):
        certificate = certify(model, coupling, dead)
        assert certificate.holds, certificate
        assert certificate.effect > 1e-2


def test_a_written_group_norm_behind_one_that_loses_whole_groups() -> None:
    """What stands behind a norm is still as wide as it was when its own turn comes."""
    model = graph(
        "(float[2,3,8,8] x) => (float[2,5,6,6] y)",
        f"t = Conv(x, w, c)  s = GroupNormalization<num_groups=4>(t, a, d)  sh = Shape(s)"
        f"  {EXPORTED.format('s', 'two', 2, 'sh')}  y = Conv(n, v)",
        opset=18, w=(16, 3, 3, 3), c=(16,), a=(4,), d=(4,), v=(5, 16, 1, 1), gc=(16, 1, 1), bc=(16, 1, 1),
        two=np.array([0, 2, 48, 6]), o2=np.ones(2, np.float32), z2=np.zeros(2, np.float32),
    )  # fmt: skip
    coupling = analyse(model)
    assert len(coupling.units) == 4
    for dead in ({1}, {1, 3}, {1, 2}, {1, 2, 4}):
        certificate = certify(model, coupling, dead)
        assert certificate.holds, certificate
        assert certificate.effect > 1e-2


@pytest.mark.parametrize("written", [False, True])
def test_groups_that_do_not_fit_each_other_leave_every_channel_free(written: bool) -> None:
    """As in a U-Net with skips: 6 channels in groups of 3, then behind 10 others in groups of 8."""
    norms = {"s": (2, 6), "k": (2, 16)}
    body = ["s = Conv(x, w, c)", "{s}", "a = Relu(ns)", "t = Conv(a, w2, c2)", "k = Concat<axis=1>(t, s)", "{k}"]
    single = "n{0} = GroupNormalization<num_groups={1}>({0}, g{0}, b{0})"
    several = """r{0} = Reshape({0}, to)  i{0} = InstanceNormalization(r{0}, ones, noughts)
        q{0} = Reshape(i{0}, from{0})
        m{0} = Mul(q{0}, gain{0})  n{0} = Add(m{0}, shift{0})"""
    steps = {name: (several if written else single).format(name, groups) for name, (groups, _) in norms.items()}
    text = "  ".join(body).format(**steps) + "  z = Relu(nk)  y = Conv(z, v)"
    parameters = {
        "w": (6, 3, 3, 3), "c": (6,), "w2": (10, 6, 1, 1), "c2": (10,), "v": (5, 16, 1, 1), "to": np.array([0, 2, -1]),
        "ones": np.ones(2, np.float32), "noughts": np.zeros(2, np.float32),
        **{f"{p}{name}": (count,) for name, (_, count) in norms.items() for p in "gb"},
        **{f"{p}{name}": (count, 1, 1) for name, (_, count) in norms.items() for p in ("gain", "shift")},
        **{f"from{name}": np.array([0, count, 6, 6]) for name, (_, count) in norms.items()},
    }  # fmt: skip
    read = set(re.findall(r"\w+", text))
    used = {name: value for name, value in parameters.items() if name in read}
    model = graph("(float[n,3,8,8] x) => (float[n,5,6,6] y)", text, opset=21, **used)
    coupling = analyse(model)
    assert len(exact(coupling)) == len(coupling.units) == 6 + 10
    for dead in ({1, 2, 3}, {1, 2, 4, 7, 8}, choose(coupling, 0.5, 1)):  # a whole group, uneven ones
        certificate = certify(model, coupling, dead)
        assert certificate.holds, certificate
        assert certificate.effect > 1e-2


def test_a_norm_over_channels_first_and_one_for_each_head() -> None:
    """Convolution, written-out layer norm over axis 1, then heads whose places are normalised one by one."""
    model = graph(
        "(float[n,3,4,4] x) => (float[n,16,16] y)",
        """s = Conv(x, w, c)  m = ReduceMean<axes=[1]>(s)  d = Sub(s, m)  p = Mul(d, d)  v = ReduceMean<axes=[1]>(p)
        e = Add(v, eps)  r = Sqrt(e)  q = Div(d, r)  k = Mul(q, g)  h = Add(k, b)
        u = Conv(h, wq)  t = Reshape(u, heads)  f = Transpose<perm=[0,1,3,2]>(t)
        one = LayerNormalization(f, gh, bh)  two = Transpose<perm=[0,1,3,2]>(t)  o = MatMul(one, t)
        y = ReduceMean<axes=[1],keepdims=0>(o)""",
        opset=17, w=(12, 3, 1, 1), c=(12,), g=(12, 1, 1), b=(12, 1, 1), wq=(10, 12, 1, 1), gh=(5,), bh=(5,),
        eps=np.float32(0.1), heads=np.array([0, 2, 5, 16]),
    )  # fmt: skip
    coupling = analyse(model)
    stream = [u for u in coupling.units if any(m.parameter == "w" for m in u.members)]
    heads = [u for u in coupling.units if any(m.parameter == "gh" for m in u.members)]
    assert len(stream) == 12
    assert len(heads) == 5
    assert all(unit.exact for unit in [*stream, *heads])
    certificate = certify(model, coupling, choose(coupling, 0.4, 2))
    assert certificate.holds, certificate
    assert certificate.effect > 1e-2


def test_a_written_out_rms_norm_stays_what_runtimes_fuse() -> None:
    """No operator is added: epsilon and gamma take the factor of the mean."""
    model = stream(NORMS["RMS norm by Div"])
    coupling = analyse(model)
    pruned = model.clone()
    remove_units(pruned, coupling, choose(coupling, 0.5, 1))
    assert [n.op_type for n in pruned.graph] == [n.op_type for n in model.graph]
