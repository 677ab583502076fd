"""Random feeds respect what the graph shows of its inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.data.random_feeds import random_feeds
from graphopt.errors import ModelError


def build(nodes, inputs, initializers=()) -> ir.Model:
    last = nodes[-1].output[0]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name=last)], list(initializers))
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))


def info(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def test_indices_stay_inside_the_table():
    table = onnx.numpy_helper.from_array(np.zeros((3, 5), np.float32), "table")
    nodes = [
        helper.make_node("Cast", ["ids"], ["long"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["long", "axes"], ["wide"]),
        helper.make_node("Gather", ["table", "wide"], ["y"]),
    ]
    axes = onnx.numpy_helper.from_array(np.array([0]), "axes")
    model = build(nodes, [info("ids", TensorProto.INT32, ["batch", 200])], [table, axes])
    feeds = random_feeds(model, 0)
    assert set(np.unique(feeds[1]["ids"])) == {0, 1, 2}


def test_the_smallest_table_counts_and_the_axis_is_respected():
    tables = [
        onnx.numpy_helper.from_array(np.zeros(shape, np.float32), n) for n, shape in (("a", (9, 2)), ("b", (7, 4)))
    ]
    nodes = [
        helper.make_node("Gather", ["b", "ids"], ["p"], axis=0),
        helper.make_node("Gather", ["a", "ids"], ["q"], axis=1),
        helper.make_node("Identity", ["q"], ["y"]),
    ]
    feeds = random_feeds(build(nodes, [info("ids", TensorProto.INT64, [300])], tables), 0)
    assert feeds[0]["ids"].max() == 1


def test_masks_are_ones_then_zeros():
    nodes = [helper.make_node("Cast", ["attention_mask"], ["y"], to=TensorProto.FLOAT)]
    model = build(nodes, [info("attention_mask", TensorProto.INT64, [64, 8])])
    mask = random_feeds(model, 0)[0]["attention_mask"]
    assert mask.dtype == np.int64
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (mask[:, 0] == 1).all()
    assert (mask == 0).any()


def test_a_number_that_is_compared_takes_a_value_that_is_known():
    rate = onnx.numpy_helper.from_array(np.array(16000), "rate")
    nodes = [helper.make_node("Equal", ["sr", "rate"], ["y"])]
    assert random_feeds(build(nodes, [info("sr", TensorProto.INT64, [])], [rate]), 0)[0]["sr"] == 16000


def test_pixels():
    nodes = [helper.make_node("Cast", ["image"], ["y"], to=TensorProto.FLOAT)]
    image = random_feeds(build(nodes, [info("image", TensorProto.UINT8, [1, 3, 16, 16])]), 0)[0]["image"]
    assert image.dtype == np.uint8
    assert image.max() > 200


def test_unknown_dimensions_of_one_name_have_one_size():
    nodes = [helper.make_node("MatMul", ["a", "b"], ["y"])]
    model = build(nodes, [info("a", TensorProto.FLOAT, ["rows", "inner"]), info("b", TensorProto.FLOAT, ["inner", 3])])
    for feeds in random_feeds(model, 0):
        assert feeds["a"].shape[1] == feeds["b"].shape[0]


def test_sizes_are_found_by_trying():
    """An audio network pads by reflection and fails on short inputs."""
    pads = onnx.numpy_helper.from_array(np.array([0, 300, 0, 300]), "pads")
    nodes = [helper.make_node("Pad", ["x", "pads"], ["y"], mode="reflect")]
    model = build(nodes, [info("x", TensorProto.FLOAT, [1, None])], [pads])
    assert random_feeds(model, 0)[0]["x"].shape[1] > 300


def test_sizes_that_are_not_found_are_an_error():
    shape = onnx.numpy_helper.from_array(np.array([12345]), "shape")
    model = build(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])], [info("x", TensorProto.FLOAT, [None, None])], [shape]
    )
    with pytest.raises(ModelError, match=r"input x: .*--calib"):
        random_feeds(model, 0)


def test_the_same_seed_gives_the_same_feeds():
    model = build([helper.make_node("Relu", ["x"], ["y"])], [info("x", TensorProto.FLOAT, ["batch", 4])])
    first, again, other = random_feeds(model, 1), random_feeds(model, 1), random_feeds(model, 2)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        assert not np.array_equal(a["x"], c["x"])
    assert [f["x"].shape[0] for f in first] == [1, 2]


def test_an_input_without_a_rank_is_an_error():
    model = build([helper.make_node("Relu", ["x"], ["y"])], [info("x", TensorProto.FLOAT, None)])
    with pytest.raises(ModelError, match="input x"):
        random_feeds(model, 0)
