"""Metrics of a comparison, tolerances, and what is an error."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from model_files import small_proto, write
from onnx import TensorProto, helper

from graphopt import model as models
from graphopt.errors import DataError, ModelError, VerificationError
from graphopt.verify import Comparison, _Sums, compare, random_feeds, structure_check, tolerance


def measure(a, b, samples=None):
    sums = _Sums("y")
    a, b = np.asarray(a), np.asarray(b)
    sums.add(a, b, samples if samples is not None else (a.shape[0] if a.ndim else 1))
    return sums.result()


def scaled(model: ir.Model, factor: float) -> ir.Model:
    clone = model.clone()
    value = clone.graph.initializers["v"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name="v")
    return clone


@pytest.fixture
def model(tmp_path):
    return models.load(write(small_proto(), tmp_path / "m.onnx"))


def test_the_metrics_are_what_they_say():
    a = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    b = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
    error = measure(a, b)
    assert error.max_abs == 1.0
    assert error.rel_l2 == pytest.approx(math.sqrt(2 / 26))
    assert error.cosine == pytest.approx(0.5)  # one sample equal, one orthogonal
    assert error.sqnr_db == pytest.approx(10 * math.log10(26 / 2))
    assert error.top1_agreement == 0.5
    assert not error.tolerable


def test_sums_run_over_feeds():
    sums = _Sums("y")
    sums.add(np.array([[3.0]]), np.array([[3.0]]), 1)
    sums.add(np.array([[4.0]]), np.array([[5.0]]), 1)
    assert sums.result().rel_l2 == pytest.approx(0.2)


def test_equal_outputs():
    a = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    error = measure(a, a.copy())
    assert (error.max_abs, error.rel_l2, error.cosine, error.sqnr_db) == (0.0, 0.0, 1.0, math.inf)


def test_sums_are_taken_in_double_precision():
    """In float32, ten million small differences on top of a large one would vanish."""
    a = np.zeros(10_000_001, np.float32)
    a[0] = 1e4
    b = a.copy()
    b[1:] = 1e-3
    assert measure(a, b, 1).rel_l2 == pytest.approx(math.sqrt(1e7 * 1e-6) / 1e4, rel=1e-6)


def test_nan_equals_nan_and_nothing_else():
    a = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    error = measure(a, a.copy())
    assert (error.rel_l2, error.nonfinite, error.undefined) == (0.0, 0, 0.25)
    for other in ([0.0, np.inf, -np.inf, 1.0], [np.nan, -np.inf, -np.inf, 1.0], [np.nan, np.inf, 5.0, 1.0]):
        error = measure(a, np.array([other], np.float32))
        assert error.nonfinite == 1
        assert error.rel_l2 == math.inf
        assert error.cosine == 0.0
        assert not error.tolerable


def test_a_zero_reference():
    assert measure(np.zeros(3), np.zeros(3)).rel_l2 == 0.0
    error = measure(np.zeros((1, 3)), np.ones((1, 3)))
    assert (error.rel_l2, error.cosine) == (math.inf, 0.0)


def test_integers_booleans_and_strings_are_compared_exactly():
    assert measure(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])).rel_l2 == 0.25
    assert not measure(np.array([10**9] * 1000), np.array([10**9] * 999 + [10**9 + 1])).tolerable
    assert measure(np.array([True, False]), np.array([True, True])).rel_l2 == 0.5
    words = measure(np.array(["a", "b"], object), np.array(["a", "c"], object))
    assert (words.rel_l2, words.cosine, words.tolerable) == (0.5, 0.5, False)
    assert measure(np.array(["a"], object), np.array(["a"], object)).tolerable


def test_empty_and_scalar_outputs():
    assert measure(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)).rel_l2 == 0.0
    assert measure(np.float32(2.0), np.float32(2.0)).cosine == 1.0


def test_tolerance_by_dtype():
    assert tolerance(np.float64) < tolerance(np.float32) < tolerance(np.float16)
    assert tolerance(np.int64) == tolerance(np.bool_) == 0.0


def test_compare_finds_rounding_tolerable_and_a_changed_weight_not(model):
    feeds = random_feeds(model, 0)
    same = compare(model, model.clone(), feeds)
    assert same.equal
    assert same.worst_relative == 0.0
    assert same.feeds == 2
    assert compare(model, scaled(model, 1 + 1e-6), feeds).equal
    changed = compare(model, scaled(model, 1.01), feeds)
    assert changed.worst_relative == pytest.approx(0.01, rel=1e-3)
    assert changed.cosine == pytest.approx(1.0)
    with pytest.raises(VerificationError, match=r"pass: output y differs by 0\.01 relative \(tolerance 1e-04\)"):
        changed.require_equal("pass")


def test_compare_takes_paths(model, tmp_path):
    models.save(model, tmp_path / "b.onnx")
    assert compare(tmp_path / "m.onnx", tmp_path / "b.onnx", random_feeds(model, 0)).equal


def test_the_worst_output_counts():
    good, bad = measure(np.ones((2, 2)), np.ones((2, 2))), measure(np.ones((2, 2)), -np.ones((2, 2)))
    comparison = Comparison([good, bad], 1)
    assert (comparison.worst_relative, comparison.cosine, comparison.equal) == (2.0, pytest.approx(-1.0), False)


@pytest.mark.parametrize("budget", [1, 5000, 1 << 30])
def test_sliced_and_whole_execution_agree(model, budget):
    feeds = random_feeds(model, 0, samples=5)
    assert compare(model, model.clone(), feeds, slice_bytes=budget).worst_relative == 0.0
    assert compare(model, scaled(model, 1.01), feeds, slice_bytes=budget).worst_relative == pytest.approx(
        0.01, rel=1e-3
    )


def test_a_candidate_without_the_output(model):
    other = model.clone()
    other.graph.outputs[0].name = "other"
    with pytest.raises(VerificationError, match="no output y"):
        compare(model, other, random_feeds(model, 0))


def test_a_candidate_with_another_shape(model):
    other = model.clone()
    value = other.graph.initializers["v"]
    value.const_value = ir.tensor(value.const_value.numpy()[:, :2].copy(), name="v")
    value.shape = ir.Shape([400, 2])
    other.graph.outputs[0].shape = None
    with pytest.raises(VerificationError, match="shape"):
        compare(model, other, random_feeds(model, 0))


def test_a_candidate_that_fails_where_the_reference_runs(model):
    other = model.clone()
    other.graph.outputs[0].shape = other.graph.initializers["v"].shape = None
    other.graph.initializers["v"].const_value = ir.tensor(np.ones((399, 3), np.float32), name="v")
    with pytest.raises(VerificationError, match="second"):
        compare(model, other, random_feeds(model, 0))


def test_a_reference_that_does_not_run_says_to_give_data(model):
    model.graph.node("act").op_type = "Mystery"
    model.graph.node("act").domain = "com.example"
    model.graph.opset_imports["com.example"] = 1
    with pytest.raises(Exception, match="Mystery"):
        compare(model, model.clone(), [{"x": np.ones((1, 4), np.float32)}])
    reshape = small_proto()
    reshape.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, -1]), "target"))
    reshape.graph.node[1].CopyFrom(helper.make_node("Reshape", ["h", "target"], ["r"], name="bad"))
    broken = ir.from_proto(reshape)
    with pytest.raises(ModelError, match=r"node bad \(Reshape\).*--calib"):
        compare(broken, broken.clone(), [{"x": np.ones((1, 4), np.float32)}])


def test_no_feeds_and_wrong_feeds(model):
    with pytest.raises(DataError, match="no feeds"):
        compare(model, model.clone(), [])
    with pytest.raises(DataError, match="input x"):
        compare(model, model.clone(), [{"x": np.ones((1, 5), np.float32)}])


def test_mostly_undefined_outputs_are_noted(tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("Sqrt", ["n"], ["y"]),
            helper.make_node("Neg", ["a"], ["n"]),
            helper.make_node("Abs", ["x"], ["a"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model = models.load(write(proto, tmp_path / "m.onnx"))
    comparison = compare(model, model.clone(), random_feeds(model, 0))
    assert "100%" in comparison.notes[0]
    assert "--calib" in comparison.notes[0]


def test_structure_check_names_what_a_rewrite_broke(model):
    structure_check(model)
    node = model.graph.node("act")
    model.graph.node("second").replace_input_with(0, ir.Value(name="lost"))
    with pytest.raises(VerificationError, match=r"second .* 'lost', which nothing defines"):
        structure_check(model)
    model.graph.node("second").replace_input_with(0, node.outputs[0])
    model.graph.remove(node)
    with pytest.raises(VerificationError, match="was removed"):
        structure_check(model)
