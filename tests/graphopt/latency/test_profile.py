"""Times of kernels inside a model are found under the names of its own nodes, fused or not."""

from __future__ import annotations

import numpy as np
import pytest
from quantization_traps import plain_attention, plain_cnn, samples

from graphopt import calibration
from graphopt.base import Context
from graphopt.latency.profile import profile
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.quantization.search.layer_times import layer_times
from graphopt.registry import target


def _layers(model):
    return {n.outputs[0].name: n.name for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul")}


@pytest.mark.parametrize("build", [plain_cnn, plain_attention])
@pytest.mark.parametrize("quantised", [False, True])
def test_every_layer_is_found(build, quantised):
    model = build(0)
    layers = _layers(model)
    if quantised:
        data = calibration.load(samples(model, 8, 0), model)
        Quantize(sensitive="none", prepare="none").run(model, Context(target("cpu"), data, None, 0, 1, Silent()))
    names = [n.name for n in model.graph]
    times, total = layer_times(model, layers, samples(build(0), 8, 0))
    assert set(times) == set(layers)
    assert all(seconds > 0 for seconds in times.values())
    assert sum(times.values()) <= total
    assert [n.name for n in model.graph] == names  # a copy was renamed


def test_totals_are_sums():
    model = plain_cnn(0)
    found = profile(model, samples(model, 4, 0))
    assert found.total == pytest.approx(sum(found.nodes.values()) + found.elsewhere)
    assert np.isfinite(found.total) and found.total > 0
