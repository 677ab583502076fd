"""Fusions that slow a model down are turned off where timing says so, and timed where integers are multiplied."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import timing
from graphopt.backends.ort_fusions import ENTRY, FUSION, configuration
from graphopt.executor import Session

RNG = np.random.default_rng(0)
FEEDS = {"x": RNG.normal(size=(1, 4, 8)).astype(np.float32)}


def product(body: str) -> ir.Model:
    return graph(
        "(float[1,4,8] x) => (float[1,4,8] y)", body, s=np.float32(0.02), z=np.uint8(128), t=np.float32(0.01),
        u=np.int8(0), w=RNG.integers(-127, 128, (8, 8), dtype=np.int8), f=(8, 8), b=(8,),
    )  # fmt: skip


QUANTISED = """q = QuantizeLinear(x, s, z)  dx = DequantizeLinear(q, s, z)  dw = DequantizeLinear(w, t, u)
               m = MatMul(dx, dw)  y = Add(m, b)"""


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What timing finds for the second of two calls."""
    told: dict[str, float] = {}
    real = timing.paired

    def paired(calls: Any, seconds: float, **more: Any) -> Any:
        found = real(calls, 0.01, **more)
        return dataclasses.replace(found, ratios=(1.0, told["ratio"]))

    monkeypatch.setattr(timing, "paired", paired)
    return told


def test_the_fusion_is_turned_off_where_that_is_clearly_faster(ratio: dict[str, float]) -> None:
    model = product(QUANTISED)
    ratio["ratio"] = 0.5
    entries = configuration(model, FEEDS, 0.01)
    assert entries == {ENTRY: FUSION}
    ratio["ratio"] = 0.9
    assert configuration(model, FEEDS, 0.01) == {}
    with Session(model, optimize=True) as usual, Session(model, optimize=True, config=entries) as without:
        np.testing.assert_allclose(without.run(FEEDS)["y"], usual.run(FEEDS)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("body", ["m = MatMul(x, f)  y = Add(m, b)", QUANTISED.replace("Add(m, b)", "Relu(m)")])
def test_other_models_are_not_timed(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "paired", None)
    assert configuration(product(body), FEEDS, 0.01) == {}
