"""Pixel shuffles as exporters write them, and permutations that nearly are one."""

from __future__ import annotations

import pytest
from golden import expect, reasons

from graphopt.registry import pass_class

RECOGNISE = pass_class("recognise-pixel-moves")()


def text(split: str, perm: str, sizes: str, source: str, target: str) -> str:
    return f"""g (float[{source}] x) => (float[{target}] y) <int64[6] k = {{{split}}}, int64[4] l = {{{sizes}}}> {{
        a = Reshape (x, k) b = Transpose <perm: ints = [{perm}]> (a) y = Reshape (b, l) }}"""


def operator(node: str, source: str, target: str) -> str:
    return f"g (float[{source}] x) => (float[{target}] y) {{ y = {node} (x) }}"


DEEP, WIDE = "N,12,4,5", "N,3,8,10"
MOVES = [
    (
        text("-1, 2, 2, 3, 4, 5", "0, 3, 4, 1, 5, 2", "-1, 3, 8, 10", DEEP, WIDE),
        operator('DepthToSpace <blocksize: int = 2, mode: string = "DCR">', DEEP, WIDE),
    ),
    (
        text("-1, 3, 2, 2, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 3, 8, 10", DEEP, WIDE),
        operator('DepthToSpace <blocksize: int = 2, mode: string = "CRD">', DEEP, WIDE),
    ),
    (
        text("-1, 3, 4, 2, 5, 2", "0, 3, 5, 1, 2, 4", "-1, 12, 4, 5", WIDE, DEEP),
        operator("SpaceToDepth <blocksize: int = 2>", WIDE, DEEP),
    ),
]


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_each_move(before: str, after: str) -> None:
    for names in ("N", "2"):
        expect(before.replace("N,", f"{names},"), after.replace("N,", f"{names},"), RECOGNISE)


NEARLY = [
    text("-1, 3, 2, 2, 4, 5", "0, 1, 4, 3, 5, 2", "-1, 3, 8, 10", DEEP, WIDE),
    text("-1, 3, 4, 1, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 3, 16, 5", DEEP, "N,3,16,5"),
    text("-1, 3, 2, 2, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 6, 4, 10", DEEP, "N,6,4,10"),
    text("-1, 3, 4, 2, 5, 2", "0, 1, 3, 5, 2, 4", "-1, 12, 4, 5", WIDE, DEEP),
    text("-1, 3, 2, 2, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 3, 8, 10", DEEP, WIDE).replace("float", "int32"),
    text("-1, 3, 2, 2, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 3, 8, 10", DEEP, WIDE)
    .replace("y = Reshape", "z = Neg (b) y = Reshape")
    .replace("(float[N,3,8,10] y)", "(float[N,3,8,10] y, float[N,3,4,2,5,2] z)"),
]


@pytest.mark.parametrize("before", NEARLY)
def test_nearly(before: str) -> None:
    expect(before, None, RECOGNISE)


@pytest.mark.parametrize(
    ("types", "nodes", "reason"),
    [
        ("float", "u = Abs(t) s = ReduceSum(u) w = Reshape(t, b) y = Add(w, s)", "also read elsewhere"),
        ("int32", "y = Reshape(t, b)", "no kernel"),
    ],
)
def test_reasons(types: str, nodes: str, reason: str) -> None:
    text = f"""g ({types}[1,8,3,5] x) => ({types}[1,2,6,10] y)
      <int64[6] a = {{1, 2, 2, 2, 3, 5}}, int64[4] b = {{1, 2, 6, 10}}>
      {{ r = Reshape(x, a) t = Transpose<perm = [0, 3, 4, 1, 5, 2]>(r) {nodes} }}"""
    assert reason in reasons(expect(text, None, pass_class("recognise-pixel-moves")()))
