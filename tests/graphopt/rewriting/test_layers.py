"""The matrix view of linear nodes: W @ columns + b is what ONNX Runtime computes, and storing weights back keeps it."""

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.executor import Session
from graphopt.rewriting.layers import layers_of

RNG = np.random.default_rng(0)


def model_of(op_type, x_shape, w_shape, bias=None, **attributes):
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x_shape))
    inputs = [x]
    for name, array in (("w", RNG.normal(size=w_shape)), ("b", bias)):
        if array is not None:
            tensor = ir.tensor(np.asarray(array, dtype=np.float32), name=name)
            inputs.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
    node = ir.node(op_type, inputs, attributes=attributes, name="the_node")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=inputs[1:], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


CASES = {
    "conv": ("Conv", (2, 3, 8, 9), (5, 3, 3, 3), RNG.normal(size=5), {"pads": [1, 1, 1, 1]}),
    "strided": ("Conv", (2, 3, 9, 9), (4, 3, 3, 2), None, {"strides": [2, 3], "pads": [0, 1, 2, 0]}),
    "dilated": ("Conv", (2, 4, 11), (6, 4, 3), RNG.normal(size=6), {"dilations": [2]}),
    "grouped": ("Conv", (2, 6, 7, 7), (4, 3, 3, 3), RNG.normal(size=4), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ("Conv", (2, 4, 7, 7), (4, 1, 3, 3), RNG.normal(size=4), {"group": 4, "auto_pad": "SAME_UPPER"}),
    "transposed": ("ConvTranspose", (2, 3, 5, 6), (3, 4, 3, 3), RNG.normal(size=4), {"strides": [2, 2]}),
    "transposed_padded": (
        "ConvTranspose", (2, 4, 5, 6), (4, 2, 4, 3), RNG.normal(size=4),
        {"strides": [2, 3], "pads": [1, 0, 2, 1], "group": 2, "output_padding": [1, 0]},
    ),
    "gemm": ("Gemm", (7, 5), (5, 3), RNG.normal(size=3), {"alpha": 0.5, "beta": 2.0}),
    "gemm_transposed": ("Gemm", (7, 5), (3, 5), RNG.normal(size=(1, 3)), {"transB": 1}),
    "matmul": ("MatMul", (2, 3, 5), (5, 4), None, {}),
}  # fmt: skip


def open_case(name):
    op_type, x_shape, w_shape, bias, attributes = CASES[name]
    model = model_of(op_type, x_shape, w_shape, bias, **attributes)
    layers, refused = layers_of(model)
    assert not refused
    x = RNG.normal(size=x_shape).astype(np.float32)
    return model, layers["y"], x, Session(model).run({"x": x})["y"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("thin", [1, 5])
def test_weight_times_columns_is_the_output(name, thin):
    _, layer, x, y = open_case(name)
    per_group = layer.linear.outputs // layer.groups
    for group in range(layer.groups):
        chunks = list(layer.columns(x, y, group, thin))
        columns = np.concatenate([c for c, _ in chunks], axis=1)
        wanted = np.concatenate([w for _, w in chunks], axis=1)
        bias = layer.bias()[group * per_group : (group + 1) * per_group, None]
        np.testing.assert_allclose(layer.weight()[group] @ columns + bias, wanted, rtol=1e-4, atol=1e-5)
        if thin == 1:
            assert columns.shape[1] == layer.positions(y)
        else:
            assert columns.shape[1] < layer.positions(y)


@pytest.mark.parametrize("name", CASES)
def test_stored_weights_are_read_back_and_executed(name):
    model, layer, x, y = open_case(name)
    layer.store(2.0 * layer.weight(), 2.0 * layer.bias())
    np.testing.assert_allclose(Session(model).run({"x": x})["y"], 2.0 * y, rtol=1e-4, atol=1e-5)
    again = layers_of(model)[0]["y"]
    np.testing.assert_allclose(again.weight(), layer.weight())


def test_a_convolution_gets_a_bias_and_a_matmul_does_not():
    model, layer, x, y = open_case("strided")
    assert layer.has_bias
    layer.store(layer.weight(), np.arange(4.0))
    np.testing.assert_allclose(
        Session(model).run({"x": x})["y"], y + np.arange(4.0).reshape(1, 4, 1, 1), rtol=1e-4, atol=1e-5
    )
    assert not open_case("matmul")[1].has_bias


def test_shared_weights_are_refused_with_the_reason():
    model, *_ = open_case("conv")
    node = model.graph[0]
    twin = ir.node("Conv", list(node.inputs), attributes={"pads": [1, 1, 1, 1]}, name="twin")
    twin.outputs[0].name = "z"
    model.graph.append(twin)
    layers, refused = layers_of(model)
    assert not layers
    assert "shared" in refused["y"]
