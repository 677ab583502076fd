"""Every layer has units, or a weight of it has a row that says why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from random_graphs import random_graph
from text_graph import graph

from graphopt import optimize
from graphopt.analysis.frozen import from_constants
from graphopt.analysis.units import Coupling, analyse

IMAGE = "(float[n,3,8,8] x) => (float[n,2,8,8] y)"


def reasons(coupling: Coupling, tensor: str) -> dict[int, str]:
    return {row.axis: row.reason for row in coupling.frozen if row.tensor == tensor}


def layers_without_a_word(coupling: Coupling) -> list[str]:
    """Layers none of whose axes has a unit, and no operand of which has a row."""
    told = {row.tensor for row in coupling.frozen}
    nodes = {node.outputs[0].name: node for node in coupling.model.graph}
    cut = {term.node for term in coupling.terms if any(axes.any() for axes in term.axes)}
    silent = {term.node for term in coupling.terms} - cut
    return [name for name in silent if not told & {value.name for value in nodes[name].inputs if value is not None}]


def filled(*shape: int) -> np.ndarray:
    return np.array(shape, dtype=np.int64)


def test_weights_that_are_filled_in_have_units_once_they_are_stored() -> None:
    model = graph(
        IMAGE,
        """w1 = ConstantOfShape<value = float[1] {0.5}>(s1)  b1 = ConstantOfShape<value = float[1] {0.5}>(t1)
           w2 = ConstantOfShape<value = float[1] {0.25}>(s2)  h = Conv(x, w1, b1)  r = Relu(h)  y = Conv(r, w2)""",
        s1=filled(5, 3, 1, 1),
        t1=filled(5),
        s2=filled(2, 5, 1, 1),
    )
    coupling = analyse(model)
    assert not coupling.units
    assert "run fold-constants with larger limits" in reasons(coupling, "w1")[0]
    assert set(reasons(coupling, "b1")) == {0}
    assert set(reasons(coupling, "w2")) == {1}
    assert not layers_without_a_word(coupling)
    stored = optimize(model, passes="fold-constants{max_growth=1000}").model
    assert len(analyse(stored).units) == 5


@pytest.mark.parametrize(
    ("signature", "body", "expected"),
    [
        (IMAGE, "w = RandomNormal<shape=[2,3,1,1], seed=1.0>()  y = Conv(x, w)", "RandomNormal computes it"),
        (
            "(float[n,3,8,8] x, float[2,3,1,1] w) => (float[n,2,8,8] y)",
            "y = Conv(x, w)",
            "it is input 'w' of the graph",
        ),
        (
            "(float[n,3] x, float[2,3] v) => (float[n,2] y)",
            "w = Transpose(v)  y = MatMul(x, w)",
            "it is computed from input 'v' of the graph",
        ),
    ],
)
def test_weights_that_no_parameter_makes(signature: str, body: str, expected: str) -> None:
    coupling = analyse(graph(signature, body))
    assert any(expected in reason for reason in reasons(coupling, "w").values())


def test_products_of_what_layers_compute_are_no_weights() -> None:
    model = graph(
        "(float[n,5,4] x) => (float[n,5,5] y)",
        "q = MatMul(x, w1)  k = MatMul(x, w2)  t = Transpose<perm=[0,2,1]>(k)  y = MatMul(q, t)",
        w1=(4, 6),
        w2=(4, 6),
    )
    assert {row.tensor for row in analyse(model).frozen} == {"w1", "w2"}


def weight_norm(**parameters: Any) -> ir.Model:
    return graph(
        IMAGE,
        """h = Conv(x, w1)  r = Relu(h)  s = ReduceL2<axes=[1,2,3]>(v)  q = Div(v, s)  w = Mul(q, g)
           y = Conv<pads=[1,1,1,1]>(r, w)""",
        w1=(5, 3, 1, 1),
        v=(2, 5, 3, 3),
        g=(2, 1, 1, 1),
        **parameters,
    )


def test_a_frozen_weight_norm_says_that_folding_helps_and_it_does() -> None:
    model = weight_norm()
    assert from_constants(model) == {"s", "q", "w"}
    found = {unit.reason for unit in analyse(model).units}
    assert found == {"ReduceL2 's': sums a value that is not zero (all that it reads is constant: run fold first)"}
    folded = analyse(optimize(model, passes="fold").model)
    assert len(folded.units) == 5
    assert all(unit.exact for unit in folded.units)


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_no_layer_of_a_random_graph_stays_whole_without_a_word(seed: int) -> None:
    assert not layers_without_a_word(analyse(random_graph(seed)))
