"""sparsify: the pattern holds in the stored weights, the layer's outputs stay close, what cannot be cut says why."""

from __future__ import annotations

import numpy as np
import pytest
from sparse_layers import LAYERS, along_inputs, context, layer_model, mixed, relative
from text_graph import graph

from graphopt.errors import DataError, UsageError
from graphopt.executor import Session
from graphopt.model import check
from graphopt.numerics.sparsity.patterns import holds, parse
from graphopt.passes.quantize import Quantize
from graphopt.passes.sparsify import Sparsify


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_pattern_holds_along_the_input_channels(name: str, pattern: str) -> None:
    model = layer_model(name)
    dense = Session(model.clone()).run(mixed(name, seed=1))["y"]
    result = Sparsify(pattern=pattern).run(model, context(model, mixed(name)))
    check(model)
    weight = model.graph.initializers["w"].const_value.numpy()
    assert holds(along_inputs(weight, name), parse(pattern))
    assert result.changed
    assert [row["layer"] for row in result.details[f"{pattern} layers"]] == ["y" if "Add" not in name else "h"]
    assert relative(dense, Session(model).run(mixed(name, seed=1))["y"]) < 0.35
    assert any("no kernels that skip zeros" in note for note in result.notes)


@pytest.mark.parametrize("name", LAYERS)
def test_the_default_is_better_than_the_published_methods(name: str) -> None:
    errors = {}
    test = mixed(name, seed=1)
    dense = Session(layer_model(name)).run(test)["y"]
    for method in ("magnitude", "wanda", "nowag", "sparsegpt", "cd"):
        model = layer_model(name)
        Sparsify(method=method).run(model, context(model, mixed(name), sparse=True))
        errors[method] = relative(dense, Session(model).run(test)["y"])
    assert errors["cd"] < errors["sparsegpt"] < min(errors["wanda"], errors["nowag"], errors["magnitude"])


def test_groups_of_a_convolution_are_fitted_each_by_itself() -> None:
    model = graph(
        "(float[n,32,5,5] x) => (float[n,8,3,3] y)",
        "y = Conv<group=2, kernel_shape=[3,3]>(x, w, b)",
        w=(8, 16, 3, 3),
        b=(8,),
    )
    data = {"x": np.random.default_rng(0).normal(size=(64, 32, 5, 5)).astype(np.float32)}
    dense = Session(model.clone()).run(data)["y"]
    Sparsify().run(model, context(model, data))
    weight = model.graph.initializers["w"].const_value.numpy()
    assert holds(along_inputs(weight, "Conv"), parse("2:4"))
    assert relative(dense, Session(model).run(data)["y"]) < 0.5


def test_what_stays_dense_says_why() -> None:
    model = graph(
        "(float[n,32] x) => (float[n,4] y)",
        "a = MatMul(x, wa) b = MatMul(a, wb) c = MatMul(b, wc) d = Mul(c, zero) y = MatMul(d, wd)",
        wa=(32, 8),
        wb=(8, 32),
        wc=np.zeros((32, 32), np.float32),
        zero=np.zeros(32, np.float32),
        wd=(32, 4),
    )
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    data = {"x": np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)}
    result = Sparsify(exclude=("wa",)).run(model, context(model, data))
    assert {skip.node: skip.reason for skip in result.skipped} == {
        "a": "excluded",
        "b": "8 input channels are fewer than 16",
        "c": "its weights are all zero",
        "y": "its inputs are all zero on the calibration data",
    }
    assert not result.changed
    assert all(np.array_equal(before[n], v.const_value.numpy()) for n, v in model.graph.initializers.items())


def test_weights_that_would_overflow_stay_as_they_are() -> None:
    model = graph(
        "(float16[n,16] x) => (float16[n,2] y)",
        "y = MatMul(x, w)",
        w=np.linspace(5e4, 6.5e4, 32).reshape(16, 2).astype(np.float16),
    )
    data = {"x": np.abs(np.random.default_rng(0).normal(size=(40, 1))).repeat(16, 1).astype(np.float16) / 1e4}
    result = Sparsify().run(model, context(model, data))
    assert [skip.reason for skip in result.skipped] == ["its new weights overflow float16"]
    assert not result.changed


def test_data_is_asked_for_where_it_is_needed() -> None:
    model = layer_model("Gemm")
    with pytest.raises(DataError, match="calibration"):
        Sparsify().run(model, context(model, None))
    assert Sparsify(method="magnitude").run(model, context(model, None)).changed


def test_the_manager_asks_for_data_only_where_the_method_needs_it() -> None:
    assert Sparsify().needs_calibration
    assert not Sparsify(method="magnitude").needs_calibration
    assert not Sparsify.needs_calibration  # a preset may hold it


def test_an_unknown_pattern_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="pattern"):
        Sparsify(pattern="4:2")


def test_quantised_afterwards_the_zeros_stay_zeros() -> None:
    model = layer_model("Conv")
    run = context(model, mixed("Conv"))
    Sparsify().run(model, run)
    Quantize(sensitive="none").run(model, run)
    stored = {v.name: v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value is not None}
    weight = next(array for array in stored.values() if array.dtype == np.int8 and array.ndim == 4)
    assert holds(along_inputs(weight, "Conv"), parse("2:4"))
    assert (weight != 0).mean() > 0.45
