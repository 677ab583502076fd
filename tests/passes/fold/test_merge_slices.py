from __future__ import annotations

import itertools

import numpy as np
import pytest
from golden import HEADER, context, expect, parse, reasons, run
from text_graph import graph

from graphopt.registry import pass_class
from graphopt.rewriting.constants import array

MERGE = pass_class("merge-slices")()


def test_two_axes_of_a_shortcut() -> None:
    # Zero-padded shortcuts of residual networks: every second row, then every second column.
    expect(
        """g (float[N,4,8,8] x) => (float[N,4,4,4] y)
        <int64[1] s = {0}, int64[1] e = {9223372036854775807}, int64[1] h = {2}, int64[1] w = {3}, int64[1] k = {2}>
        { a = Slice(x, s, e, h, k) b = Slice(a, s, e, w, k) y = Relu(b) }""",
        """g (float[N,4,8,8] x) => (float[N,4,4,4] y)
        <int64[2] s = {0, 0}, int64[2] e = {2147483647, 2147483647}, int64[2] h = {2, 3}, int64[2] k = {2, 2}>
        { b = Slice(x, s, e, h, k) y = Relu(b) }""",
        MERGE,
    )


def test_one_axis_of_unknown_size() -> None:
    expect(
        """g (float[N,4] x) => (float[M,4] y) <int64[1] a = {1}, int64[1] b = {9}, int64[1] c = {2}, int64[1] d = {5},
        int64[1] z = {0}> { t = Slice(x, a, b, z, c) u = Slice(t, a, d, z) y = Relu(u) }""",
        """g (float[N,4] x) => (float[M,4] y) <int64[1] a = {3}, int64[1] b = {9}, int64[1] c = {2}, int64[1] z = {0}>
        { u = Slice(x, a, b, z, c) y = Relu(u) }""",
        MERGE,
    )


def test_what_is_read_elsewhere_stays() -> None:
    text = """g (float[4,4] x) => (float[2,4] y, float[3,4] q) <int64[1] a = {1}, int64[1] d = {9}, int64[1] z = {0}>
    { t = Slice(x, a, d, z) u = Slice(t, a, d, z) y = Relu(u) q = Relu(t) }"""
    assert "also read elsewhere" in reasons(expect(text, None, MERGE))


def test_bounds_from_the_back_of_an_unknown_size() -> None:
    text = """g (float[N,4] x) => (float[M,4] y) <int64[1] a = {0}, int64[1] d = {-1}, int64[1] z = {0}>
    { t = Slice(x, a, d, z) u = Slice(t, a, d, z) y = Relu(u) }"""
    assert "not from the front" in reasons(expect(text, None, MERGE))


def test_computed_bounds() -> None:
    text = """g (float[4,4] x, int64[1] a) => (float[M,4] y) <int64[1] d = {3}, int64[1] z = {0}>
    { t = Slice(x, a, d, z) u = Slice(t, z, z, z) y = Relu(u) }"""
    assert "computed" in reasons(expect(text, None, MERGE))


def test_attributes_of_old_opsets() -> None:
    old = HEADER.replace("17", "9")
    expect(
        old
        + """g (float[4,6] x) => (float[2,2] y)
        { t = Slice <starts: ints = [1], ends: ints = [3], axes: ints = [0]> (x)
          u = Slice <starts: ints = [-2], ends: ints = [100], axes: ints = [1]> (t) y = Relu(u) }""",
        old
        + """g (float[4,6] x) => (float[2,2] y)
        { u = Slice <starts: ints = [1, 4], ends: ints = [3, 2147483647], axes: ints = [0, 1]> (x) y = Relu(u) }""",
        MERGE,
    )


def test_in_a_body_and_in_a_function() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (bool c, float[6,6] x) => (float[A,B] y, float[C,D] q)
    { y = If (c) <
        then_branch = one () => (float[A,B] p)
        { a = Constant <value_ints = [1]> () d = Constant <value_ints = [5]> () z = Constant <value_ints = [0]> ()
          o = Constant <value_ints = [1]> () t = Slice(x, a, d, z) p = Slice(t, a, d, o) },
        else_branch = two () => (float[A,B] r) { r = Relu(x) }>
      q = local.crop(x) }
    <domain: "local", opset_import: ["" : 17]> crop (v) => (w)
    { a = Constant <value_ints = [1]> () d = Constant <value_ints = [5]> () z = Constant <value_ints = [0]> ()
      t = Slice(v, a, d, z) w = Slice(t, a, d, z) }"""
    model = parse(text)
    x = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    feeds = [{"c": np.array(flag), "x": x} for flag in (True, False)]
    before = [run(model, feed) for feed in feeds]
    assert MERGE.run(model, context()).changed
    assert sum(node.op_type == "Slice" for node in model.graph.all_nodes()) == 1
    assert sum(node.op_type == "Slice" for f in model.functions.values() for node in f) == 1
    for feed, wanted in zip(feeds, before, strict=True):
        for one, other in zip(run(model, feed), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


BOUNDS = [-9, -5, -2, 0, 1, 3, 7, 2**63 - 1]


@pytest.mark.parametrize("length", ["5", "N"])
def test_every_pair_of_cuts(length: str) -> None:
    random = np.random.default_rng(0)
    steps = [1, 2, -1, -2]
    every = list(itertools.product(BOUNDS, BOUNDS, steps))
    x = random.standard_normal(5).astype(np.float32)
    fired = 0
    for _ in range(150):
        first, second = (every[k] for k in random.integers(0, len(every), 2))
        parameters = {name: np.array([k]) for name, k in zip("abcdef", (*first, *second), strict=True)}
        model = graph(
            f"(float[{length}] x) => (float[M] y)",
            "t = Slice(x, a, b, z, c)\n u = Slice(t, d, e, z, f)\n y = Abs(u)",
            z=np.array([0]),
            **parameters,
        )
        before = run(model, {"x": x})[0]
        if MERGE.run(model, context()).changed:
            fired += 1
            assert [node.op_type for node in model.graph] == ["Slice", "Abs"]
            np.testing.assert_array_equal(run(model, {"x": x})[0], before, err_msg=f"{first} {second}")
    assert fired > (60 if length == "5" else 5)
    assert array(model.graph[0].inputs[1]) is not None
