"""Files in ONNX Runtime's own format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from text_graph import graph

from graphopt.backends.ort_format import MODEL, OPERATORS, write_ort
from graphopt.errors import MissingBackendError
from graphopt.executor import Session
from graphopt.model import save

FEEDS = {"x": np.random.default_rng(0).normal(size=(1, 16, 8, 8)).astype(np.float32)}


@pytest.fixture
def net() -> ir.Model:
    return graph(
        "(float[N,16,8,8] x) => (float[N,16,8,8] y)", "c = Conv<pads=[1,1,1,1]>(x, w)\ny = Relu(c)", w=(16, 16, 3, 3)
    )


@pytest.mark.parametrize("style", ["fixed", "runtime"])
def test_it_computes_the_same_and_says_what_it_needs(
    net: ir.Model, tmp_path: Path, style: Literal["fixed", "runtime"]
) -> None:
    save(net, tmp_path / "net.onnx")
    before = logging.getLogger().handlers[:]
    write_ort(net if style == "runtime" else tmp_path / "net.onnx", tmp_path / MODEL, style=style)
    assert logging.getLogger().handlers == before
    session = ort.InferenceSession(str(tmp_path / MODEL))
    np.testing.assert_allclose(session.run(None, FEEDS)[0], Session(net).run(FEEDS)["y"], atol=1e-5)
    config = (tmp_path / OPERATORS).read_text()
    assert str(tmp_path) not in config
    assert "Conv" in config
    assert "nchwc" not in config


def test_the_same_model_gives_the_same_bytes(net: ir.Model, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(net, tmp_path / name / "net.onnx")
        write_ort(tmp_path / name / "net.onnx", tmp_path / name / MODEL, arm=False)
    for file in (MODEL, OPERATORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path: Path) -> None:
    save(
        graph("(float[N] x) => (float[N] y)", "y = com.none.Strange(x)", imports='"com.none" : 1'),
        tmp_path / "net.onnx",
    )
    with pytest.raises(MissingBackendError, match="Strange"):
        write_ort(tmp_path / "net.onnx", tmp_path / MODEL)
