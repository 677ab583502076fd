"""Transformers as ONNX Runtime's optimiser writes them: fused operators are followed, and certificates hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from certified import certified, exact

from graphopt import model as models


@pytest.mark.parametrize(("name", "units"), [("minilm_l6", 9000), ("stories260k", 900)])
def test_fused_transformers_are_reached(data_dir: Path, tmp_path: Path, name: str, units: int) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    source = data_dir / "models" / f"{name}.onnx"
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = models.load(tmp_path / "fused.onnx")
    assert any(node.domain == "com.microsoft" for node in model.graph)
    assert exact(certified(model, seeds=1)) >= units
