from __future__ import annotations

import numpy as np
import pytest
from golden import context, expect, reasons, run
from hypothesis import given, settings
from hypothesis import strategies as st
from text_graph import graph

from graphopt.registry import pass_class

CUT = pass_class("cut-assignments")()
# x[:, 1:3] = u, as TorchScript writes it.
TABLE = """a = Expand(rows, shape) b = Unsqueeze(a, last) c = Expand(columns, shape) d = Unsqueeze(c, last)
  i = Concat <axis: int = -1> (b, d) t = ScatterND{0} (x, i, u) y = Relu(t)"""
HEAD = "g (float[2,4] x, float[2,2] u) => (float[A,B] y) "
LISTS = "<int64[2,1] rows = {0, 1}, int64[2] columns = {%s}, int64[2] shape = {2, 2}, int64[1] last = {-1}> "


def test_a_part_of_an_axis() -> None:
    expect(
        HEAD + LISTS % "1, 2" + "{" + TABLE.format("") + "}",
        HEAD + "<int64[1] o = {0}, int64[1] l = {1}, int64[1] r = {3}, int64[1] e = {2147483647}> "
        "{ p = Slice(x, o, l, l) q = Slice(x, r, e, l) t = Concat <axis: int = 1> (p, u, q) y = Relu(t) }",
        CUT,
    )


def test_the_end_of_an_axis() -> None:
    expect(
        HEAD + LISTS % "2, 3" + "{" + TABLE.format("") + "}",
        HEAD + "<int64[1] o = {0}, int64[1] l = {1}, int64[1] r = {2}> "
        "{ p = Slice(x, o, r, l) t = Concat <axis: int = 1> (p, u) y = Relu(t) }",
        CUT,
    )


@pytest.mark.parametrize(
    ("columns", "reduction", "reason"),
    [
        ("2, 1", "", "not contiguous"),
        ("0, 2", "", "not contiguous"),
        ("1, 2", ' <reduction: string = "add">', "adds up"),
        ("-2, -1", "", "not contiguous"),
    ],
)
def test_kept(columns: str, reduction: str, reason: str) -> None:
    result = expect(HEAD + LISTS % columns + "{" + TABLE.format(reduction) + "}", None, CUT)
    assert reason in reasons(result)


def test_unknown_sizes_and_computed_positions() -> None:
    text = (HEAD + LISTS % "1, 2" + "{" + TABLE.format("") + "}").replace("float[2,4] x", "float[N,4] x")
    assert "not known" in reasons(expect(text, None, CUT))
    text = "g (float[4,2] x, float[1,2] u, int64[1,1] i) => (float[A,B] y) { t = ScatterND(x, i, u) y = Relu(t) }"
    assert "computed" in reasons(expect(text, None, CUT))


def test_a_constant_table_is_cheaper() -> None:
    text = (
        "g (float[4,2] x, float[1,2] u) => (float[A,B] y) <int64[1,1] i = {1}> { t = ScatterND(x, i, u) y = Relu(t) }"
    )
    assert "more operators" in reasons(expect(text, None, CUT))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_parts(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = [int(d) for d in random.integers(1, 5, int(random.integers(1, 4)))]
    cut = [(0, d) if random.random() < 0.6 else tuple(sorted(random.choice(d + 1, 2, replace=False))) for d in shape]
    lines = [np.arange(a, b) for a, b in cut]
    if random.random() < 0.2:
        lines[0] = random.permutation(lines[0])
    table = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).astype(np.int64)
    updates = random.standard_normal(table.shape[:-1]).astype(np.float32)
    x = random.standard_normal(shape).astype(np.float32)
    dims = ",".join(map(str, shape))
    model = graph(
        f"(float[{dims}] x, float[{','.join(map(str, updates.shape))}] u) => (float[{dims}] y)",
        "j = Unsqueeze(i, zero)\n k = Reshape(j, form)\n t = ScatterND(x, k, u)\n y = Abs(t)",
        i=table,
        zero=np.array([0]),
        form=np.array(table.shape),
    )
    before = run(model, {"x": x, "u": updates})[0]
    CUT.run(model, context())
    np.testing.assert_array_equal(run(model, {"x": x, "u": updates})[0], before)
