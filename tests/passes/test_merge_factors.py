"""merge-factors: A S B becomes one dense weight; nothing else merges factors, fold only where it is asked to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from factorised import exact, factorise, wrapper_nodes
from sparse_layers import LAYERS, context, layer_model, mixed
from text_graph import graph

from graphopt.passes.armor import Armor
from graphopt.passes.fold import Fold
from graphopt.passes.merge_factors import MergeFactors
from graphopt.passes.quantize import Quantize
from graphopt.sparsity.found import sparse_weights

SIDES = {"in": {"right": 8}, "out": {"left": 8}, "both": {"right": 8, "left": 8}}


def factorised(name: str, side: str) -> ir.Model:
    return factorise(layer_model(name), {"h" if "Add" in name else "y": SIDES[side]})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_multiplied_out(name: str, side: str) -> None:
    model = factorised(name, side)
    dense = [node.op_type for node in layer_model(name).graph]
    result = exact(model, MergeFactors(), mixed(name, 4))
    assert result.changed
    assert not result.skipped
    assert [node.op_type for node in model.graph] == dense
    assert not sparse_weights(model, declared_only=True)
    assert {"w"} <= set(model.graph.initializers) <= {"w", "b", "y_bias"}
    assert not exact(model, MergeFactors(), mixed(name, 4)).changed


def test_a_wrapper_that_several_cores_share_goes_into_all() -> None:
    model = graph("(float[n,16] x) => (float[n,16] y)", "a = MatMul(x, v) b = MatMul(x, w) y = Add(a, b)",
                  v=(16, 16), w=(16, 16))  # fmt: skip
    factorise(model, {"a": {"right": 8}, "b": {"right": 8}}, same=True)
    inner = [node for node in model.graph if node.op_type == "MatMul" and len(node.inputs[1].shape) == 2]
    inner[1].replace_input_with(0, inner[0].inputs[0])
    assert exact(model, MergeFactors(), {"x": np.ones((3, 16), np.float32)}).changed
    assert not any("Reshape" in n.op_type for n in model.graph if sum(len(list(v.uses())) for v in n.outputs))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", LAYERS)
def test_fold_leaves_factors_as_they_are_unless_it_is_asked(name: str, side: str) -> None:
    model = factorised(name, side)
    nodes, zeros = wrapper_nodes(model), model.graph.initializers["w"].const_value.numpy() == 0
    exact(model, Fold(), mixed(name, 4))
    assert wrapper_nodes(model) == nodes
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy() == 0, zeros)
    exact(model, Fold(merge_factors=True), mixed(name, 4))
    assert wrapper_nodes(model) == 0
    assert sparse_weights(model)[0].pattern is None


def test_fold_folds_wrappers_where_that_is_exact() -> None:
    model = graph("(float[n,16] x) => (float[n,16] y)", "a = Gemm(x, v) y = Gemm(a, w)", v=(16, 16), w=(16, 16))
    factorise(model, {"y": {"right": 8}})
    exact(model, Fold(), {"x": np.ones((3, 16), np.float32)})
    assert [node.op_type for node in model.graph] == ["Gemm", "Gemm"]
    assert str(sparse_weights(model, declared_only=True)[0].pattern) == "2:4"


def test_batch_normalisation_goes_into_wrappers_of_convolutions() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w) y = BatchNormalization(a, s, b, m, v)"
    model = graph("(float[n,16,6,6] x) => (float[n,16,6,6] y)", body, w=(16, 16, 3, 3), s=(16,), b=(16,), m=(16,),
                  v=np.linspace(1, 2, 16, dtype=np.float32))  # fmt: skip
    factorise(model, {"a": {"left": 4, "right": 8}})
    x = {"x": np.random.default_rng(0).normal(size=(2, 16, 6, 6)).astype(np.float32)}
    exact(model, Fold(), x)
    assert [node.op_type for node in model.graph] == ["Conv"] * 3
    exact(model, MergeFactors(), x)
    assert [node.op_type for node in model.graph] == ["Conv"]


def test_a_quantised_core_is_not_merged() -> None:
    model = layer_model("Gemm")
    run = context(model, mixed("Gemm"))
    Armor(form="factors", overhead=0.4, cycles=3).run(model, run)
    Quantize(sensitive="none").run(model, run)
    result = MergeFactors().run(model, run)
    assert not result.changed
    assert "QuantizeLinear" in result.skipped[0].reason
