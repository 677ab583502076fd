"""Files that travel, and files that do not."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
from text_graph import graph

from graphopt.errors import ModelError
from graphopt.lowering.portable import beyond_onnx, refuse_private, strip_unused_imports
from graphopt.model import load, save


def test_what_an_optimiser_saved_for_its_own_processor_is_refused_by_node(tmp_path: Path) -> None:
    net = graph(
        "(float[1,16,8,8] x) => (float[1,16,8,8] y)", "c = Conv<pads=[1,1,1,1]>(x, w)\ny = Relu(c)", w=(16, 16, 3, 3)
    )
    save(net, tmp_path / "net.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(tmp_path / "net.onnx"), options)
    saved = load(tmp_path / "saved.onnx")
    if not any(node.domain == "com.microsoft.nchwc" for node in saved.graph):
        pytest.skip("ONNX Runtime blocks no channels on this processor")
    with pytest.raises(
        ModelError, match=r"com\.microsoft\.nchwc.*vector width.*lower the model that this one was made of"
    ):
        refuse_private(saved)


def test_private_operators_in_bodies_are_found_and_quantised_ones_stay() -> None:
    inner = "then_branch = g () => (float[N] t) { t = com.ms.internal.nhwc.Conv(x, x) }"
    other = "else_branch = h () => (float[N] e) { e = Neg(x) }"
    hidden = graph("(bool c, float[N] x) => (float[N] y)", f"[pick] y = If(c) <{inner}, {other}>")
    with pytest.raises(ModelError, match="one device"):
        refuse_private(hidden)
    with pytest.raises(ModelError, match="EPContext"):
        refuse_private(graph("(float[N] x) => (float[N] y)", "y = com.microsoft.EPContext(x)"))
    ours = graph("(float[N,16] x) => (float[N,4] y)", "y = com.microsoft.MatMulNBits<K=16,N=4>(x, x, x)")
    refuse_private(ours)
    assert beyond_onnx(ours) == ["com.microsoft.MatMulNBits"]
    assert beyond_onnx(graph("(float[N] x) => (float[N] y)", "y = Neg(x)")) == []


def test_unused_operator_sets_go_from_a_copy() -> None:
    net = graph("(float[N] x) => (float[N] y)", "y = com.some.Neg(x)", imports='"com.some" : 1, "com.none" : 1')
    assert set(strip_unused_imports(net).opset_imports) == {"", "com.some"}
    assert "com.none" in net.opset_imports
