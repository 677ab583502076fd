"""Ranges of sizes that a model leaves open."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.errors import UsageError
from graphopt.lowering.size_ranges import input_ranges, open_sizes, parse_ranges


@pytest.fixture
def net() -> ir.Model:
    return graph("(float[N,3,size] x, float[N] s, float[2] fixed) => (float[N,3,size] y)", "y = Neg(x)")


def test_shapes_of_every_input_with_an_open_size(net: ir.Model) -> None:
    assert open_sizes(net) == {"x": ["N", "size"], "s": ["N"]}
    assert input_ranges(net, "N=1:8:32, size=16:16:64") == {
        "x": ((1, 3, 16), (8, 3, 16), (32, 3, 64)),
        "s": ((1,), (8,), (32,)),
    }


def test_a_dimension_without_a_name_is_called_by_input_and_axis(net: ir.Model) -> None:
    net.graph.inputs[0].shape = ir.Shape([None, 3, "size"])
    net.graph.inputs[1].shape = ir.Shape([4])
    assert open_sizes(net) == {"x": ["x.0", "size"]}
    assert input_ranges(net, "x.0=1:2:3,size=4:5:6")["x"] == ((1, 3, 4), (2, 3, 5), (3, 3, 6))


@pytest.mark.parametrize("text", ["N", "N=1", "N=1:2", "N=3:2:1", "N=0:1:2", "N=a:b:c", "N=1:2:3:4", "N=1:2:3,N=1:2:3"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match="sizes: "):
        parse_ranges(text)


def test_ranges_must_fit_the_model(net: ir.Model) -> None:
    with pytest.raises(UsageError, match=r"'size' has no range; the open dimensions are N, size"):
        input_ranges(net, "N=1:2:3")
    with pytest.raises(UsageError, match=r"'batch' is no open dimension"):
        input_ranges(net, "batch=1:2:3,N=1:2:3,size=1:2:3")
