"""Savings are what removal really saves, and no unit is counted twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from random_graphs import random_graph
from text_graph import graph

from graphopt.analysis import savings
from graphopt.analysis.certificate import spare_axes
from graphopt.analysis.cost import model_stats
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import analyse
from graphopt.model import infer_shapes


def mlp() -> ir.Model:
    return graph(
        "(float[n,3] x) => (float[n,2] y)",
        "h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = Gemm<transB=1>(r, w2, b2)",
        w1=(4, 3),
        b1=(4,),
        w2=(2, 4),
        b2=(2,),
    )


def test_a_hidden_unit_saves_its_row_its_bias_and_its_column() -> None:
    coupling = analyse(mlp())
    found = savings.parameters(coupling)
    assert found.total == 12 + 4 + 8 + 2
    assert found.reachable == 12 + 4 + 8
    assert found.alone.tolist() == [0, 6, 6, 6, 6]
    work = savings.macs(coupling)
    assert (work.total, work.reachable, work.alone.tolist()) == (20, 20, [0, 5, 5, 5, 5])


def test_only_exact_units_count_where_exactness_is_asked_for() -> None:
    coupling = analyse(mlp())
    coupling.units[0] = replace(coupling.units[0], exact=False)
    assert savings.parameters(coupling).reachable == 24
    assert savings.parameters(coupling, exact=True).reachable == 18
    assert savings.macs(coupling, exact=True).alone.tolist() == [0, 0, 5, 5, 5]


@pytest.mark.parametrize("seed", range(12))
def test_what_a_unit_saves_is_what_its_removal_takes(seed: int) -> None:
    """On random graphs: MACs of the model without the unit, counted anew, are the dense ones less its savings."""
    model = random_graph(seed)
    coupling = analyse(model)
    work = savings.macs(coupling)
    before = model_stats(model).macs
    assert before is not None
    assert work.total == pytest.approx(before)
    for unit in np.random.default_rng(seed).permutation(len(coupling.units))[:4] + 1:
        if not spare_axes(coupling, {int(unit)}):
            continue  # the last of its axis
        pruned = model.clone()
        remove_units(pruned, coupling, {int(unit)})
        infer_shapes(pruned)
        after = model_stats(pruned).macs
        assert after is not None
        assert before - after == pytest.approx(work.alone[unit]), f"unit {unit}"
