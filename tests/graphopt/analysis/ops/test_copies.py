"""Expand and Tile: what is repeated along an axis is as long as the graph needs it."""

from __future__ import annotations

import numpy as np
import pytest
from certified import certified, exact
from text_graph import graph

_ENDS = "r = ReduceSum<keepdims=0>(t, axes)  y = MatMul(r, v)"
_PARAMETERS = {"w": (8, 6), "v": (6, 3), "mask": (1, 4, 1), "axes": np.array([1])}


@pytest.mark.parametrize(
    "copied",
    [
        "s = Shape(h)  k = Expand(mask, s)",
        "k = Expand(mask, sizes)",
        "k = Tile(mask, sizes)",
        "one = Expand(number, sizes)  k = Add(one, one)",
    ],
)
def test_a_mask_that_is_expanded_to_all_features_holds_none_of_them(copied: str) -> None:
    used = {"sizes": np.array([1, 1, 6]), "number": np.float32(0.5)}
    model = graph(
        "(float[b,4,8] x) => (float[] y)",
        f"h = MatMul(x, w)  {copied}  t = Mul(h, k)  {_ENDS}",
        **_PARAMETERS,
        **{name: value for name, value in used.items() if name in copied},
    )
    assert exact(certified(model)) == 6


def test_copies_that_are_added_are_no_zeros() -> None:
    model = graph(
        "(float[b,4,8] x) => (float[] y)",
        f"h = MatMul(x, w)  k = Expand(mask, sizes)  t = Add(h, k)  {_ENDS}",
        sizes=np.array([1, 1, 6]),
        **_PARAMETERS,
    )
    coupling = certified(model)
    assert (len(coupling.units), exact(coupling)) == (6, 0)


def test_messages_of_a_graph_are_added_at_expanded_indices() -> None:
    model = graph(
        "(float[4,8] x, int64[4,1] nodes) => (float[] y)",
        """h = MatMul(x, w)  i = Mod(nodes, four)  s = Shape(h)  z = ConstantOfShape(s)  j = Expand(i, s)
           a = ScatterElements<axis=0, reduction="add">(z, j, h)  y = MatMul(a, v)""",
        opset=18,
        w=(8, 6),
        v=(6, 3),
        four=np.array(4),
    )
    assert exact(certified(model)) == 6
