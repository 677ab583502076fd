"""Small models as files, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper


def small_proto(ir_version: int = 8, opset: int = 13, size: int = 400) -> onnx.ModelProto:
    """y = relu(x @ w) @ v; w is large enough to be stored externally."""
    rng = np.random.default_rng(0)
    w = onnx.numpy_helper.from_array(rng.standard_normal((4, size)).astype(np.float32), "w")
    v = onnx.numpy_helper.from_array(rng.standard_normal((size, 3)).astype(np.float32), "v")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.dims)) for t in (w, v)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="first", doc_string="the first layer"),
            helper.make_node("Relu", ["h"], ["r"], name="act"),
            helper.make_node("MatMul", ["r", "v"], ["y"], name="second"),
        ],
        "small",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [w, v],
        doc_string="a small graph",
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    proto.producer_name = "the tests"
    helper.set_model_props(proto, {"licence": "Apache-2.0"})
    return proto


def write(proto: onnx.ModelProto, path: Path, external: bool = False) -> Path:
    if external:
        onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        path.write_bytes(proto.SerializeToString())
    return path
