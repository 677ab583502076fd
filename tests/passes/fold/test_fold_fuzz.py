"""fold on random graphs: valid, the same function, no larger, nothing left to do; `tools/fuzz/folding.py` runs more."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from fold_checks import problem
from random_graphs import random_graph
from random_norm_graphs import norm_graph
from redundant_graphs import redundant_graph
from wrapped_graphs import wrapped_graph

from graphopt.passes.fold import Fold
from graphopt.rewriting.size import size


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed: int) -> None:
    makers = (redundant_graph, random_graph, norm_graph, lambda seed: wrapped_graph(seed, "if"))
    model = makers[seed % 4](seed) or redundant_graph(seed)
    assert problem(model, Fold(), seed) is None


def test_a_wrong_fold_is_seen() -> None:
    class Wrong(Fold):
        def run(self, model: ir.Model, ctx):
            result = super().run(model, ctx)
            weight = next(v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
            weight.const_value = ir.Tensor(weight.const_value.numpy() + 1, name=weight.name)
            return result

    found = problem(redundant_graph(0), Wrong(), 0)
    assert found is not None and "differ" in found


def test_detours_are_found() -> None:
    from fold_checks import context

    before = after = 0
    for seed in range(5):
        model = redundant_graph(seed)
        before += size(model).nodes
        Fold().run(model, context())
        after += size(model).nodes
    assert after < 0.85 * before
