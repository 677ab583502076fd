from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

COMPUTE = pass_class("compute-weights")()


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).standard_normal(shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in values)}}}"


WEIGHT_NORM = "n = ReduceL2 <axes: ints = [1,2]> (v) d = Div(v, n) w = Mul(g, d)"
SPECTRAL = """s = Reshape(v, flat) a = MatMul(s, right) c = MatMul(left, a) w = Div(v, c)"""
STANDARD = """m = ReduceMean <axes: ints = [1,2]> (v) d = Sub(v, m) q = Mul(d, d)
    r = ReduceMean <axes: ints = [1,2]> (q) e = Add(r, eps) f = Sqrt(e) w = Div(d, f)"""


def model(formula: str, more: str = "") -> str:
    return f"""g (float[N,2,7] x) => (float[N,3,5] y) <{tensor("v", 3, 2, 3)}, {tensor("g", 3, 1, 1)},
    {tensor("left", 3)}, {tensor("right", 6)}, int64[2] flat = {{3, -1}}, float eps = {{0.001}}>
    {{ {formula} {more} y = Conv(x, w) }}"""


def test_golden() -> None:
    expect(
        """g (float[N,2] x) => (float[N,2] y) <float[2,2] v = {3.0,4.0,6.0,8.0}, float[2,1] g = {10.0,1.0}>
        { n = ReduceL2 <axes: ints = [1]> (v) d = Div(v, n) w = Mul(g, d) y = Gemm <transB: int = 1> (x, w) }""",
        """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {6.0,8.0,0.6,0.8}>
        { y = Gemm <transB: int = 1> (x, w) }""",
        COMPUTE,
    )


@pytest.mark.parametrize("formula", [WEIGHT_NORM, SPECTRAL, STANDARD])
@pytest.mark.parametrize("member", ["compute-weights", "fold"])
def test_formulas(formula: str, member: str) -> None:
    found = parse(model(formula))
    feeds = random_feeds(found)
    reference = run(found, feeds)
    assert pass_class(member)().run(found, context()).changed
    assert [n.op_type for n in found.graph] == ["Conv"]
    assert_close(run(found, feeds), reference)


def test_a_source_that_others_read_is_not_stored_twice() -> None:
    text = f"""g (float[N,8] x) => (float[N,8] y, float[N,8] z) <{tensor("v", 8, 8)}, {tensor("g", 8, 1)}>
    {{ w = Mul(v, g) y = MatMul(x, w) z = MatMul(x, v) }}"""
    assert "bytes more" in reasons(expect(text, None, COMPUTE))


def test_a_weight_with_two_readers_is_computed_once() -> None:
    found = parse(f"""g (float[N,4] x) => (float[N,4] y, float[N,4] z) <{tensor("v", 4, 4)}, {tensor("g", 4, 1)}>
    {{ w = Mul(v, g) y = MatMul(x, w) r = Relu(x) z = MatMul(r, w) }}""")
    feeds = random_feeds(found)
    reference = run(found, feeds)
    assert COMPUTE.run(found, context()).changed
    assert len(found.graph.initializers) == 1
    assert_close(run(found, feeds), reference)


def test_not_where_it_is_not_finite() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) <float[2,2] v = {0.0,0.0,6.0,8.0}>
    { n = ReduceL2 <axes: ints = [1]> (v) w = Div(v, n) y = MatMul(x, w) }"""
    assert "not be finite" in reasons(expect(text, None, COMPUTE, runnable=False))


def test_above_the_limit_of_constant_folding() -> None:
    size = 64
    found = parse(f"""g (float[N,{size}] x) => (float[N,{size}] y) <{tensor("v", size, size)}, {tensor("g", size, 1)}>
    {{ n = ReduceL2 <axes: ints = [1]> (v) d = Div(v, n) w = Mul(g, d) y = MatMul(x, w) }}""")
    assert pass_class("fold")(max_bytes=1000).run(found, context()).changed
    assert [n.op_type for n in found.graph] == ["MatMul"]


def test_in_a_function() -> None:
    found = parse("""<ir_version: 10, opset_import: ["" : 17, "l": 1]>
    g (float[N,2] x) => (float[N,2] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 17]> f (a) => (b) { v = Constant <value = float[2,2] {1.0,2.0,3.0,4.0}> ()
      s = Constant <value = float {0.5}> () w = Mul(v, s) b = MatMul(a, w) }""")
    feeds = random_feeds(found)
    reference = run(found, feeds)
    assert COMPUTE.run(found, context()).changed
    (function,) = found.functions.values()
    assert [n.op_type for n in function] == ["Constant", "MatMul"]
    assert_close(run(found, feeds), reference)
