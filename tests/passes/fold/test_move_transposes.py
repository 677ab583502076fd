from __future__ import annotations

import numpy as np
import pytest
from golden import context, expect, parse, random_feeds, reasons, run
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.registry import pass_class

MOVE = pass_class("move-transposes")()
TO, BACK = "Transpose <perm: ints = [0,2,3,1]>", "Transpose <perm: ints = [0,3,1,2]>"
EQUATION = '"abcd,abcd->abcd"'
HEAD = "g (float[N,2,3,4] x, float[N,2,3,4] z) => (float[A,B,C,D] y) "

GOLDEN = [
    (f"a = {TO} (x) b = Sigmoid(a) c = {BACK} (b) y = Relu(c)", "", "b = Sigmoid(x) y = Relu(b)", ""),
    (f"a = {TO} (x) b = Mul(a, k) c = {BACK} (b) y = Relu(c)", "float[2] k = {2.0, 3.0}",
     "b = Mul(x, k) y = Relu(b)", "float[1,2,1,1] k = {2.0, 3.0}"),
    (f"a = {TO} (x) b = {TO} (z) c = Add(a, b) y = Softplus(c)", "", f"c = Add(x, z) d = {TO} (c) y = Softplus(d)", ""),
    (f"a = {TO} (x) b = {TO} (z) c = Concat <axis: int = -1> (a, b) d = {BACK} (c) y = Relu(d)", "",
     "c = Concat <axis: int = 1> (x, z) y = Relu(c)", ""),
    (f"a = {TO} (x) b = Softmax (a) c = {BACK} (b) y = Relu(c)", "", "b = Softmax <axis: int = 1> (x) y = Relu(b)", ""),
    (f"a = {TO} (x) b = ReduceMean <axes: ints = [1, 2]> (a) c = Sub(a, b) d = {BACK} (c) y = Relu(d)", "",
     "b = ReduceMean <axes: ints = [2, 3]> (x) c = Sub(x, b) y = Relu(c)", ""),
    (f"a = {TO} (x) b = Pad(a, k) d = {BACK} (b) y = Relu(d)", "int64[8] k = {0, 1, 2, 3, 0, 0, 1, 0}",
     "b = Pad(x, k) y = Relu(b)", "int64[8] k = {0, 3, 1, 2, 0, 0, 0, 1}"),
    (f"a = {TO} (x) b, e = Split <axis: int = 3> (a) f = Mul(b, e) d = {BACK} (f) y = Relu(d)", "",
     "b, e = Split <axis: int = 1> (x) f = Mul(b, e) y = Relu(f)", ""),
    (f"a = {TO} (x) b = Slice(a, k, l, m) d = {BACK} (b) y = Relu(d)",
     "int64[1] k = {1}, int64[1] l = {2}, int64[1] m = {-1}",
     "b = Slice(x, k, l, k) y = Relu(b)", "int64[1] k = {1}, int64[1] l = {2}"),
    # One of two readers wants the plain tensor: one Transpose for two.
    (f"a = {TO} (x) b = Relu(a) c = {BACK} (b) d = {BACK} (a) e = Sub(c, d) y = Abs(e)", "",
     "b = Relu(x) e = Sub(b, x) y = Abs(e)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("before", "given", "after", "wanted"), GOLDEN)
def test_golden(before: str, given: str, after: str, wanted: str) -> None:
    expect(
        HEAD + (f"<{given}>" if given else "") + "{" + before + "}",
        HEAD + (f"<{wanted}>" if wanted else "") + "{" + after + "}",
        MOVE,
    )


@pytest.mark.parametrize(
    "body",
    [
        f"a = {TO} (x) b = Sigmoid(a) y = {TO} (b)",
        f"a = {TO} (x) b = CumSum(a, k) c = {BACK} (b) y = Relu(c)",
        f"a = {TO} (x) b = ReduceMean <axes: ints = [1], keepdims: int = 0> (a) c = Unsqueeze(b, u) y = {BACK} (c)",
    ],
)
def test_nothing_to_gain(body: str) -> None:
    expect(HEAD + "<int64 k = {1}, int64[1] u = {1}> {" + body + "}", None, MOVE)


def test_a_shared_constant_is_not_stored_twice() -> None:
    body = f"a = {TO} (x) b = Mul(a, k) c = {BACK} (b) d = Relu(z) e = {TO} (d) f = Mul(e, k) h = Softmax(f) "
    text = (
        HEAD
        + "<float[2] k = {2.0, 3.0}> {"
        + body
        + f"i = {BACK} (h) y = Einsum <equation: string = {EQUATION}> (c, i) }}"
    )
    expect(text, None, MOVE)


def test_fewer_but_larger_is_left() -> None:
    text = "g (float[N,2,3,1] x, float[N,2,1,4] z) => (float[A,B,C,D] y) {"
    result = expect(text + f"a = {TO} (x) b = {TO} (z) s = Sub(a, b) y = Abs(s) }}", None, MOVE)
    assert "more elements" in reasons(result)


def test_graph_outputs_keep_names_and_shapes() -> None:
    head = "g (float[N,2,3,4] x) => (float[A,B,C,D] b, float[E,F,G,H] y) {"
    expect(
        head + f"a = {TO} (x) b = Relu(a) c = {BACK} (b) y = Neg(c) }}",
        head + f"a = Relu(x) b = {TO} (a) y = Neg(a) }}",
        MOVE,
    )


def test_in_bodies() -> None:
    text = f"""g (bool c, float[2,2,2,2] x) => (float[A,B,C,D] y)
    {{ y = If (c) <then_branch = one () => (float[A,B,C,D] p) {{ a = {TO} (x) b = Relu(a) d = {BACK} (b) p = Neg(d) }},
       else_branch = two () => (float[A,B,C,D] r) {{ r = Relu(x) }}> }}"""
    after = text.replace(f"a = {TO} (x) b = Relu(a) d = {BACK} (b) p = Neg(d)", "b = Relu(x) p = Neg(b)")
    expect(text, after, MOVE, feeds={"c": np.array(True), "x": random_feeds(parse(text))["x"]})


def test_another_transpose_of_the_same_tensor_is_merged() -> None:
    expect(
        "g (float[2,3,4] x) => (float[A,B,C] y, float[D,E,F] z) { a = Transpose <perm: ints = [0,2,1]> (x) b = Neg(a) "
        "c = Transpose <perm: ints = [2,0,1]> (a) d = Transpose <perm: ints = [0,2,1]> (b) y = Abs(c) z = Exp(d) }",
        "g (float[2,3,4] x) => (float[A,B,C] y, float[D,E,F] z) { b = Neg(x) "
        "c = Transpose <perm: ints = [1,0,2]> (x) y = Abs(c) z = Exp(b) }",
        MOVE,
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_layouts(seed: int) -> None:
    random = np.random.default_rng(seed)
    perms = [[0, 2, 1], [0, 2, 1], [1, 2, 0], [2, 0, 1]] if random.random() < 0.5 else [[1, 2, 0], [2, 0, 1]]
    lines, shapes = [], {"x": (2, 3, 4), "z": (2, 3, 4)}
    for k in range(int(random.integers(3, 14))):
        source = list(shapes)[int(random.integers(max(0, len(shapes) - 4), len(shapes)))]
        shape = shapes[source]
        kind = random.choice(["transpose", "unary", "binary", "constant", "reduce", "softmax", "concat", "flat"],
                             p=[0.4, 0.15, 0.15, 0.1, 0.05, 0.05, 0.05, 0.05])  # fmt: skip
        partners = [v for v, s in shapes.items() if s == shape]
        if kind == "transpose":
            perm = perms[int(random.integers(len(perms)))]
            lines.append(f"v{k} = Transpose <perm: ints = {perm}> ({source})")
            shape = tuple(shape[p] for p in perm)
        elif kind == "unary":
            lines.append(f"v{k} = {random.choice(['Tanh', 'Neg', 'Abs'])}({source})")
        elif kind in ("binary", "concat"):
            other = partners[int(random.integers(len(partners)))]
            axis = int(random.integers(-3, 3))
            if kind == "concat" and sum(shape) < 30:
                lines.append(f"v{k} = Concat <axis: int = {axis}> ({source}, {other})")
                shape = tuple(2 * d if a == axis % 3 else d for a, d in enumerate(shape))
            else:
                lines.append(f"v{k} = Sub({source}, {other})")
        elif kind == "constant":
            values = ", ".join(str(float(v)) for v in random.standard_normal(shape[2]).round(2))
            lines.append(f"c{k} = Constant <value = float[{shape[2]}] {{{values}}}> () v{k} = Mul(c{k}, {source})")
        elif kind == "reduce":
            axis = int(random.integers(-3, 3))
            lines.append(f"r{k} = ReduceMean <axes: ints = [{axis}]> ({source}) v{k} = Sub({source}, r{k})")
        elif kind == "softmax":
            lines.append(f"v{k} = Softmax <axis: int = {int(random.integers(-3, 3))}> ({source})")
        else:
            lines.append(f"v{k} = CumSum ({source}, zero)")
        shapes[f"v{k}"] = shape
    outputs = [v for v in list(shapes)[-2:] if v not in ("x", "z")]
    ends = " ".join(f"y{k} = {random.choice(['Identity', 'Neg'])}({v})" for k, v in enumerate(outputs))
    declared = ", ".join(f"float[A{k},B{k},C{k}] y{k}" for k in range(len(outputs)))
    text = f"g (float[2,3,4] x, float[2,3,4] z) => ({declared}) <int64 zero = {{0}}> {{ {' '.join(lines)} {ends} }}"
    model = parse(text)
    feeds = random_feeds(model, seed % 1000)
    pass_class("remove-dead-code")().run(model, context())
    before, count = run(model, feeds), sum(node.op_type == "Transpose" for node in model.graph)
    result = MOVE.run(model, context())
    after = sum(node.op_type == "Transpose" for node in model.graph)
    for one, other in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert after < count if result.changed else after == count
