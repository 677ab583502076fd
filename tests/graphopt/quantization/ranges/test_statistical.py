"""Ranges without data: what statistics say of tensors, beside what random inputs make of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import model as files
from graphopt.base import Context
from graphopt.errors import UsageError
from graphopt.executor import Session
from graphopt.numerics.normal import Normal
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.quantization.ranges.statistical import statistics
from graphopt.registry import pass_class
from graphopt.target import Target

RNG = np.random.default_rng(0)
STANDARD = Normal.of(0.0, 1.0)


def close(model: ir.Model, feeds: dict[str, np.ndarray], tolerance: float = 0.1) -> None:
    """The output's mean and deviation per channel are those of the data, and its interval holds it."""
    name = str(model.graph.outputs[0].name)
    found, y = statistics(model, STANDARD).normals[name], Session(model).run(feeds)[name]
    wanted = np.broadcast_to(found.mean, y.shape).mean(axis=0), np.broadcast_to(found.variance, y.shape).mean(axis=0)
    spread = y.std()
    np.testing.assert_allclose(wanted[0], y.mean(axis=0), atol=tolerance * spread)
    np.testing.assert_allclose(np.sqrt(wanted[1]), y.std(axis=0), atol=tolerance * spread)
    assert found.range[0] <= y.min() and y.max() <= found.range[1]


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        ("y = Conv(x, w, b)", {"w": (6, 4, 1, 1), "b": (6,)}),
        ("y = Conv<group = 2>(x, w, b)", {"w": (6, 2, 1, 1), "b": (6,)}),
        ("c = Conv(x, w, b)  y = Relu(c)", {"w": (6, 4, 1, 1), "b": (6,)}),
        ("c = Conv(x, w)  y = Sigmoid(c)", {"w": (6, 4, 1, 1)}),
        ("c = Conv(x, w)  y = Mul(c, s)", {"w": (6, 4, 1, 1), "s": (6, 1, 1)}),
        ("c = Conv(x, w)  y = LeakyRelu<alpha = 0.3>(c)", {"w": (6, 4, 1, 1)}),
    ],
)
def test_images(body: str, parameters: dict[str, tuple[int, ...]]) -> None:
    model = graph("(float[N, 4, 3, 3] x) => (float[N, 6, 3, 3] y)", body, **parameters)
    close(model, {"x": RNG.standard_normal((6000, 4, 3, 3)).astype(np.float32)})


def test_sums_of_what_is_independent() -> None:
    model = graph(
        "(float[N, 4, 3, 3] x, float[N, 4, 3, 3] z) => (float[N, 6, 3, 3] y)",
        "c = Conv(x, w)  d = Conv(z, v)  y = Add(c, d)", w=(6, 4, 1, 1), v=(6, 4, 1, 1),
    )  # fmt: skip
    close(model, {name: RNG.standard_normal((6000, 4, 3, 3)).astype(np.float32) for name in "xz"})


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        ("y = Gemm(x, w, b)", {"w": (8, 5), "b": (5,)}),
        ("y = Gemm<transB = 1>(x, w, b)", {"w": (5, 8), "b": (5,)}),
        ("m = MatMul(x, w)  y = Add(m, b)", {"w": (8, 5), "b": (5,)}),
        ("n = Neg(x)  r = Relu(n)  y = Gemm(r, w, b)", {"w": (8, 5), "b": (5,)}),
    ],
)
def test_rows(body: str, parameters: dict[str, tuple[int, ...]]) -> None:
    model = graph("(float[N, 8] x) => (float[N, 5] y)", body, **parameters)
    close(model, {"x": RNG.standard_normal((20_000, 8)).astype(np.float32)})


def test_normalisations_tell_what_leaves_and_what_enters_them() -> None:
    gamma, beta = np.array([1, 2, 3], np.float32), np.array([0, 5, -1], np.float32)
    mean, variance = np.array([7, 0, 1], np.float32), np.array([9, 1, 4], np.float32)
    model = graph(
        "(float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y)", "c = Conv(x, w)  y = BatchNormalization(c, g, b, m, v)",
        w=(3, 2, 1, 1), g=gamma, b=beta, m=mean, v=variance,
    )  # fmt: skip
    found = statistics(model, STANDARD)
    assert found.measured == 1
    for name, (m, v) in {"y": (beta, gamma**2), "c": (mean, variance)}.items():
        np.testing.assert_allclose(found.normals[name].mean.reshape(-1), m)
        np.testing.assert_allclose(found.normals[name].variance.reshape(-1), v)


def test_layer_normalisation_needs_nothing_in_front_of_it() -> None:
    model = graph(
        "(int64[N, S] ids, int64[2] shape) => (float[N, S, 4] y)",
        "e = Gather(t, ids)  u = Reshape(e, shape)  y = LayerNormalization(e, g, b)",
        t=(10, 4), g=np.array([1, 2, 3, 4], np.float32), b=np.zeros(4, np.float32),
    )  # fmt: skip
    np.testing.assert_allclose(statistics(model, STANDARD).normals["y"].variance, [1, 4, 9, 16])


def test_what_statistics_do_not_reach_is_unknown() -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "c = Cos(x)  d = Gemm(c, w)  y = Sigmoid(d)", w=(4, 4))
    found = statistics(model, STANDARD).normals
    assert "c" not in found and "d" not in found
    assert found["y"].range == (0, 1)


def without_data(model: ir.Model, **options: object) -> object:
    chosen = Quantize(data="none", **options)  # type: ignore[arg-type]
    result = chosen.run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent(), pass_class))
    files.check(model)
    return result


NETWORK = (
    "(float[N, 3, 8, 8] x) => (float[N, 5] y)",
    "c = Conv<pads = [1, 1, 1, 1]>(x, w, b)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, v)",
)


def network() -> ir.Model:
    return graph(*NETWORK, w=(8, 3, 3, 3), b=(8,), v=(8, 5))


def test_a_network_is_quantised_without_data_and_says_so() -> None:
    model = network()
    x = {"x": RNG.standard_normal((64, 3, 8, 8)).astype(np.float32)}
    wanted = Session(model).run(x)["y"]
    result = without_data(model)
    noise = np.sum((Session(model).run(x)["y"] - wanted) ** 2) / np.sum(wanted**2)
    assert -10 * np.log10(noise) > 25
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) >= 3
    assert any(note.startswith("warning: quantised without data") for note in result.notes)  # type: ignore[attr-defined]


def test_the_input_range_is_that_of_the_input() -> None:
    model = network()
    without_data(model, input_range=(0.0, 1.0))
    assert float(model.graph.initializers["x_scale"].const_value.numpy()) == pytest.approx(1 / 255)


def test_layers_that_statistics_do_not_reach_stay_in_float() -> None:
    model = graph("(float[N, 4] x) => (float[N, 4] y)", "c = Cos(x)  y = Gemm(c, w)", w=(4, 4))
    result = without_data(model)
    assert not result.changed  # type: ignore[attr-defined]
    assert "tensor c has no scale" in result.skipped[0].reason  # type: ignore[attr-defined]


def test_options_that_cannot_be_together() -> None:
    assert not Quantize(data="none").needs_calibration
    assert Quantize().needs_calibration
    with pytest.raises(UsageError, match="only int8"):
        Quantize(data="none", scheme="auto")
    with pytest.raises(UsageError, match="not a range"):
        Quantize(data="none", input_range=(1.0, 0.0))
