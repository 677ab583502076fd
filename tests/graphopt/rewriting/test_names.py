from __future__ import annotations

from golden import parse

from graphopt.rewriting.names import Names

TEXT = """g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
{ k = Constant <value = float[2] {3.0, 4.0}> () t = Add(x, w) u = Mul(t, k) y = Mul(u, w) }"""


def test_fresh_names_are_free_and_repeatable() -> None:
    model = parse(TEXT)
    first, second = Names(model), Names(model)
    wanted = ["w", "w", "new", "new", "y"]
    assert [first.fresh(n) for n in wanted] == ["w_1", "w_2", "new", "new_1", "y_1"]
    assert [second.fresh(n) for n in wanted] == ["w_1", "w_2", "new", "new_1", "y_1"]
