from __future__ import annotations

import numpy as np
import pytest
from golden import context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

SIMPLIFY = pass_class("simplify-bodies")()
X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
IF = """g (bool c, float[2,3] x) => (float[A,B] y) {{ t = If (c) <
  then_branch = one () => (float[A,B] p) {{ k = Constant <value = float {{2.0}}> () a = Mul(x, k) p = Relu(a) }},
  else_branch = two () => (float[A,B] q) {{ l = Constant <value = float {{{0}}}> () b = Mul(x, l) q = Relu(b) }}>
  y = Neg(t) }}"""
LOOP = """g (float[2,3] x, int64 n) => (float[A,B] y) {{ k = Constant <value = int64 {{{count}}}> ()
  c = Constant <value = bool {{{start}}}> ()
  v, s = Loop ({limit}, c, x, x) <body = step (int64 i, bool g, float[2,3] a, float[2,3] b) =>
    (bool h, float[A,B] d, float[A,B] e) {{ h = {going} d = Add(a, b) e = {carried} }}>
  y = {end} }}"""


def loop(count: int = 3, start: int = 1, limit: str = "k", going: str = "Identity(g)", carried: str = "Mul(b, b)",
         end: str = "Sub(v, s)") -> str:  # fmt: skip
    return LOOP.format(count=count, start=start, limit=limit, going=going, carried=carried, end=end)


def test_equal_branches() -> None:
    expect(
        IF.format("2.0"),
        "g (bool c, float[2,3] x) => (float[A,B] y) <float k = {2.0}> { a = Mul(x, k) p = Relu(a) y = Neg(p) }",
        SIMPLIFY,
        feeds={"c": np.array(True), "x": X},
    )


def test_branches_that_differ_in_a_constant() -> None:
    expect(IF.format("3.0"), None, SIMPLIFY, feeds={"c": np.array(False), "x": X})


def test_random_branches_stay() -> None:
    text = (
        IF.format("2.0")
        .replace("p = Relu(a)", "p = RandomNormalLike(a)")
        .replace("q = Relu(b)", "q = RandomNormalLike(b)")
    )
    assert "random" in reasons(expect(text, None, SIMPLIFY, runnable=False))


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        (loop(count=0), ["Sub"]),
        (loop(start=0), ["Sub"]),
        (loop(count=1), ["Identity", "Add", "Mul", "Sub"]),
        (loop(going="Constant <value = bool {0}> ()"), ["Add", "Mul", "Sub"]),
        (loop(count=2), ["Loop", "Sub"]),
        # What is carried unchanged is read from outside.
        (loop(carried="Identity(b)").replace("e = Identity(b) ", "").replace("float[A,B] e)", "float[A,B] b)"),
         ["Loop", "Sub"]),
        (loop(end="Neg(v)"), ["Loop", "Neg"]),
        (loop(limit="n"), ["Loop", "Sub"]),
        (loop(limit="n", going="Constant <value = bool {0}> ()"), ["Loop", "Sub"]),
    ],
)  # fmt: skip
def test_loops(text: str, nodes: list[str]) -> None:
    model = parse(text)
    feeds = [{"x": X, "n": np.array(k)} for k in (0, 1, 4)]
    before = [run(model, feed) for feed in feeds]
    SIMPLIFY.run(model, context())
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == nodes
    for feed, wanted in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(run(model, feed)[0], wanted[0])


def test_what_a_loop_carries_unchanged_goes() -> None:
    text = loop(carried="Identity(b)").replace("e = Identity(b) ", "").replace("float[A,B] e)", "float[A,B] b)")
    model = parse(text)
    assert SIMPLIFY.run(model, context()).changed
    node = next(n for n in model.graph if n.op_type == "Loop")
    assert (len(node.inputs), len(node.outputs)) == (3, 1)


def test_scans_that_nobody_reads() -> None:
    text = """g (float[2,3] x) => (float[A,B] y) { k = Constant <value = int64 {3}> ()
      c = Constant <value = bool {1}> () v, s, t = Loop (k, c, x) <body = step (int64 i, bool g, float[2,3] a) =>
        (bool h, float[A,B] d, float[A,B] e, float[A,B] f) { h = Identity(g) d = Add(a, x) e = Exp(a) f = Neg(a) }>
      u = ReduceSum(t) y = Add(v, u) }"""
    model = parse(text)
    before = run(model, {"x": X})[0]
    assert SIMPLIFY.run(model, context()).changed
    node = next(n for n in model.graph if n.op_type == "Loop")
    assert [o.name for o in node.outputs] == ["v", "t"]
    np.testing.assert_array_equal(run(model, {"x": X})[0], before)


def test_an_output_of_if_that_nobody_reads() -> None:
    text = """g (bool c, float[2,3] x) => (float[A,B] y) { s, t = If (c) <
      then_branch = one () => (float[A,B] p, float[A,B] q) { p = Relu(x) q = Exp(x) },
      else_branch = two () => (float[A,B] r, float[A,B] s2) { r = Neg(x) s2 = Abs(x) }> y = Neg(t) }"""
    model = parse(text)
    feeds = [{"c": np.array(flag), "x": X} for flag in (True, False)]
    before = [run(model, feed)[0] for feed in feeds]
    assert SIMPLIFY.run(model, context()).changed
    node = next(n for n in model.graph if n.op_type == "If")
    assert [o.name for o in node.outputs] == ["t"]
    for feed, wanted in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(run(model, feed)[0], wanted)


def test_a_loop_that_scans_out_says_why() -> None:
    text = """g (float[2,3] x) => (float[A,B,C] y) { k = Constant <value = int64 {1}> ()
      c = Constant <value = bool {1}> () v, y = Loop (k, c, x) <body = step (int64 i, bool g, float[2,3] a) =>
        (bool h, float[A,B] d, float[A,B] e) { h = Identity(g) d = Exp(a) e = Neg(a) }> }"""
    assert "scans values out" in reasons(SIMPLIFY.run(parse(text), context()))


def test_names_that_are_taken_outside() -> None:
    text = IF.format("2.0").replace("b = Mul(x, l) q = Relu(b)", "b = Mul(x, l) q = Relu(b)")
    text = text.replace("y = Neg(t) }", "a = Abs(t) y = Neg(a) }").replace(
        "a = Mul(x, k) p = Relu(a)", "m = Mul(x, k) p = Relu(m)"
    )
    model = parse(text)
    feeds = random_feeds(model)
    before = run(model, feeds)[0]
    assert SIMPLIFY.run(model, context()).changed
    np.testing.assert_array_equal(run(model, feeds)[0], before)


SIZE = "sizes = Shape(x) n = Gather<axis = 0>(sizes, one) c = Equal(n, one)"
SQUEEZED = f"""g (float[2,N,3] x) => (float[A,B] y) <int64[1] one = {{{{1}}}}, int64[1] axis = {{{{1}}}}> {{{{ {SIZE}
  t = If (c) <then_branch = yes () => (float[2,3] p) {{{{ p = Squeeze(x, axis) }}}},
              else_branch = no () => (float[2,N,3] q) {{{{ q = Identity(x) }}}}>
  {{behind}} }}}}"""
"""What a squeeze of an axis of unknown size becomes."""
TAKEN = f"""g (float[2,N,3] x) => (float[A,B] y) <int64[1] one = {{{{1}}}}, int64[1] axis = {{{{1}}}}> {{{{ {SIZE}
  t = Squeeze(x, axis) {{behind}} }}}}"""
RANKS = """r = Shape(t) s = Size(r) three = Constant <value = int64 {3}> () d = Equal(s, three)
  u = If (d) <then_branch = lift () => (float[K,L,M,O] a) { a = Unsqueeze(t, axis) },
              else_branch = keep () => (float[K,L] b) { b = Identity(t) }>
  v = Unsqueeze(u, axis) z = Concat<axis = 1>(v, x) y = ReduceSum<keepdims = 0>(z, one)"""
"""The rank that is supposed of t decides the second condition, and what is made then does not go with x."""


@pytest.mark.parametrize("behind", ["row = ReduceSum<keepdims = 0>(x, axis) y = Concat<axis = 0>(t, row)", RANKS])
def test_the_branch_that_what_follows_can_read(behind: str) -> None:
    result = expect(
        SQUEEZED.format(behind=behind),
        TAKEN.format(behind=behind),
        SIMPLIFY,
        feeds={"x": np.ones((2, 1, 3), np.float32)},
    )
    assert any("was always true" in note for note in result.notes)


@pytest.mark.parametrize(
    "behind",
    [
        "y = Relu(t)",
        "y = Softmax<axis = 1>(t)",
        "y = Identity(x) row = ReduceSum<keepdims = 0>(x, axis) dead = Concat<axis = 0>(t, row)",
    ],
)
def test_either_branch_may_be_taken(behind: str) -> None:
    text = SQUEEZED.format(behind=behind).replace("float[A,B] y", "float[A,B,C] y")
    expect(text, None, SIMPLIFY, feeds={"x": np.ones((2, 4, 3), np.float32)}, runnable="dead" not in behind)


def test_a_branch_for_other_sizes_of_the_inputs() -> None:
    result = expect(
        """g (bool c, float[2,3] x, float[4,5] w) => (float[A,B] y) { y = If (c) <
             then_branch = wide () => (float[A,B] p) { s = MatMul(x, w) p = Relu(s) },
             else_branch = narrow () => (float[A,B] q) { q = Neg(x) }> }""",
        "g (bool c, float[2,3] x, float[4,5] w) => (float[A,B] y) { y = Neg(x) }",
        SIMPLIFY,
        runnable=False,  # ONNX Runtime loads no such branch
    )
    assert any("was always false" in note for note in result.notes)
