"""Operators that index, sort or mix some axes: the others keep their units."""

from __future__ import annotations

import numpy as np
import pytest
from certified import certified, exact, reasons
from text_graph import graph

from graphopt.analysis.units import analyse

_HIDDEN = {"w": (8, 6), "v": (6, 3)}
_ROWS = np.array([[3, 1, 0, 2, 3, 1]] * 4)
_COUNT = np.array([2])
_CASES = [
    # body between the hidden layer h [b, 4, 6] and the result, opset, parameters, exact units
    ("r, i = TopK<axis=1>(h, k)", 17, {"k": _COUNT}, 6),
    ("r, i = TopK<axis=2>(h, k)", 17, {"k": np.array([6])}, 0),
    ("r = CumSum(h, k)", 17, {"k": np.array(1)}, 6),
    ("r = CumSum(h, k)", 17, {"k": np.array(2)}, 0),
    ("r = CumProd(h, k)", 26, {"k": np.array(1)}, 6),
    ("r = Compress<axis=1>(h, k)", 17, {"k": np.array([True, False, True, True])}, 6),
    ("r = ReverseSequence<batch_axis=0, time_axis=1>(h, k)", 17, {"k": np.array([2, 4])}, 6),
    ("r = CenterCropPad<axes=[1]>(h, k)", 18, {"k": np.array([3])}, 6),
    ("r = CenterCropPad<axes=[2]>(h, k)", 18, {"k": np.array([6])}, 0),
    ("t = Unsqueeze(h, a)  u = Trilu(t)  r = Squeeze(u, a)", 17, {"a": np.array([0])}, 0),
    ("s = Reshape(h, a)  u = Trilu(s)  r = Reshape(u, b)", 17, {"a": [0, 0, 6, 1], "b": [0, 0, 6]}, 0),
    ("t = Transpose<perm=[2,0,1]>(h)  u = Trilu(t)  r = Transpose<perm=[1,2,0]>(u)", 17, {}, 6),
    ("r = GatherElements<axis=1>(h, k)", 17, {"k": np.stack([_ROWS, _ROWS])}, 6),
    ("r = GatherElements<axis=2>(h, k)", 17, {"k": np.stack([_ROWS, _ROWS])}, 0),
    ("r = GatherElements<axis=1>(h, k)", 17, {"k": np.stack([_ROWS[:2], _ROWS[:2]])}, 6),
    ('r = ScatterElements<axis=1, reduction="add">(h, k, h)', 16, {"k": np.stack([_ROWS, _ROWS])}, 6),
    ("z = Mul(h, f)  r = ScatterElements<axis=1>(z, k, h)", 16, {"k": np.stack([_ROWS, _ROWS]), "f": (6,)}, 6),
    ("r = Scatter<axis=1>(h, k, h)", 10, {"k": np.stack([_ROWS, _ROWS])}, 6),
    ("r = GatherND(h, k)", 17, {"k": np.array([[[0, 1], [1, 2]], [[0, 3], [1, 0]]])}, 6),
    ("r = GatherND<batch_dims=1>(h, k)", 17, {"k": np.array([[[1]], [[3]]])}, 6),
    ("r = GatherND(h, k)", 17, {"k": np.array([[[[0, 1, 2]]]])}, 0),
    ("g = GatherND(h, k)  s = Sigmoid(g)  r = ScatterND(h, k, s)", 17, {"k": np.array([[[0, 1]], [[1, 2]]])}, 0),
    ("g = GatherND(h, k)  r = ScatterND(h, k, g)", 17, {"k": np.array([[[0, 1]], [[1, 2]]])}, 6),
    ("r = CastLike(h, k)", 17, {"k": np.zeros((1, 1), np.float32)}, 6),
    ("c = CastLike(h, k)  r = Cast<to=1>(c)", 17, {"k": np.zeros((1, 1), np.float64)}, 6),
    ("p = ArgMax<axis=1>(h)  c = Cast<to=1>(p)  r = Mul(h, c)", 17, {}, 6),
]


@pytest.mark.parametrize(("body", "opset", "parameters", "units"), _CASES)
def test_axes_that_are_left_alone_have_units(body: str, opset: int, parameters: dict, units: int) -> None:
    given = {name: np.array(value) if isinstance(value, list) else value for name, value in parameters.items()}
    model = graph(
        "(float[2,4,8] x) => (float[] y)",
        f"h = MatMul(x, w)  {body}  y = MatMul(r, v)",
        opset=opset,
        **_HIDDEN,
        **given,
    )
    coupling = certified(model)
    assert exact(coupling) == units
    if not units:
        assert "MatMul 'h'" not in reasons(coupling, "v")


def test_a_sum_over_neighbours_in_a_graph_keeps_the_features_as_units() -> None:
    """Messages along edges are added at their targets: an index of every feature, made by Expand."""
    edges = np.array([[0, 1, 2, 3, 1], [1, 0, 3, 2, 2]])
    model = graph(
        "(float[4,8] x) => (float[4,3] y)",
        """h = MatMul(x, w)  m = Gather<axis=0>(h, source)  z = Mul(h, gain)
           s = ScatterElements<axis=0, reduction="add">(z, target, m)  r = Relu(s)  y = MatMul(r, v)""",
        opset=18,
        source=edges[0],
        target=np.repeat(edges[1][:, None], 6, axis=1),
        gain=(6,),
        **_HIDDEN,
    )
    assert exact(certified(model)) == 6


def test_a_view_with_strides_keeps_the_channels_as_units() -> None:
    """Samples and channels become one axis and are taken apart again by an index along four axes."""
    model = graph(
        "(float[2,4,8] x) => (float[2,3] y)",
        """h = MatMul(x, w)  m = ReduceMean<axes=[1], keepdims=0>(h)  r = Relu(m)  f = Reshape(r, flat)
           g = Gather<axis=0>(f, view)  s = Reshape(g, rows)  y = MatMul(s, v)""",
        flat=np.array([-1]),
        view=np.arange(12).reshape(2, 6, 1, 1),
        rows=np.array([2, 6]),
        **_HIDDEN,
    )
    assert exact(certified(model)) == 6


def test_an_index_along_two_axes_makes_rows_and_columns_units() -> None:
    model = graph(
        "(float[2,4,8] x) => (float[2,4,3] y)",
        """h = MatMul(x, w)  r = Relu(h)  g = Gather<axis=2>(r, view)  s = Reshape(g, rows)  y = MatMul(s, v)""",
        view=np.array([[4, 0, 2], [1, 5, 3]]),
        rows=np.array([0, 0, -1]),
        **_HIDDEN,
    )
    assert exact(certified(model)) == 2 + 3


def test_messages_of_as_many_edges_as_an_index_says_keep_their_features() -> None:
    """The older exporter cuts messages to the size of their index, also where both are as long as the same input."""
    model = graph(
        "(float[n,8] x, int64[edges] source, int64[edges] target) => (float[n,3] y)",
        """h = MatMul(x, w)  m = Gather<axis=0>(h, source)  sm = Shape(m)  u = Unsqueeze(target, one)
           i = Expand(u, sm)  si = Shape(i)  c = Slice(m, noughts, si)  z = Mul(h, gain)
           s = ScatterElements<axis=0, reduction="add">(z, i, c)  r = Relu(s)  y = MatMul(r, v)""",
        opset=18,
        one=np.array([1]),
        noughts=np.array([0, 0]),
        gain=(6,),
        **_HIDDEN,
    )
    assert len(analyse(model).units) == 6
