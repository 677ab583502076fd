"""Biases that take back what quantisation does to means: front to back, on floats and integers, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.calibration import Calibration, load
from graphopt.data.activations import activations
from graphopt.quantization.rounding.bias_correction import bias_of, correct_biases, correct_if_better, expected_shift
from graphopt.quantization.rounding.interface import WeightGrid, nearest
from graphopt.rewriting.layers import layers_of

RNG = np.random.default_rng(0)
CRUDE = WeightGrid(2)


def network() -> tuple[ir.Model, Calibration]:
    model = graph(
        "(float[N, 3, 8, 8] x) => (float[N, 5] y)",
        """c = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(c)  d = Conv(r, w2)  g = GlobalAveragePool(d)
           f = Flatten(g)  m = MatMul(f, w3)  y = Add(m, b3)""",
        w1=(6, 3, 3, 3), b1=(6,), w2=(6, 6, 3, 3), w3=(6, 5), b3=(5,),
    )  # fmt: skip
    x = RNG.gamma(2.0, 1.0, (48, 3, 8, 8)).astype(np.float32)
    return model, load({"x": x}, model)


def crude(model: ir.Model) -> ir.Model:
    """The model with weights of two bits."""
    copy = model.clone()
    for key, layer in layers_of(copy)[0].items():
        layer.store(nearest(key, layer.weight(), CRUDE).dequantised().astype(float), layer.bias())
    return copy


def mean(model: ir.Model, calibration: Calibration, name: str) -> np.ndarray:
    parts = [tensors[name] for tensors in activations(model, [name], calibration)]
    whole = np.concatenate(parts)
    return whole.mean(axis=tuple(i for i in range(whole.ndim) if i != 1))


def test_means_are_those_of_the_float_model_and_front_layers_are_not_corrected_twice() -> None:
    model, calibration = network()
    rounded = crude(model)
    assert np.abs(mean(rounded, calibration, "c") - mean(model, calibration, "c")).max() > 0.1
    done = correct_biases(model, rounded, calibration)
    assert set(done.layers) == {"c", "m"}
    for name in ("c", "y"):
        assert mean(rounded, calibration, name) == pytest.approx(mean(model, calibration, name), abs=1e-4)
    assert [skip.reason for skip in done.skipped] == ["it has no bias of its own"]


def test_biases_of_integers_move_by_whole_steps_of_their_grid() -> None:
    body = "b = DequantizeLinear<axis=0>(q, s)  y = Conv(x, w, b)"
    weight = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32)
    steps, scale = np.array([10, -20, 30, 2**31 - 2], np.int32), np.array([0.1, 0.2, 0.1, 1.0], np.float32)
    model = graph("(float[N, 3, 2, 2] x) => (float[N, 4, 2, 2] y)", body, w=weight, q=steps, s=scale)
    bias = bias_of(model.graph.outputs[0], 4)
    assert not isinstance(bias, str)
    bias.add(np.array([0.26, -0.2, 0.04, 1e6]))
    moved = model.graph.initializers["q"].const_value
    assert moved is not None
    assert list(moved.numpy()) == [13, -21, 30, 2**31 - 1]


def test_shared_and_computed_biases_are_left_alone() -> None:
    body = "a = Conv(x, w, b)  c = Conv(x, w, b)  h = Add(b, b)  d = Conv(x, w, h)  y = Sum(a, c, d)"
    model = graph("(float[N, 3, 2, 2] x) => (float[N, 4, 2, 2] y)", body, w=(4, 3, 1, 1), b=(4,))
    values = {v.name: v for node in model.graph for v in node.outputs}
    assert bias_of(values["a"], 4) == "its bias is shared"
    assert bias_of(values["d"], 4) == "it has no bias of its own"


def test_is_kept_only_where_outputs_come_closer() -> None:
    model, calibration = network()
    rounded = crude(model)
    bytes_before = rounded.graph.initializers["b1"].const_value.numpy().tobytes()  # type: ignore[union-attr]
    worse = iter((1.0, 2.0))
    notes = correct_if_better(model, rounded, calibration, lambda _: next(worse))
    assert "stay as they are" in notes[0]
    assert rounded.graph.initializers["b1"].const_value.numpy().tobytes() == bytes_before  # type: ignore[union-attr]
    better = iter((2.0, 1.0))
    notes = correct_if_better(model, rounded, calibration, lambda _: next(better))
    assert notes[0].startswith("biases of 2 layers corrected")
    assert mean(rounded, calibration, "y") == pytest.approx(mean(model, calibration, "y"), abs=1e-4)


def test_without_data_the_means_of_the_inputs_do() -> None:
    weight = RNG.standard_normal((2, 3, 4))
    rounded = nearest("", weight, CRUDE).dequantised()
    x = RNG.normal(2.0, 1.0, (1000, 2, 4))
    wrong = np.einsum("grc,ngc->ngr", weight - rounded, x).mean(axis=0).reshape(-1)
    assert expected_shift(weight, rounded, x.mean(axis=0)) == pytest.approx(wrong)
