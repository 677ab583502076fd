"""Hostile and damaged files: each ends in one ModelError that names what and where, and in nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import small_proto, write
from onnx import TensorProto, helper

from graphopt import model as models
from graphopt.errors import ModelError
from graphopt.files.writer import prefix

Proto = onnx.ModelProto


def refused(path: Path, *words: str) -> ModelError:
    """Load must raise a ModelError of one line with these words, among them the name of the file."""
    with pytest.raises(ModelError) as caught:
        models.load(path)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in text
    for word in (path.name, *words):
        assert word in text
    return caught.value


def test_missing_file(tmp_path):
    refused(tmp_path / "no.onnx", "cannot be read")


def test_folder(tmp_path):
    refused(tmp_path, "folder")


def test_empty_file(tmp_path):
    (tmp_path / "m.onnx").touch()
    refused(tmp_path / "m.onnx", "empty")


@pytest.mark.parametrize("data", [b"hello world, this is no model", b"\x00" * 100, bytes(range(256)), b"PK\x03\x04zip"])
def test_not_a_protobuf(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    refused(tmp_path / "m.onnx")


def test_every_truncation(tmp_path):
    data = small_proto().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in [*range(1, 200), *range(200, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), values=st.binary(min_size=1, max_size=4), external=st.booleans())
def test_byte_mutations_load_or_raise_model_error(tmp_path, position, values, external):
    """Flip bytes anywhere in the structure of a model: load works, or raises ModelError."""
    path = write(small_proto(size=2), tmp_path / "m.onnx", external)
    data = bytearray(path.read_bytes())
    position %= len(data)
    data[position : position + len(values)] = values
    path.write_bytes(data)
    try:
        model = models.load(path)
    except ModelError as error:
        assert "\n" not in str(error)
        return
    models.save(model, tmp_path / "again.onnx")
    models.load(tmp_path / "again.onnx")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_random_bytes_raise_model_error(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    refused(tmp_path / "m.onnx")


# Each entry damages a valid model; the words must be in the error.


def cycle(proto: Proto) -> None:
    proto.graph.node[0].input[0] = "r"


def self_loop(proto: Proto) -> None:
    proto.graph.node[1].input[0] = "r"


def dangling_input(proto: Proto) -> None:
    proto.graph.node[1].input[0] = "nowhere"


def dangling_output(proto: Proto) -> None:
    proto.graph.output[0].name = "nowhere"


def defined_twice(proto: Proto) -> None:
    proto.graph.node[1].output[0] = "h"


def shadows_an_initializer(proto: Proto) -> None:
    proto.graph.node[0].output[0] = "v"


def initializer_twice(proto: Proto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def input_twice(proto: Proto) -> None:
    proto.graph.input.append(proto.graph.input[0])


def nameless_initializer(proto: Proto) -> None:
    proto.graph.initializer[0].name = ""


def no_opset(proto: Proto) -> None:
    del proto.opset_import[:]


def no_default_opset(proto: Proto) -> None:
    proto.opset_import[0].domain = "com.example"


def opset_too_old(proto: Proto) -> None:
    proto.opset_import[0].version = 6


def opset_too_new(proto: Proto) -> None:
    proto.opset_import[0].version = 999


def opsets_disagree(proto: Proto) -> None:
    proto.opset_import.append(helper.make_opsetid("", 14))


def ir_too_new(proto: Proto) -> None:
    proto.ir_version = 999


def ir_missing(proto: Proto) -> None:
    proto.ClearField("ir_version")


def no_graph(proto: Proto) -> None:
    proto.ClearField("graph")


def unknown_domain(proto: Proto) -> None:
    proto.graph.node[1].domain = "com.example"


def no_operator(proto: Proto) -> None:
    proto.graph.node[1].op_type = ""


def negative_dim(proto: Proto) -> None:
    proto.graph.initializer[0].dims[0] = -4


def oversized_dims(proto: Proto) -> None:
    proto.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]


def wrapping_dims(proto: Proto) -> None:
    """2**32 * 2**32 elements wrap to 0 in 64-bit arithmetic, and 0 bytes is what the file holds."""
    proto.graph.initializer[0].dims[:] = [1 << 32, 1 << 32]
    proto.graph.initializer[0].raw_data = b""


def too_few_bytes(proto: Proto) -> None:
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]


def too_many_bytes(proto: Proto) -> None:
    proto.graph.initializer[0].raw_data += b"\0\0\0\0"


def no_data(proto: Proto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")


def unknown_dtype(proto: Proto) -> None:
    proto.graph.initializer[0].data_type = 99


def undefined_dtype(proto: Proto) -> None:
    proto.graph.initializer[0].data_type = 0


def wrong_dtype(proto: Proto) -> None:
    proto.graph.initializer[0].data_type = TensorProto.INT32


def dtype_without_kernel(proto: Proto) -> None:
    proto.graph.initializer[0].data_type = TensorProto.UINT8
    proto.graph.initializer[0].dims[:] = [4, 1600]


def input_contradicts_initializer(proto: Proto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.DOUBLE, [4, 400]))


def nan_weights(proto: Proto) -> None:
    array = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array[1, 7] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))


def nan_in_a_constant(proto: Proto) -> None:
    tensor = onnx.numpy_helper.from_array(np.array([np.nan], np.float32))
    proto.graph.node.append(helper.make_node("Constant", [], ["unused"], name="sick", value=tensor))


def wrong_attribute_type(proto: Proto) -> None:
    proto.graph.node[1].CopyFrom(helper.make_node("Softmax", ["h"], ["r"], name="soft", axis=1.5))


def attribute_value_in_wrong_field(proto: Proto) -> None:
    proto.graph.node[1].CopyFrom(helper.make_node("Softmax", ["h"], ["r"], name="soft", axis=1))
    proto.graph.node[1].attribute[0].type = onnx.AttributeProto.STRING


def missing_attribute(proto: Proto) -> None:
    proto.graph.node[1].CopyFrom(helper.make_node("Cast", ["h"], ["r"], name="cast"))


def too_many_inputs(proto: Proto) -> None:
    proto.graph.node[1].input.append("x")


def too_few_inputs(proto: Proto) -> None:
    del proto.graph.node[0].input[1]


def sparse_weights(proto: Proto) -> None:
    proto.graph.sparse_initializer.add().values.name = "thin"


def negative_input_dim(proto: Proto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -3


DAMAGES: list[tuple[Callable[[Proto], None], tuple[str, ...]]] = [
    (cycle, ("cycle", "first", "act")),
    (self_loop, ("cycle", "act")),
    (dangling_input, ("act", "'nowhere'", "nothing defines")),
    (dangling_output, ("nowhere", "produces")),
    (defined_twice, ("act", "'h'", "already defined")),
    (shadows_an_initializer, ("first", "'v'", "already defined")),
    (initializer_twice, ("initialiser w", "two")),
    (input_twice, ("input x", "two")),
    (nameless_initializer, ("no name",)),
    (no_opset, ("no opset",)),
    (no_default_opset, ("first", "ai.onnx", "imports")),
    (opset_too_old, ("opset 6", "7 to")),
    (opset_too_new, ("opset 999", "7 to")),
    (opsets_disagree, ("twice", "13", "14")),
    (ir_too_new, ("IR version 999",)),
    (ir_missing, ("IR version 0",)),
    (no_graph, ("no graph",)),
    (unknown_domain, ("act", "com.example")),
    (no_operator, ("act", "no operator")),
    (negative_dim, ("initialiser w", "negative")),
    (oversized_dims, ("initialiser w", "more than any machine")),
    (wrapping_dims, ("initialiser w", "more than any machine")),
    (too_few_bytes, ("initialiser w", "6400", "6396")),
    (too_many_bytes, ("initialiser w", "6400", "6404")),
    (no_data, ("initialiser w", "holds 0")),
    (unknown_dtype, ("initialiser w", "99")),
    (undefined_dtype, ("initialiser w", "data type")),
    (wrong_dtype, ("first", "'w'", "int32")),
    (dtype_without_kernel, ("first", "'w'", "uint8")),
    (input_contradicts_initializer, ("initialiser w", "DOUBLE", "FLOAT")),
    (nan_weights, ("tensor w", "NaN")),
    (nan_in_a_constant, ("sick.value", "NaN")),
    (wrong_attribute_type, ("soft", "axis", "FLOAT", "INT")),
    (attribute_value_in_wrong_field, ("soft", "axis", "STRING")),
    (missing_attribute, ("cast", "to", "missing")),
    (too_many_inputs, ("act", "2 inputs")),
    (too_few_inputs, ("first", "1 inputs")),
    (sparse_weights, ("thin", "sparse")),
    (negative_input_dim, ("tensor x", "-3")),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda entry: getattr(entry, "__name__", ""))
def test_damaged_model(tmp_path, damage, words):
    proto = small_proto()
    damage(proto)
    refused(write(proto, tmp_path / "m.onnx"), *words)


def test_cycle_through_a_subgraph(tmp_path):
    """A branch that captures what the If itself feeds."""
    body = helper.make_graph(
        [helper.make_node("Relu", ["after"], ["t"])], "then", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"])], "else", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], name="choice", then_branch=body, else_branch=other),
            helper.make_node("Relu", ["y"], ["after"], name="later"),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, [1]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("after", 1, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    refused(write(proto, tmp_path / "m.onnx"), "cycle", "choice", "later")


@pytest.mark.parametrize("levels", [20, 60, 20_000])
def test_deeply_nested_graphs(tmp_path, levels):
    graph = b""
    for _ in range(levels):
        attribute = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH).SerializeToString()
        attribute += prefix(onnx.AttributeProto.G_FIELD_NUMBER, len(graph)) + graph
        node = onnx.NodeProto(op_type="If", input=["c"], output=["o"]).SerializeToString()
        node += prefix(onnx.NodeProto.ATTRIBUTE_FIELD_NUMBER, len(attribute)) + attribute
        graph = prefix(onnx.GraphProto.NODE_FIELD_NUMBER, len(node)) + node
    head = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 13)]).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(head + prefix(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph)) + graph)
    refused(tmp_path / "m.onnx")


def test_names_with_control_characters_do_not_break_the_line(tmp_path):
    proto = small_proto()
    proto.graph.node[1].name = "\x1b[31mred\nline\r" + "x" * 5000
    proto.graph.node[1].input[0] = "no\nwhere"
    error = refused(write(proto, tmp_path / "m.onnx"), "red", "nothing defines")
    assert str(error).isprintable()
    assert len(str(error)) < 1000


def external_model(folder: Path, **entries: str) -> Path:
    """A model whose weight w (6400 bytes) is external as the entries say; weights.bin holds the right data."""
    proto = small_proto()
    tensor = proto.graph.initializer[0]
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "weights.bin"} | entries).items():
        tensor.external_data.add(key=key, value=value)
    return write(proto, folder / "m.onnx")


def test_external_data_beside_the_model_loads(tmp_path):
    model = models.load(external_model(tmp_path, offset="0", length="6400"))
    assert model.graph.initializers["w"].const_value.numpy().shape == (4, 400)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "../weights.bin"}, ("leaves the model's folder",)),
        ({"location": "sub/../../weights.bin"}, ("leaves the model's folder",)),
        ({"location": "..\\weights.bin"}, ("leaves the model's folder",)),
        ({"location": "/etc/passwd"}, ("absolute",)),
        ({"location": "C:\\weights.bin"}, ("absolute",)),
        ({"location": ""}, ("no usable file name",)),
        ({"location": "a\0b"}, ("no usable file name",)),
        ({"location": "missing.bin"}, ("missing",)),
        ({"location": "x" * 5000}, ("external data",)),
        ({"location": "."}, ("not a regular file",)),
        ({"length": "6404"}, ("6404", "6400")),
        ({"length": "8"}, ("8", "6400")),
        ({"offset": "4"}, ("6404", "6400", "weights.bin")),
        ({"offset": "99999999999999999999999999"}, ("weights.bin",)),
        ({"offset": "-4"}, ("offset", "-4")),
        ({"length": "many"}, ("length", "many")),
    ],
)
def test_external_data_is_refused(tmp_path, entries, words):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(b"\0" * 6400)
    refused(external_model(folder, **entries), "initialiser w", *words)


def test_external_data_shorter_than_declared(tmp_path):
    path = external_model(tmp_path)
    os.truncate(tmp_path / "weights.bin", 6000)
    refused(path, "initialiser w", "6400", "6000", "weights.bin")


def test_symbolic_link_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = external_model(folder)
    (folder / "weights.bin").rename(tmp_path / "secret.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    refused(path, "initialiser w", "symbolic link")
    # A linked folder is no way out either, and a link inside the folder is none.
    (folder / "weights.bin").unlink()
    (folder / "door").symlink_to(tmp_path)
    refused(external_model(folder, location="door/secret.bin"), "initialiser w", "symbolic link")
    (folder / "inside.bin").symlink_to(folder / "weights.bin")
    models.load(external_model(folder, location="inside.bin"))


def test_external_nan(tmp_path):
    path = external_model(tmp_path)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[400:404] = np.float32(np.nan).tobytes()
    (tmp_path / "weights.bin").write_bytes(data)
    refused(path, "tensor w", "NaN")
    assert models.load(path, check_weights=False) is not None


def test_infinity_is_a_value(tmp_path):
    proto = small_proto()
    array = np.full((4, 400), -np.inf, np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    models.load(write(proto, tmp_path / "m.onnx"))


def test_zero_sized_tensors_are_valid(tmp_path):
    proto = small_proto()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"))
    proto.graph.node.append(helper.make_node("Identity", ["empty"], ["nothing"]))
    proto.graph.output.append(helper.make_tensor_value_info("nothing", TensorProto.FLOAT, [0, 3]))
    model = models.load(write(proto, tmp_path / "m.onnx"))
    for external in (False, True):
        models.save(model, tmp_path / "out.onnx", external=external)
        assert models.load(tmp_path / "out.onnx").graph.initializers["empty"].const_value.shape == (0, 3)


def test_zero_sized_external_tensor(tmp_path):
    path = external_model(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].dims[:] = [4, 0]
    (tmp_path / "weights.bin").write_bytes(b"")
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.zeros((0, 3), np.float32), "v"))
    model = models.load(write(proto, path))
    assert model.graph.initializers["w"].const_value.numpy().shape == (4, 0)
