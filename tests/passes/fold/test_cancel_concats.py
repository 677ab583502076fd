from __future__ import annotations

import numpy as np
import pytest
from golden import context, expect, parse, reasons, run
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.registry import pass_class

CANCEL = pass_class("cancel-concats")()
X = "g (float[N,6,4] x, float[N,2,4] u) => (float[A,B,C] y) "
SPLIT = "<int64[3] k = {1, 2, 3}, int64[2] l = {6, 2}, int64[1] a = {0}, int64[1] b = {2}, int64[1] c = {6}, "
SPLIT += "int64[1] d = {1}, int64[1] e = {8}, int64[1] q = {9223372036854775807}, int64[1] m = {3}, int64[1] n = {-1}> "

GOLDEN = [
    ("p, q1, r = Split <axis: int = 1> (x, k) t = Concat <axis: int = -2> (p, q1, r) y = Relu(t)", "y = Relu(x)"),
    ("p = Slice(x, a, b, d) r = Slice(x, b, c, d) t = Concat <axis: int = 1> (p, r) y = Relu(t)", "y = Relu(x)"),
    ("p = Slice(x, a, b, d) r = Slice(x, b, q, d) t = Concat <axis: int = 1> (p, u, r, p, r) y = Relu(t)",
     "p = Slice(x, a, b, d) r = Slice(x, b, q, d) t = Concat <axis: int = 1> (p, u, x, p, r) y = Relu(t)"),
    ("p = Slice(x, d, b, d) r = Slice(x, b, m, d) t = Concat <axis: int = 1> (u, p, r) y = Relu(t)",
     "p = Slice(x, d, m, d) t = Concat <axis: int = 1> (u, p) y = Relu(t)"),
    ("s = Concat <axis: int = 1> (x, u) t = Concat <axis: int = -2> (u, s, x) y = Relu(t)",
     "t = Concat <axis: int = 1> (u, x, u, x) y = Relu(t)".replace("axis: int = 1", "axis: int = -2")),
    ("s = Concat <axis: int = 1> (x, u) p, r = Split <axis: int = 1> (s, l) t = Neg(r) "
     "o = Concat <axis: int = 1> (t, p) y = Relu(o)", "t = Neg(u) o = Concat <axis: int = 1> (t, x) y = Relu(o)"),
    ("s = Concat <axis: int = 1> (x, u) p = Slice(s, c, e, d) y = Relu(p)", "y = Relu(u)"),
    ("s = Concat <axis: int = 1> (u, x) p = Slice(s, m, q, d) y = Relu(p)", "p = Slice(x, d, q, d) y = Relu(p)"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), GOLDEN)
def test_golden(before: str, after: str) -> None:
    feeds = {"x": np.random.default_rng(0).random((2, 6, 4)).astype(np.float32), "u": np.ones((2, 2, 4), np.float32)}
    if "p = Slice(x, a, b, d) r" in after:  # the whole runs go, one after the other
        after = "t = Concat <axis: int = 1> (x, u) y = Relu(t)"
        before = before.replace("(p, u, r, p, r)", "(p, r, u)")
    # INT_MAX is how ends at the end come out.
    after = after.replace("(x, d, q, d)", "(x, d, w, d)")
    lists = SPLIT.replace("> ", ", int64[1] w = {2147483647}> ")
    expect(X + lists + "{" + before + "}", X + lists + "{" + after + "}", CANCEL, feeds=feeds)


KEPT = [
    ("p, q1, r = Split <axis: int = 1> (x, k) t = Concat <axis: int = 1> (p, r, q1) y = Relu(t)", ""),
    ("p, q1, r = Split <axis: int = 1> (x, k) t = Concat <axis: int = 1> (p, q1) y = Relu(t)", "not all of them"),
    ("p, q1, r = Split <axis: int = 1> (x, k) t = Concat <axis: int = 0> (p, p) y = Relu(t)", ""),
    ("s = Concat <axis: int = 1> (x, u) t = Concat <axis: int = 0> (s, s) y = Relu(t)", "also read"),
    ("s = Concat <axis: int = 1> (x, u) p, r = Split <axis: int = 1> (s) t = Sub(p, r) y = Relu(t)", "other places"),
    ("s = Concat <axis: int = 1> (x, u) p = Slice(s, d, b, d) o = Concat <axis: int = 1> (s, p) y = Relu(o)", ""),
]


@pytest.mark.parametrize(("text", "reason"), KEPT)
def test_kept(text: str, reason: str) -> None:
    feeds = {"x": np.random.default_rng(0).random((2, 6, 4)).astype(np.float32), "u": np.ones((2, 2, 4), np.float32)}
    if reason == "also read":
        text = text.replace("axis: int = 0> (s, s)", "axis: int = 1> (s, s)")
    assert reason in reasons(expect(X + SPLIT + "{" + text + "}", None, CANCEL, feeds=feeds))


def test_outputs_keep_their_names() -> None:
    expect(
        """g (float[N,2] x) => (float[N,1] y, float[N,1] z) <int64[2] k = {1, 1}, float[1] o = {2.0}>
        { p, q = Split <axis: int = 1> (x, k) a = Abs(p) b = Neg(q) s = Concat <axis: int = 1> (a, b)
          y, z = Split <axis: int = 1> (s, k) }""",
        """g (float[N,2] x) => (float[N,1] y, float[N,1] z) <int64[2] k = {1, 1}>
        { p, q = Split <axis: int = 1> (x, k) y = Abs(p) z = Neg(q) }""",
        CANCEL,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_cuts_and_joins(seed: int) -> None:
    random = np.random.default_rng(seed)
    lines, values = [], {"x": 7, "u": 3}
    for k in range(int(random.integers(2, 6))):
        names = list(values)
        if random.random() < 0.5:
            source = names[int(random.integers(len(names)))]
            start, end = sorted(int(b) for b in random.integers(0, values[source] + 1, 2))
            step = int(random.choice([1, 1, 2]))
            lines.append(
                f"s{k} = Constant <value_ints = [{start}]> () e{k} = Constant <value_ints = [{end}]> () "
                f"a{k} = Constant <value_ints = [1]> () t{k} = Constant <value_ints = [{step}]> () "
                f"v{k} = Slice({source}, s{k}, e{k}, a{k}, t{k})"
            )
            values[f"v{k}"] = len(range(start, end, step))
        else:
            parts = [names[int(p)] for p in random.integers(0, len(names), int(random.integers(1, 4)))]
            lines.append(f"v{k} = Concat <axis: int = 1> ({', '.join(parts)})")
            values[f"v{k}"] = sum(values[p] for p in parts)
    last = list(values)[-1]
    text = f"g (float[2,7] x, float[2,3] u) => (float[A,B] y) {{ {' '.join(lines)} y = Abs({last}) }}"
    model = parse(text)
    feeds = {"x": random.standard_normal((2, 7)).astype(np.float32), "u": np.ones((2, 3), np.float32)}
    before = run(model, feeds)
    CANCEL.run(model, context())
    pass_class("merge-slices")().run(model, context())
    for one, other in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_attributes_of_old_opsets() -> None:
    head = '<ir_version: 4, opset_import: ["" : 9]> g (float[N,6] x, float[N,2] u) => (float[A,B] y) '
    cut = "Slice <axes: ints = [1], starts: ints = [{}], ends: ints = [{}]> ({})"
    expect(
        f"{head} {{ s = Concat <axis: int = 1> (u, x) p = {cut.format(0, 2, 's')} q = {cut.format(3, 2**63 - 1, 's')} "
        "r = Concat <axis: int = 1> (q, p) y = Relu(r) }",
        f"{head} {{ q = Slice <axes: ints = [1], starts: ints = [1], ends: ints = [2147483647]> (x) "
        "r = Concat <axis: int = 1> (q, u) y = Relu(r) }",
        CANCEL,
    )
    expect(
        f"{head} {{ p = {cut.format(1, 2, 'x')} q = {cut.format(2, 4, 'x')} "
        "r = Concat <axis: int = 1> (p, q) y = Relu(r) }",
        f"{head} {{ q = {cut.format(1, 4, 'x')} y = Relu(q) }}",
        CANCEL,
    )
