"""flow: channels are followed through movement, and told apart where they meet different factors."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph

from graphopt.sparsity.flow import follow
from graphopt.sparsity.moves import FOREIGN, Sizes, _runs

T = "(float[n,t,12] x) => (float[a,b,c] y)"


def leaf(body: str, signature: str = T, **parameters: object) -> tuple[list[int], list[int]]:
    """Labels and meetings, numbered by first appearance, of what the Softmax at the end reads."""
    model = graph(signature, body, **parameters)
    (found,) = [leaf for leaf in follow(model.graph.inputs[0], 2, Sizes()) if leaf.node.op_type == "Softmax"]
    labels, meeting = found.channels.on(-1, int(found.value.shape[-1]))
    _, numbers = np.unique(meeting, axis=0, return_inverse=True)
    order = list(dict.fromkeys(numbers.ravel().tolist()))
    return labels.tolist(), [order.index(number) for number in numbers.ravel().tolist()]


def test_movement_is_carried_out_on_numbers() -> None:
    cut = {"cut": np.array([0, 0, 3, 4]), "flat": np.array([0, 0, 12])}
    body = "r = Reshape(x, cut)  s = Transpose<perm=[0,1,3,2]>(r)  f = Reshape(s, flat)  y = Softmax(f)"
    assert leaf(body, **cut) == (np.arange(12).reshape(3, 4).T.ravel().tolist(), [0] * 12)
    body = "p, q = Split<axis=-1>(x, parts)  y = Softmax(q)  z = Relu(p)"
    assert leaf(body, parts=np.array([4, 8]))[0] == list(range(4, 12))
    body = "s = Slice(x, one, end, axis, two)  y = Softmax(s)"
    slices = {"one": np.array([1]), "end": np.array([9]), "axis": np.array([2]), "two": np.array([3])}
    assert leaf(body, **slices)[0] == [1, 4, 7]
    assert leaf("s = Gather<axis=2>(x, i)  y = Softmax(s)", i=np.array([3, 0, 3]))[0] == [3, 0, 3]
    body = "s = Concat<axis=-1>(z, x)  y = Softmax(s)"
    assert leaf(body, "(float[n,t,12] x, float[n,t,2] z) => (float[a,b,c] y)")[0] == [FOREIGN] * 2 + list(range(12))


def test_channels_of_different_heads_met_different_factors() -> None:
    body = """
    r = Reshape(x, cut)  v = Transpose<perm=[0,2,1,3]>(r)  o = MatMul(p, v)  s = Transpose<perm=[0,2,1,3]>(o)
    f = Reshape(s, flat)  y = Softmax(f)
    """
    signature = "(float[n,t,12] x, float[n,3,t,t] p) => (float[a,b,c] y)"
    found = leaf(body, signature, cut=np.array([0, 0, 3, 4]), flat=np.array([0, 0, 12]))
    assert found == (list(range(12)), [0] * 4 + [1] * 4 + [2] * 4)
    assert leaf("s = Mul(x, g)  y = Softmax(s)", g=(12,))[1] == list(range(12))
    assert leaf("s = Mul(x, g)  y = Softmax(s)", g=(1,))[1] == [0] * 12


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ((2, 12, 5), (2, 3, 4, 5), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((101, 103, 4, 6), (101, 107, 24), [([0], [0]), ([1], [1]), ([2, 3], [2])]),
    ],
)
def test_runs_of_axes(before: tuple[int, ...], after: tuple[int, ...], wanted: list[object]) -> None:
    assert _runs(before, after) == wanted
