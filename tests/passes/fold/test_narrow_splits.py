from __future__ import annotations

import numpy as np
import pytest
from golden import expect, reasons

from graphopt.registry import pass_class

NARROW = pass_class("narrow-splits")()
PARTS = "a_part_with_a_name, the_part_that_is_read, another_part_with_a_name"


@pytest.mark.parametrize(("part", "start", "end"), [(0, 0, 1), (1, 1, 3), (2, 3, 6)])
def test_one_part(part: int, start: int, end: int) -> None:
    names = ["one_that_is_not_read_and_has_a_long_name", "another_that_is_not_read_and_has_a_long_name"]
    names.insert(part, "p")
    expect(
        f"""g (float[N,6] x) => (float[A,B] y) <int64[3] lengths_of_the_three_parts = {{1, 2, 3}}> {{
          {", ".join(names)} = Split<axis = -1>(x, lengths_of_the_three_parts) y = Relu(p) }}""",
        f"""g (float[N,6] x) => (float[A,B] y) <int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] a = {{1}}> {{
          p = Slice(x, s, e, a) y = Relu(p) }}""",
        NARROW,
    )


def test_equal_parts_of_an_old_opset() -> None:
    head = '<ir_version: 4, opset_import: ["" : 9]> g (float[2,6] x) => (float[A,B] y)'
    expect(
        f"{head} {{ {PARTS}_of_great_length_and_more, b = Split(x) y = Relu(b) }}".replace("2,6", "8,6"),
        f"{head} {{ t = Slice<axes = [0], starts = [6], ends = [8]>(x) y = Relu(t) }}".replace("2,6", "8,6"),
        NARROW,
    )


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("p, q, r = Split<axis = 1>(x, k) y = Add(p, p)", "bytes more"),
        ("p, q, r = Split<axis = 1>(x, k) u = Abs(r) s = ReduceSum(u) y = Add(p, s)", ""),
        (f"{PARTS} = Split<axis = 1>(x, n) y = Relu(the_part_that_is_read)", "unknown"),
    ],
)
def test_what_stays(nodes: str, reason: str) -> None:
    tables = "int64[3] k = {1, 2, 3}, int64[3] z = {0, 0, 0}"
    text = f"g (float[2,6] x, int64[3] m) => (float[A,B] y) <{tables}> {{ n = Add(m, z) {nodes} }}"
    feeds = {"x": np.ones((2, 6), np.float32), "m": np.array([1, 2, 3])}
    assert reason in reasons(expect(text, None, NARROW, feeds=feeds))
