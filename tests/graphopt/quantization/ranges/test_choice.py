"""From calibration data to scales: rules compared on the whole model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import calibration
from graphopt.errors import DataError
from graphopt.progress import Silent
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.ranges.choice import COMPARED, measure_ranges
from graphopt.target import QuantScheme

RNG = np.random.default_rng(0)


def network() -> ir.Model:
    body = "h = Gemm(x, w, b)  r = Relu(h)  y = Gemm(r, v, c)"
    return graph("(float[N, 8] x) => (float[N, 4] y)", body, w=(8, 16), b=(16,), v=(16, 4), c=(4,))


def prepared(samples: int = 64) -> Prepared:
    model = network()
    x = RNG.standard_t(2, size=(samples, 8)).astype(np.float32)  # heavy tails: the rules differ
    return Prepared(model, QuantScheme(), per_channel=True, calibration=calibration.load({"x": x}, model))


def noise(p: Prepared) -> float:
    return p.reference.noise(p.variant(p.planned(())))


def measured(p: Prepared, choice: str) -> float:
    measure_ranges(p, p.everything, choice, percentile=99.0, samples=64, progress=Silent())  # type: ignore[arg-type]
    return noise(p)


def test_what_is_compared_takes_the_best() -> None:
    p = prepared()
    found = {choice: measured(p, choice) for choice in COMPARED}
    assert len(set(found.values())) > 3, "the rules give different ranges"
    assert found["auto"] == min(found["minmax"], found["mse"])
    assert found["search"] <= min(found[rule] for rule in COMPARED if rule not in {"auto", "search"})


def test_a_single_rule_is_named() -> None:
    p = prepared()
    measured(p, "entropy")
    assert p.rule == "entropy"
    assert set(p.activations) == set(p.everything.ranged)


def test_without_data_there_are_no_ranges() -> None:
    p = Prepared(network(), QuantScheme(), per_channel=True)
    with pytest.raises(DataError, match="no calibration data"):
        measured(p, "auto")
