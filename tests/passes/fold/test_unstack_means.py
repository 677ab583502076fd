from __future__ import annotations

import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

UNSTACK = pass_class("unstack-means")()
STACK = "p = Unsqueeze(x, i) q = Unsqueeze(z, i) s = Concat <axis: int = 0> (p, q)"


def test_golden() -> None:
    expect(
        f"""g (float[N,4] x, float[N,4] z) => (float[N,4] y) <int64[1] i = {{0}}>
        {{ {STACK} y = ReduceMean <axes: ints = [0], keepdims: int = 0> (s) }}""",
        """g (float[N,4] x, float[N,4] z) => (float[N,4] y) <float n = {2.0}> { t = Sum(x, z) y = Div(t, n) }""",
        UNSTACK,
    )
    expect(
        f"""g (float[N,4] x, float[N,4] z) => (float[N,4] y) <int64[1] i = {{0}}>
        {{ {STACK} y = ReduceSum <keepdims: int = 0> (s, i) }}""",
        "g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Sum(x, z) }",
        UNSTACK,
    )


@pytest.mark.parametrize(
    ("reduction", "reason"),
    [
        ("y = ReduceMean <axes: ints = [0]> (s)", "just the axis"),
        ("y = ReduceMean <axes: ints = [1], keepdims: int = 0> (s)", "just the axis"),
        ("y = ReduceMean <axes: ints = [0], keepdims: int = 0> (s) r = Relu(s)", "read by others"),
    ],
)
def test_does_not_fire(reduction: str, reason: str) -> None:
    more = ", float[A,B,C] r" if "Relu" in reduction else ""
    shape = "float[N,4]" if "just" not in reason else ("float[1,N,4]" if "[0]" in reduction else "float[2,4]")
    text = f"""g (float[N,4] x, float[N,4] z) => ({shape} y{more}) <int64[1] i = {{0}}> {{ {STACK} {reduction} }}"""
    assert reason in reasons(expect(text, None, UNSTACK))


def test_averaged_experts_become_one_layer() -> None:
    weights = ", ".join(f"float[2,2] w{i} = {{{i}.0,1.0,2.0,3.5}}, float[2] b{i} = {{{i}.5,1.0}}" for i in range(3))
    experts = " ".join(f"e{i} = Gemm(x, w{i}, b{i}) u{i} = Unsqueeze(e{i}, a)" for i in range(3))
    model = parse(f"""g (float[N,2] x) => (float[N,2] y) <{weights}, int64[1] a = {{0}}>
    {{ {experts} s = Concat <axis: int = 0> (u0, u1, u2) y = ReduceMean <axes: ints = [0], keepdims: int = 0> (s) }}""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert pass_class("fold")().run(model, context()).changed
    assert [n.op_type for n in model.graph] == ["Gemm"]
    assert_close(run(model, feeds), reference)
