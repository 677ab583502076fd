from __future__ import annotations

import onnx_ir as ir
import pytest
from golden import expect, reasons

from graphopt.passes.fold import MEMBERS
from graphopt.registry import pass_class

UNIFORM = pass_class("fold-uniform")()
SHAPES = "int64[4] ws = {4, 2, 1, 1}, int64[1] vs = {4}, int64[1] two = {2}"


def filled(name: str, shape: str, number: float) -> str:
    return f"{name} = ConstantOfShape <value = float[1] {{{number}}}> ({shape})"


WEIGHT = filled("w", "ws", 0.5)
NORM = " ".join([filled("s", "vs", 2.0), filled("t", "vs", 3.0), filled("m", "vs", 1.0), filled("v", "vs", 4.0)])


def model(nodes: str) -> str:
    return f"g (float[1,2,3,3] x) => (float[1,4,3,3] y) <{SHAPES}> {{ {nodes} }}"


def test_norm_behind_a_convolution() -> None:
    """scale 2 / sqrt(4 + 0) = 1, shift 3 - 1 * 1 = 2."""
    norm = f"{NORM} c = Conv(x, w) y = BatchNormalization<epsilon = 0.0>(c, s, t, m, v)"
    expect(model(f"{WEIGHT} {norm}"), model(f"{WEIGHT} {filled('b', 'vs', 2.0)} y = Conv(x, w, b)"), UNIFORM)


def test_a_bias_takes_the_shift() -> None:
    tables = f"{WEIGHT} {filled('b', 'vs', 1.0)} {filled('k', 'vs', 3.0)}"
    given = f"{tables} r = Unsqueeze(k, axes) c = Conv(x, w, b) y = Mul(c, r)"
    text = model(given).replace("int64[1] two = {2}", "int64[2] axes = {1, 2}")
    after = model(f"{filled('w', 'ws', 1.5)} {filled('b', 'vs', 3.0)} y = Conv(x, w, b)")
    expect(text, after, UNIFORM)


def test_factor_and_shift_of_a_norm() -> None:
    chain = f"{NORM} {filled('k', 'one', 3.0)} n = BatchNormalization(z, s, t, m, v) p = Mul(n, k) y = Add(k, p)"
    head = "g (float[1,4,3,3] x) => (float[1,4,3,3] y) <int64[1] vs = {4}, int64[3] one = {4, 1, 1}>"
    text = f"{head} {{ z = Abs(x) {chain} }}"
    norm = NORM.replace("{2.0}", "{6.0}").replace("{3.0}", "{12.0}")
    after = text.replace(chain, f"{norm} y = BatchNormalization(z, s, t, m, v)")
    expect(text, after, UNIFORM)


def test_equal_numbers_are_made_once() -> None:
    nodes = f"{filled('w', 'ws', 0.5)} {filled('k', 'two', 3.0)} a = Conv(x, w) b = Conv(x, w)"
    text = model(f"{nodes} c = Mul(a, k) d = Mul(b, k) y = Sub(c, d)").replace("two = {2}", "two = {1}")
    after = model(f"{filled('w', 'ws', 1.5)} a = Conv(x, w) b = Conv(x, w) y = Sub(a, b)")
    expect(text, after, UNIFORM)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (f"{WEIGHT} {filled('k', 'two', 3.0)} c = Conv(x, w) d = Mul(c, k) y = Add(c, d)", "also read elsewhere"),
        (f"{WEIGHT} {filled('k', 'two', 3e38)} {filled('b', 'vs', 9.0)} c = Conv(x, w, b) y = Mul(c, k)", "finite"),
        (f"{WEIGHT} {filled('k', 'two', 0.0)} c = Conv(x, w) y = Div(c, k)", "divides by zero"),
        (f"u = Constant <value = float[4,2,1,1] {{1, 2, 3, 4, 5, 6, 7, 8}}> () {filled('k', 'two', 3.0)} "
         "c = Conv(x, u) y = Mul(c, k)", ""),
        (f"{WEIGHT} {NORM} c = Conv(x, w) l = Constant <value = float[4] {{1, 2, 3, 4}}> () "
         "y = BatchNormalization(c, l, t, m, v)", "others are not"),
    ],
)  # fmt: skip
def test_what_stays(given: str, reason: str) -> None:
    assert reason in reasons(expect(model(given).replace("two = {2}", "two = {1}"), None, UNIFORM))


def test_a_uniform_operand_that_enlarges_stays() -> None:
    text = f"g (float[1,2,1,1] x) => (float[1,4,5,5] y) <{SHAPES}, int64[2] big = {{5, 5}}> {{ {WEIGHT} " + (
        f"{filled('k', 'big', 3.0)} c = Conv(x, w) y = Mul(c, k) }}"
    )
    assert "larger" in reasons(expect(text, None, UNIFORM))


def test_fold_writes_nothing_out() -> None:
    from golden import context, parse

    big = model(f"{WEIGHT} {NORM} c = Conv(x, w) y = BatchNormalization(c, s, t, m, v)")
    big = big.replace("{4, 2, 1, 1}", "{512, 2, 9, 9}").replace("vs = {4}", "vs = {512}")
    big = big.replace("float[1,2,3,3]", "float[1,2,9,9]").replace("float[1,4,3,3]", "float[1,512,1,1]")
    folded: ir.Model = parse(big)
    assert "fold-uniform" in MEMBERS
    pass_class("fold")().run(folded, context())
    assert sorted(node.op_type for node in folded.graph) == ["ConstantOfShape", "ConstantOfShape", "Conv"]
    assert sum(v.const_value.nbytes for v in folded.graph.initializers.values() if v.const_value) < 100
