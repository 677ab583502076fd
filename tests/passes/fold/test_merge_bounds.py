from __future__ import annotations

import numpy as np
import pytest
from golden import HEADER, context, expect, parse, reasons, run

from graphopt.registry import pass_class

MERGE = pass_class("merge-bounds")()
HEAD = "g (float[2,4] x) => (float[2,4] y) "
NUMBERS = "<float zero = {0.0}, float one = {1.0}, float six = {6.0}, float[1] minus = {-2.0}> "

GOLDEN = [
    ("t = Relu(x) u = Clip(t, zero, six) y = Neg(u)", "u = Clip(x, zero, six) y = Neg(u)"),
    ("t = Clip(x, zero, six) u = Relu(t) y = Neg(u)", "u = Clip(x, zero, six) y = Neg(u)"),
    ("t = Clip(x, one) u = Clip(t, zero, six) y = Neg(u)", "u = Clip(x, one, six) y = Neg(u)"),
    ("t = Max(x, zero) u = Min(six, t) y = Neg(u)", "u = Clip(x, zero, six) y = Neg(u)"),
    ("t = Max(x, minus) u = Max(t, zero) y = Neg(u)", "u = Relu(x) y = Neg(u)"),
    ("t = Clip(x, six, one) u = Relu(t) y = Neg(u)", "t = Clip(x, six, one) y = Neg(t)"),
    ("t = Relu(x) u = Clip(t, , six) v = Clip(u, one) y = Neg(v)", "u = Clip(x, one, six) y = Neg(u)"),
]


@pytest.mark.parametrize(("before", "after"), GOLDEN)
def test_golden(before: str, after: str) -> None:
    expect(HEAD + NUMBERS + "{" + before + "}", HEAD + NUMBERS + "{" + after + "}", MERGE)


def test_what_others_read_stays() -> None:
    text = HEAD + NUMBERS + "{ t = Relu(x) u = Clip(t, zero, six) y = Add(t, u) }"
    assert "also read before" in reasons(expect(text, None, MERGE))


def test_a_bound_of_more_dimensions_than_the_tensor() -> None:
    text = "g (float[4] x) => (float[1,4] y) <float[1,1] k = {1.0}> { t = Relu(x) u = Max(t, k) y = Neg(u) }"
    expect(text, None, MERGE)


def test_attributes_of_old_opsets() -> None:
    old = HEADER.replace("17", "9")
    expect(
        old + HEAD + "{ t = Relu(x) u = Clip <max: float = 6.0> (t) y = Neg(u) }",
        old + HEAD + "{ u = Clip <min: float = 0.0, max: float = 6.0> (x) y = Neg(u) }",
        MERGE,
    )


@pytest.mark.parametrize("seed", range(40))
def test_chains_keep_nan_and_infinities(seed: int) -> None:
    random = np.random.default_rng(seed)
    lines, name = [], "x"
    for k in range(4):
        low, high = (random.choice([-2.0, -1.0, 0.0, 0.5, 1.0, 4.0]) for _ in range(2))
        bounds = f"l{k} = Constant <value = float {{{low}}}> () h{k} = Constant <value = float {{{high}}}> () "
        kind = random.choice(["Relu", "Clip", "Max", "Min"])
        operands = {"Relu": "", "Clip": f", l{k}, h{k}", "Max": f", l{k}", "Min": f", h{k}"}[str(kind)]
        lines.append(bounds + f"v{k} = {kind}({name}{operands})")
        name = f"v{k}"
    model = parse(f"g (float[9] x) => (float[9] y) {{ {' '.join(lines)} y = Neg({name}) }}")
    x = np.array([np.nan, -np.inf, -3, -1, -0.0, 0.5, 2, 5, np.inf], np.float32)
    before = run(model, {"x": x})[0]
    MERGE.run(model, context())
    np.testing.assert_array_equal(run(model, {"x": x})[0], before)
    assert sum(node.op_type != "Constant" for node in model.graph) <= 3
