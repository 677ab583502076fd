"""Compressed files that lie about what they hold: one ModelError of one line each, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from sparse_files import sparse_network

from graphopt.errors import ModelError
from graphopt.model import load, save

Proto = onnx.ModelProto


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "m.onnx"
    save(sparse_network(), path, compress=True)
    return path.read_bytes()


def call(proto: Proto, name: str = "k.unpack") -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def attribute(proto: Proto, name: str, node: str = "k.unpack") -> onnx.AttributeProto:
    return next(a for a in call(proto, node).attribute if a.name == name)


def tensor(proto: Proto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


def replace_bytes(proto: Proto, name: str, position: int, value: int) -> None:
    raw = bytearray(tensor(proto, name).raw_data)
    raw[position] = value
    tensor(proto, name).raw_data = bytes(raw)


def index_out_of_order(proto: Proto) -> None:
    tensor(proto, "k.places").raw_data = bytes(len(tensor(proto, "k.places").raw_data))


def index_past_the_end(proto: Proto) -> None:
    # Lines of 62: the last group has two elements, and its second index now names the fourth.
    raw = bytearray(tensor(proto, "w1.places").raw_data)
    raw[:] = bytes([0b11001100]) * len(raw)
    tensor(proto, "w1.places").raw_data = bytes(raw)


def mask_with_more_places_than_values(proto: Proto) -> None:
    replace_bytes(proto, "w2.places", 0, 255)
    replace_bytes(proto, "w2.places", 1, 255)


def huge_shape(proto: Proto) -> None:
    attribute(proto, "shape").ints[0] = 1 << 40


def huge_shape_of_a_mask(proto: Proto) -> None:
    attribute(proto, "shape", "w2.unpack").ints[0] = 1 << 60


def negative_shape(proto: Proto) -> None:
    attribute(proto, "shape").ints[0] = -62


def no_shape(proto: Proto) -> None:
    del attribute(proto, "shape").ints[:]


def wrong_count(proto: Proto) -> None:
    attribute(proto, "count").ints[0] += 1


def wrong_axis(proto: Proto) -> None:
    attribute(proto, "axis").i = 7


def wrong_pattern(proto: Proto) -> None:
    attribute(proto, "keep").i = 3


def pattern_without_size(proto: Proto) -> None:
    attribute(proto, "of").i = 0


def wrong_layout(proto: Proto) -> None:
    attribute(proto, "along").ints[0] = 3


def attribute_of_another_type(proto: Proto) -> None:
    node = call(proto)
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("axis", [1])])


def attribute_missing(proto: Proto) -> None:
    node = call(proto)
    kept = [a for a in node.attribute if a.name != "keep"]
    del node.attribute[:]
    node.attribute.extend(kept)


def attribute_too_many(proto: Proto) -> None:
    call(proto).attribute.append(helper.make_attribute("more", 1))


def filler_of_another_type(proto: Proto) -> None:
    attribute(proto, "fill").t.CopyFrom(helper.make_tensor("", TensorProto.INT64, [1], [0]))


def filler_of_two(proto: Proto) -> None:
    attribute(proto, "fill").t.CopyFrom(helper.make_tensor("", TensorProto.FLOAT, [2], [0, 1]))


def filler_is_nan(proto: Proto) -> None:
    attribute(proto, "fill").t.CopyFrom(helper.make_tensor("", TensorProto.FLOAT, [1], [float("nan")]))


def too_few_places(proto: Proto) -> None:
    found = tensor(proto, "k.places")
    found.raw_data = found.raw_data[:-1]
    found.dims[0] -= 1


def too_few_values(proto: Proto) -> None:
    found = tensor(proto, "k.values")
    found.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found)[:-1], "k.values"))


def empty_mask(proto: Proto) -> None:
    for name in ("w2.values", "w2.places"):
        found = tensor(proto, name)
        found.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found)[:0], name))


def places_of_another_type(proto: Proto) -> None:
    tensor(proto, "k.places").data_type = TensorProto.INT8


def values_are_computed(proto: Proto) -> None:
    call(proto).input[0] = "x"


def input_missing(proto: Proto) -> None:
    del call(proto).input[1:]


def input_empty(proto: Proto) -> None:
    call(proto).input[1] = ""


def parts_are_shared(proto: Proto) -> None:
    call(proto, "w1.unpack").input[0] = "k.values"


def parts_may_be_overridden(proto: Proto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("k.values", TensorProto.FLOAT, [62, 16, 3, 3]))


def function_is_missing(proto: Proto) -> None:
    del proto.functions[:]


def function_computes_something_else(proto: Proto) -> None:
    node = next(n for n in proto.functions[0].node if n.op_type == "Slice")
    node.input[0], node.op_type = "every", "Identity"
    del node.input[1:]


def function_of_another_version(proto: Proto) -> None:
    proto.functions[0].name = "Groups3"
    for node in proto.graph.node:
        node.op_type = "Groups3" if node.op_type == "Groups2" else node.op_type


def ir_version_is_a_lie(proto: Proto) -> None:
    helper.set_model_props(proto, {"graphopt.ir_version": "99999999999999999999"})


DAMAGES: list[tuple[Callable[[Proto], None], str]] = [
    (index_out_of_order, "out of order"),
    (index_past_the_end, "out of range"),
    (mask_with_more_places_than_values, "places cannot hold"),
    (huge_shape, "needs [1099511627776, 16, 3, 3] values"),
    (huge_shape_of_a_mask, "bytes, not 2048"),
    (negative_shape, "no pattern"),
    (no_shape, "no pattern"),
    (wrong_count, "count"),
    (wrong_axis, "no pattern"),
    (wrong_pattern, "attributes are not those of"),
    (pattern_without_size, "no pattern"),
    (wrong_layout, "attributes are not those of"),
    (attribute_of_another_type, "axis is no integer"),
    (attribute_missing, "keep is no integer"),
    (attribute_too_many, "its attributes are"),
    (filler_of_another_type, "filler"),
    (filler_of_two, "filler"),
    (filler_is_nan, "NaN"),
    (too_few_places, "bytes, not"),
    (too_few_values, "values, not"),
    (empty_mask, "bytes, not 0"),
    (places_of_another_type, "INT8 positions"),
    (values_are_computed, "does not read constants"),
    (input_missing, "two parts"),
    (input_empty, "does not read constants"),
    (parts_are_shared, "read by others"),
    (parts_may_be_overridden, "does not read constants"),
    (function_is_missing, "unpacks no weight"),
    (function_computes_something_else, "not the function that this version"),
    (function_of_another_version, "not the function that this version"),
    (ir_version_is_a_lie, "older IR version"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda entry: getattr(entry, "__name__", ""))
def test_damaged_compressed_model(tmp_path: Path, small: bytes, damage: Callable[[Proto], None], words: str) -> None:
    proto = onnx.load_from_string(small)
    damage(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "m.onnx")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)
    assert "m.onnx" in str(caught.value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), values=st.binary(min_size=1, max_size=4), from_end=st.booleans())
def test_byte_mutations_load_or_raise_model_error(tmp_path, small, position, values, from_end):
    """Half of them near the end, where graph and functions are described."""
    data = bytearray(small)
    position = len(data) - 1 - position % 8000 if from_end else position % len(data)
    data[position : position + len(values)] = values
    (tmp_path / "m.onnx").write_bytes(data)
    try:
        load(tmp_path / "m.onnx")
    except ModelError as error:
        assert "\n" not in str(error)
