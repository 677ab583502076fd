"""What ONNX Runtime fuses in a model."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt.model import save


def fused(model: ir.Model | Path) -> Counter[str]:
    """How often ONNX Runtime's extended optimisation has each fused operator in the main graph of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        source, optimised = (str(Path(folder) / name) for name in ("source.onnx", "optimised.onnx"))
        if isinstance(model, Path):
            source = str(model)
        else:
            save(model, source)
        options.optimized_model_filepath = optimised
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimised, load_external_data=False).graph.node
    extra = {"LayerNormalization", "SimplifiedLayerNormalization", "Gelu"}
    return Counter(node.op_type for node in nodes if node.domain == "com.microsoft" or node.op_type in extra)
