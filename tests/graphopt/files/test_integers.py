"""Sizes that exporters compute: followed to numbers where shapes tell them, unknown elsewhere, never guessed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.files.integers import entries, integers


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def found(body: str, **parameters: np.ndarray) -> list | None:
    """What is known of `y`, computed from x [n, 6, 8]."""
    signature = "(float[n,6,8] x) => (int64[k] y)"
    model = graph(signature, body, **parameters)
    result = entries(model.graph.outputs[0])
    return None if result is None else result.tolist()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Shape(x)", ["n", 6, 8]),
        ("y = Shape<start=1, end=3>(x)", [6, 8]),
        ("s = Shape(x)  y = Gather(s, i21)", [8, 6]),
        ("s = Shape(x)  a = Slice(s, i1, i3)  y = Mul(a, i2)", [12, 16]),
        ("s = Shape(x)  y = Mul(s, i2)", [None, 12, 16]),
        ("s = Shape(x)  y = Mul(s, i1)", ["n", 6, 8]),
        ("s = Shape(x)  a, b, c = Split(s)  y = Concat<axis=0>(c, a)", [8, "n"]),
        ("s = Shape(x)  y = Div(s, i4)", [None, 1, 2]),
        ("s = Shape(x)  y = Sub(i1, s)", [None, -5, -7]),
        ("s = Shape(x)  e = Equal(s, m1)  y = Where(e, i1, s)", ["n", 6, 8]),
        ("s = Shape(x)  g = Gather(s, i1)  f = Cast<to=1>(g)  h = Div(f, four)  c = Ceil(h)  y = Cast<to=7>(c)", [2]),
        ("z = ConstantOfShape(i2)  c = Cast<to=7>(z)  y = Concat<axis=0>(c, i21)", [0, 0, 2, 1]),
        ("r = Reshape(pads, two)  v = Slice(r, m1, far, i0, m1)  t = Transpose(v)  y = Reshape(t, m1)", [5, 3, 6, 4]),
        ("a = ReduceMax<keepdims=0>(x)  c = Cast<to=7>(a)  y = Unsqueeze(c, i0)", None),
    ],
)
def test_what_is_known(body: str, expected: list | None) -> None:
    known = found(
        body,
        i0=ints(0),
        i1=ints(1),
        i2=ints(2),
        i3=ints(3),
        i4=ints(4),
        m1=ints(-1),
        i21=ints(2, 1),
        pads=ints(3, 4, 5, 6),
        two=ints(-1, 2),
        far=ints(-(2**31)),
        four=np.float32([4]),
    )
    if expected is None:
        assert known is None or not all(isinstance(entry, int | str) for entry in known)
        return
    assert known is not None and len(known) == len(expected)
    for entry, wanted in zip(known, expected, strict=True):  # None: not a number
        assert not isinstance(entry, int) if wanted is None else entry == wanted


def test_integers_only_where_all_are_known() -> None:
    model = graph("(float[n,6] x) => (int64[2] y)", "y = Shape(x)")
    assert integers(model.graph.outputs[0]) is None
    known = graph("(float[3,6] x) => (int64[2] y)", "y = Shape(x)")
    assert integers(known.graph.outputs[0]).tolist() == [3, 6]
    assert integers(ir.Value(name="nothing")) is None
