from __future__ import annotations

from golden import parse

from graphopt.rewriting.size import size

TEXT = """g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
{ k = Constant <value = float[2] {3.0, 4.0}> () t = Add(x, w) u = Mul(t, k) y = Mul(u, w) }"""


def test_size_counts_bodies_but_no_constant_nodes() -> None:
    flat = size(parse(TEXT))
    assert flat.nodes == 3
    nested = parse("""g (bool c, float[2] x) => (float[2] y) { y = If (c) <
        then_branch = a () => (float[2] p) { k = Constant <value = float[2] {1.0, 2.0}> () p = Add(x, k) },
        else_branch = d () => (float[2] q) { q = Neg(x) } > }""")
    assert size(nested).nodes == 3
    assert flat.bytes > 16
