"""Fixed sizes: what is checked, and that they reach everything that depends on them."""

from __future__ import annotations

import pytest
from text_graph import graph

from graphopt.errors import UsageError
from graphopt.files.input_sizes import dimension_names, fix_sizes


def model():
    return graph(
        "(float[batch, 3, H, W] x, float[batch, 8] z) => (float[b, c, h, w] y, float[batch, m] u)",
        "y = Relu (x)  u = Neg (z)",
    )


def test_a_shape_fixes_its_names_everywhere():
    fixed = model()
    fix_sizes(fixed, {}, {"x": [2, 3, 4, 5]})
    assert [list(v.shape) for v in fixed.graph.inputs] == [[2, 3, 4, 5], [2, 8]]
    assert list(fixed.graph.outputs[0].shape) == [2, 3, 4, 5]
    assert list(fixed.graph.outputs[1].shape) == [2, 8]
    assert dimension_names(fixed) == []


def test_names_and_shapes_go_together():
    fixed = model()
    fix_sizes(fixed, {"batch": 2}, {"z": (2, 8)})
    assert list(fixed.graph.inputs[0].shape)[:2] == [2, 3]
    assert dimension_names(fixed) == ["H", "W"]


@pytest.mark.parametrize(
    ("dims", "shapes", "says"),
    [
        ({}, {"x": [1, 4, 8, 8]}, r"input x: dimension 1 of .* is 3 in the model, 4 is given.*open"),
        ({}, {"x": [1, 3, 8]}, r"4 dimensions, 3 are given"),
        ({}, {"q": [1]}, r"input q: .*no input of this name.*x, z"),
        ({}, {"z": [0, 8]}, r"size 0 is not a positive"),
        ({"batch": 2}, {"z": [3, 8]}, r"input z: dimension batch is 2 elsewhere, 3 is given"),
        ({}, {"x": [1, 3, 4, 4], "z": [2, 8]}, r"dimension batch is 1 elsewhere"),
        ({"bach": 1}, {}, r"dimension bach: .* it has batch, H, W"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cause(dims, shapes, says):
    with pytest.raises(UsageError, match=says):
        fix_sizes(model(), dims, shapes)
