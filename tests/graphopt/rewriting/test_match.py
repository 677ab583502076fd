"""The matcher by itself: formulas modulo order, grouping and spelling, and random formulas that are nearly the one."""

from __future__ import annotations

import itertools
import random

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, parse, random_feeds, run

from graphopt.registry import pass_class
from graphopt.rewriting.formulas import Pattern, Root
from graphopt.rewriting.found import Found, Free
from graphopt.rewriting.match import Parameter, Reduce, Tensor, either, op

X, Z = Tensor("x"), Tensor("z")
CONSTANTS = (
    """float two = {2.0}, float three = {3.0}, float half = {0.5}, float minus = {-1.0}, float[3] v = {1.0, 2.0, 3.0}"""
)


def value(body: str) -> ir.Value:
    model = parse(f"g (float[2,3] x, float[2,3] z) => (float[2,3] y) <{CONSTANTS}> {{ {body} }}")
    return model.graph.outputs[0]


def matches(pattern: Pattern, body: str) -> list[Found]:
    return list(pattern.match(value(body), Found()))


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        (2 * X, "y = Add (x, x)"),
        (2 * X, "y = Mul (two, two)"),
        (X / Z, "y = Div (z, z)"),
        (X - Z, "y = Sub (z, z)"),
        (X**3, "y = Pow (x, two)"),
        (X**2, "a = Pow (x, three) y = Mul (a, x)"),
        (X + 2.0, "y = Sub (x, two)"),
        (2.0 - X, "y = Sub (x, two)"),
        (X * Parameter("v"), "y = Mul (x, z)"),
        (op("Exp", X), "a = Cos (x) y = Sin (a)"),
        (op("Exp", X) + op("Sin", X), "a = Exp (x) b = Sin (z) y = Add (a, b)"),
    ],
)
def test_another_formula(pattern: Pattern, body: str) -> None:
    found = matches(pattern, body)
    names = [{name: v.name for name, v in match.values.items()} for match in found]
    assert not [n for n in names if n.get("x") == "x" and n.get("z", "z") == "z"]


@pytest.mark.parametrize(
    ("pattern", "body", "nodes"),
    [
        (2 * X, "y = Mul (two, x)", 1),
        (2 * X, "y = Div (x, half)", 1),
        (6 * X, "a = Mul (x, two) y = Mul (three, a)", 2),
        (-X, "y = Neg (x)", 1),
        (-X, "y = Mul (x, minus)", 1),
        (X * Z * 2, "a = Mul (z, two) y = Mul (a, x)", 2),
        (X / Root(Z), "r = Sqrt (z) y = Div (x, r)", 2),
        (X / Root(Z), "r = Sqrt (z) s = Reciprocal (r) y = Mul (s, x)", 3),
        (X / Root(Z), "r = Pow (z, half) y = Div (x, r)", 2),
        (1 / Z * X, "y = Div (x, z)", 1),
        (X**2, "y = Mul (x, x)", 1),
        (X**3, "a = Mul (x, x) y = Mul (x, a)", 2),
        (X - Z + 2.0, "a = Sub (x, z) y = Add (two, a)", 2),
        (X - Z + 2.0, "a = Sub (z, two) y = Sub (x, a)", 2),
        (3.0 - X, "y = Sub (three, x)", 1),
        (X * Parameter("v"), "y = Mul (v, x)", 1),
        (either(op("Exp", X), op("Sin", X)), "y = Sin (x)", 1),
        (op("Max", X, Z, commutes=True), "y = Max (z, x)", 1),
    ],
)
def test_one_formula_in_several_spellings(pattern: Pattern, body: str, nodes: int) -> None:
    assert any(len(match.nodes) == nodes and match.values["x"].name == "x" for match in matches(pattern, body))


def test_free_numbers_are_the_same_wherever_they_stand() -> None:
    twice = op("Max", X * Free("a"), op("Exp", X * Free("a")))
    assert [m.numbers["a"] for m in matches(twice, "p = Mul (x, two) q = Mul (x, two) e = Exp (q) y = Max (p, e)")][
        :1
    ] == [2]
    assert not [
        m
        for m in matches(twice, "p = Mul (x, two) q = Mul (x, half) e = Exp (q) y = Max (p, e)")
        if m.values["x"].name == "x"
    ]


def test_axes_are_counted_from_the_front() -> None:
    pattern = Reduce("ReduceMax", X) + Reduce("ReduceMean", X)
    body = "a = ReduceMax <axes: ints = [{}]> (x) b = ReduceMean <axes: ints = [{}]> (x) y = Add (a, b)"
    assert [m.axes["axes"] for m in matches(pattern, body.format(-1, 1))] == [(1,)]
    assert not matches(pattern, body.format(0, 1))


def test_what_a_formula_needs() -> None:
    assert (X * (1 + op("Erf", X))).needs() == {"Erf"}
    assert either(op("Exp", X), op("Exp", op("Sin", X))).needs() == {"Exp"}


NUMBERS = ("0.5", "1.0", "2.0", "3.0", "6.0", "0.70710677", "1.4142135", "0.16666667", "0.044715", "0.7978846", "0.0")
SHAPES = [
    "a = Mul (x, {}) b = Erf (a) c = Add (b, {}) d = Mul (x, c) y = Mul (d, {})",
    "a = Div (x, {}) b = Erf (a) c = Add (b, {}) d = Mul (c, {}) y = Mul (d, x)",
    "a = Add (x, {}) b = Clip (a, {}, {}) c = Mul (x, b) y = Div (c, {})",
    "a = Mul (x, {}) y = Max (a, x)",
    "a = Mul (x, {}) b = Add (a, {}) y = Clip (b, {}, {})",
    "a = Max (x, {}) y = Min (a, {})",
    "a = Mul (x, {}) b = Greater (x, {}) y = Where (b, x, a)",
    "a = Pow (x, {}) b = Mul (a, {}) c = Add (x, b) d = Mul (c, {}) e = Tanh (d) f = Add (e, {}) h = Mul (x, f) "
    "y = Mul (h, {})",
    "a = Exp (x) b = Add (a, {}) c = Log (b) d = Tanh (c) y = Mul (x, d)",
    "a = Neg (x) b = Exp (a) c = Add (b, {}) y = Div (x, c)",
    "a = ReduceMean (x, last) b = Sub (x, a) c = Pow (b, {}) d = ReduceMean (c, last) e = Add (d, {}) f = Sqrt (e) "
    "y = Div (b, f)",
    "a = ReduceMax (x, last) b = Sub (x, a) c = Exp (b) d = ReduceSum (c, last) e = Mul (d, {}) y = Div (c, e)",
]  # fmt: skip
PASSES = ("recognise-norms", "recognise-softmax", "recognise-activations")


@pytest.mark.parametrize("seed", range(8))
def test_random_numbers_in_formulas(seed: int) -> None:
    """Whatever the numbers are, what is written computes the same; each graph holds one formula behind another."""
    choice, fired = random.Random(seed), 0
    for _ in range(15):
        nodes, source, counter = [], "x", itertools.count()
        for step in range(choice.randint(1, 3)):
            shape = choice.choice(SHAPES)
            for name in sorted(set("abcdefhy") & set(shape), reverse=True):
                shape = shape.replace(f"{name} =", f"{name}{step} =").replace(f"({name},", f"({name}{step},")
                shape = shape.replace(f", {name})", f", {name}{step})").replace(f"({name})", f"({name}{step})")
                shape = shape.replace(f", {name},", f", {name}{step},")
            shape = shape.replace("(x,", f"({source},").replace(", x", f", {source}").replace("(x)", f"({source})")
            while "{}" in shape:
                name, number = f"k{next(counter)}", choice.choice(NUMBERS)
                nodes.append(f"{name} = Constant <value = float {{{number}}}> ()")
                shape = shape.replace("{}", name, 1)
            nodes.append(shape)
            source = f"y{step}"
        text = f"""<ir_version: 10, opset_import: ["" : 23]> g (float[2,3,4] x) => (float[2,3,4] y)
            <int64[1] last = {{-1}}> {{ {" ".join(nodes)} y = Identity ({source}) }}"""
        model = parse(text)
        feeds = random_feeds(model, seed)
        reference = run(model, feeds)
        for name in PASSES:
            made = pass_class(name)
            fired += made(slow=True).run(model, context()).changed
        got = run(model, feeds)
        np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(reference[0]), err_msg=text)
        np.testing.assert_array_equal(np.isinf(got[0]), np.isinf(reference[0]), err_msg=text)
        finite = np.isfinite(reference[0])
        assert_close([got[0][finite]], [reference[0][finite]], 1e-4)
    assert fired >= 1
