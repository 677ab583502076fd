"""found: what holds is read off the weights, whatever operator and type; a pattern that was lost is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from sparse_layers import LAYERS, along_inputs, context, layer_model, mixed
from text_graph import graph

from graphopt.model import load, save
from graphopt.numerics.sparsity.patterns import parse
from graphopt.passes.armor import Armor
from graphopt.passes.quantize import Quantize
from graphopt.passes.sparsify import Sparsify
from graphopt.sparsity.found import broken_patterns, fullest_groups, sparse_weights
from graphopt.sparsity.marks import declare_pattern


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4", "1:2"])
def test_the_pattern_that_holds_is_found(name: str, pattern: str) -> None:
    model = layer_model(name)
    (dense,) = sparse_weights(model)
    assert dense.pattern is None and dense.most == {4: 4, 8: 8, 16: 16} and (dense.inputs, dense.outputs) == (32, 24)
    Sparsify(pattern=pattern, method="magnitude").run(model, context(model, None))
    (found,) = sparse_weights(model)
    assert str(found.pattern) == pattern and found.holds(parse(pattern)) and not found.broken
    node = found.node
    node.metadata_props.clear()
    (undeclared,) = sparse_weights(model)
    assert str(undeclared.pattern) == {"3:4": "None", "1:2": "2:4"}.get(pattern, pattern)


def test_groups_run_along_the_input_channels_and_nothing_else() -> None:
    weight = np.ones((24, 32, 3, 3), np.float32)
    weight[:, :, :, :2] = 0  # one of three along the kernel, all along the channels
    model = graph("(float[n,32,7,7] x) => (float[n,24,5,5] y)", "y = Conv<kernel_shape=[3,3]>(x, w)", w=weight)
    assert sparse_weights(model)[0].pattern is None


def test_rows_that_end_within_a_group_and_layers_narrower_than_one() -> None:
    rows = np.array([[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0]])
    assert fullest_groups(rows, [2, 4, 8]) == {2: 2, 4: 2}
    assert fullest_groups(rows, [3]) == {3: 2}
    assert fullest_groups(np.full((1, 4), 7), [4], zero=7) == {4: 0}
    model = graph("(float[n,2,7,7] x) => (float[n,2,5,5] y)", "y = Conv<group=2>(x, w)", w=(2, 1, 3, 3))
    assert sparse_weights(model)[0].pattern is None


@pytest.mark.parametrize("wrappers", ["in", "both"])
@pytest.mark.parametrize("name", ["Gemm", "Conv"])
def test_marks_survive_a_file_and_lead_from_cores_to_wrappers(tmp_path: Path, name: str, wrappers: str) -> None:
    model = layer_model(name)
    result = Armor(form="factors", overhead=0.8, wrappers=wrappers).run(model, context(model, mixed(name)))
    assert result.changed
    save(model, tmp_path / "m.onnx")
    found = {w.role: w for w in sparse_weights(load(tmp_path / "m.onnx"), declared_only=True)}
    core = found["core"]
    assert core.weight.name == "w" and str(core.pattern) == "2:4"
    per_side, bias = (1, 0) if name == "Conv" else (5, 1)
    assert len(core.wrappers) == (per_side if wrappers == "in" else 2 * per_side + bias)
    assert {node.metadata_props["graphopt.sparsity.role"] for node in core.wrappers} == (
        {"in"} if wrappers == "in" else {"in", "out"}
    )


def test_integers_behind_a_dequantize_linear_are_read_too() -> None:
    model = layer_model("Conv")
    run = context(model, mixed("Conv"))
    Sparsify().run(model, run)
    Quantize(sensitive="none").run(model, run)
    (found,) = sparse_weights(model)
    assert found.quantised and found.weight.const_value.numpy().dtype == np.int8 and str(found.pattern) == "2:4"


def test_a_pattern_that_was_lost_is_told() -> None:
    model = layer_model("Gemm")
    Sparsify().run(model, context(model, mixed("Gemm")))
    assert broken_patterns(model) == {}
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(np.delete(value.const_value.numpy(), [0, 5, 6], axis=1), name="w")
    assert broken_patterns(model) == {"Gemm(y)": "2:4"}


def test_dense_weights_that_say_nothing_are_not_read() -> None:
    model = layer_model("Gemm")
    assert sparse_weights(model, declared_only=True) == []
    declare_pattern(next(iter(model.graph)), "2:4")
    (found,) = sparse_weights(model, declared_only=True)
    assert found.broken and found.pattern is None
    assert along_inputs(found.weight.const_value.numpy(), "Gemm").shape == (24, 32)
