"""armor: factors compute what the dense form computes, cores are sparse, wrappers beat the bare pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from sparse_layers import LAYERS, along_inputs, context, layer_model, mixed, relative

from graphopt.errors import DataError, UsageError
from graphopt.executor import Session
from graphopt.model import check
from graphopt.numerics.sparsity.patterns import holds, parse
from graphopt.passes.armor import Armor
from graphopt.passes.sparsify import Sparsify


def armoured(name: str, *, sparse: bool = False, overhead: float = 0.4, **options: Any) -> tuple[ir.Model, Any]:
    model = layer_model(name)
    result = Armor(overhead=overhead, cycles=6, **options).run(model, context(model, mixed(name), sparse=sparse))
    check(model)
    return model, result


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wrappers", ["in", "out", "both"])
def test_factors_are_the_dense_form_written_out(name: str, wrappers: str) -> None:
    taps = 9 if name == "Conv" else 1
    overhead = 8 * {"in": 32, "out": 24, "both": 56}[wrappers] / (24 * 32 * taps)
    dense, _ = armoured(name, wrappers=wrappers, form="dense", overhead=overhead)
    factors, result = armoured(name, wrappers=wrappers, form="factors", overhead=overhead)
    assert result.details["2:4 cores"][0]["block"] == 8
    assert holds(along_inputs(factors.graph.initializers["w"].const_value.numpy(), name), parse("2:4"))
    assert [value.name for value in factors.graph.outputs] == ["y"]
    data = mixed(name, seed=1)
    assert relative(Session(dense).run(data)["y"], Session(factors).run(data)["y"]) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_wrappers_beat_the_bare_pattern(name: str) -> None:
    data = mixed(name, seed=1)
    exact = Session(layer_model(name)).run(data)["y"]
    bare = layer_model(name)
    Sparsify().run(bare, context(bare, mixed(name)))
    for form in ("dense", "factors"):
        model, _ = armoured(name, form=form)
        assert relative(exact, Session(model).run(data)["y"]) < relative(exact, Session(bare).run(data)["y"])


def test_the_target_decides_on_the_form() -> None:
    dense, result = armoured("Gemm")
    assert {node.op_type for node in dense.graph} == {"Gemm"}
    assert any("no kernels that skip zeros" in note for note in result.notes)
    factors, result = armoured("Gemm", sparse=True)
    assert {node.op_type for node in factors.graph} == {"Gemm", "MatMul", "Reshape", "Transpose"}
    assert not result.notes


def test_batch_and_sequence_stay_free() -> None:
    model, _ = armoured("MatMul and Add", form="factors")
    for count in (1, 5):
        assert Session(model).run({"x": mixed("MatMul and Add", count)["x"]})["y"].shape == (count, 6, 24)


def test_a_budget_too_small_for_any_block_is_a_reason() -> None:
    model = layer_model("Gemm")
    result = Armor(overhead=0.01).run(model, context(model, mixed("Gemm")))
    assert not result.changed
    assert "no block" in result.skipped[0].reason


def test_the_papers_objective_runs_too() -> None:
    model, result = armoured("Gemm", objective="paper")
    assert result.changed
    assert np.isfinite(model.graph.initializers["w"].const_value.numpy()).all()


def test_bad_options_and_missing_data_are_refused() -> None:
    with pytest.raises(UsageError, match="groups"):
        Armor(pattern="50%")
    model = layer_model("Gemm")
    with pytest.raises(DataError, match="calibration"):
        Armor().run(model, context(model, None))
