"""Loading, checking and saving of models that are in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from model_files import small_proto, write
from onnx import TensorProto, helper

from graphopt import model as models
from graphopt.errors import GraphoptError, UsageError
from graphopt.executor import Session
from graphopt.files import writer as model_writer
from graphopt.files.weights import FileMap, MappedTensor, chunks, contains_nan

NAMES = [
    "basic_pitch", "dnsmos_sig_bak_ovr", "dtln_1", "gtcrn", "magika_v3_3", "minilm_l6", "ppocr_cls", "resnet20_cifar10",
    "resnet56_cifar10", "silero_vad_v5_if", "stories260k", "stories260k_kv", "ultraface_rfb320", "yunet_n_dynamic",
]  # fmt: skip


def outputs(model: ir.Model | Path, rows: int = 3) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((rows, 4)).astype(np.float32)
    with Session(model) as session:
        return session.run({"x": x})["y"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("ir_version", [3, 8, 10])
@pytest.mark.parametrize("opset", [7, 13, 21])
@pytest.mark.parametrize("external", [False, True])
def test_round_trip_keeps_function_names_and_versions(tmp_path, ir_version, opset, external):
    proto = small_proto(ir_version, opset)
    source = write(proto, tmp_path / "in.onnx")
    model = models.load(source)
    models.save(model, tmp_path / "out.onnx", external=external)
    assert (tmp_path / "out.onnx.data").exists() == external
    again = onnx.load(tmp_path / "out.onnx")
    assert again.ir_version == ir_version
    assert again.opset_import[0].version == opset
    assert again.producer_name == "the tests"
    assert again.metadata_props[0].value == "Apache-2.0"
    assert again.graph.doc_string == "a small graph"
    assert [n.name for n in again.graph.node] == ["first", "act", "second"]
    assert again.graph.node[0].doc_string == "the first layer"
    assert [i.name for i in again.graph.input] == [i.name for i in proto.graph.input]
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    np.testing.assert_array_equal(outputs(tmp_path / "out.onnx"), outputs(source))


def test_inline_file_is_what_protobuf_itself_writes(tmp_path):
    proto = small_proto()
    models.save(models.load(write(proto, tmp_path / "in.onnx")), tmp_path / "out.onnx")
    # No shape is added that inference finds in the file.
    assert onnx.load(tmp_path / "out.onnx") == proto
    assert (tmp_path / "out.onnx").read_bytes() == proto.SerializeToString(deterministic=True)


def test_external_weights_are_mapped_not_read(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "in.onnx", external=True))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    assert not tensor.numpy().flags.owndata
    assert not tensor.numpy().flags.writeable


def test_a_model_that_came_with_external_data_is_saved_with_it(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "in.onnx", external=True))
    folder = tmp_path / "out"
    folder.mkdir()
    models.save(model, folder / "m.onnx")
    assert sorted(contents(folder)) == ["m.onnx", "m.onnx.data"]
    models.save(model, folder / "inline.onnx", external=False)
    assert "inline.onnx.data" not in contents(folder)
    np.testing.assert_array_equal(outputs(folder / "inline.onnx"), outputs(folder / "m.onnx"))


def test_too_many_weights_for_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(model_writer, "INLINE_LIMIT", 100)
    models.save(models.load(write(small_proto(), tmp_path / "in.onnx")), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    np.testing.assert_array_equal(outputs(tmp_path / "out.onnx"), outputs(tmp_path / "in.onnx"))


@pytest.mark.parametrize("external", [False, True])
def test_saving_over_the_input_is_safe_and_the_model_lives_on(tmp_path, external):
    path = write(small_proto(), tmp_path / "m.onnx")
    expected = outputs(path)
    models.save(models.load(path), path, external=external)
    model = models.load(path)
    first = contents(tmp_path)
    models.save(model, path)
    assert contents(tmp_path) == first
    # Still readable in memory although its files were replaced under it.
    np.testing.assert_array_equal(outputs(model), expected)
    model.graph.node("act").op_type = "Neg"
    models.save(model, path)
    assert not np.array_equal(outputs(path), expected)


def test_saving_over_external_data_of_another_layout_is_safe(tmp_path):
    """The data file of the input is the data file of the output, with the tensors at other offsets."""
    path = tmp_path / "m.onnx"
    proto = small_proto()
    onnx.save(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    expected = outputs(path)
    model = models.load(path)
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in reversed(values):
        model.graph.initializers[value.name] = value
    models.save(model, path)
    np.testing.assert_array_equal(outputs(path), expected)


@pytest.mark.parametrize("external", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch, external):
    path = write(small_proto(), tmp_path / "m.onnx")
    model = models.load(path)
    before = contents(tmp_path)

    def full(_tensor, _size=0):
        yield memoryview(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_writer, "chunks", full)
    with pytest.raises(GraphoptError, match="No space left on device"):
        models.save(model, path, external=external)
    with pytest.raises(GraphoptError):
        models.save(model, tmp_path / "other.onnx", external=external)
    assert contents(tmp_path) == before


def test_save_refuses_a_folder_and_a_missing_folder(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "m.onnx"))
    with pytest.raises(UsageError, match="folder"):
        models.save(model, tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        models.save(model, tmp_path / "missing" / "m.onnx")


@pytest.mark.parametrize("external", [False, True])
def test_bytes_do_not_depend_on_the_hash_seed(tmp_path, external):
    write(small_proto(), tmp_path / "in.onnx")
    results = []
    for seed in ("0", "1", "12345"):
        folder = tmp_path / seed
        folder.mkdir()
        code = (
            f"from graphopt.model import load, save; save(load({str(tmp_path / 'in.onnx')!r}), "
            f"{str(folder / 'm.onnx')!r}, external={external})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin"})
        results.append(contents(folder))
    assert results[0] == results[1] == results[2]


def test_stale_value_info_is_dropped_and_inferred_again(tmp_path):
    proto = small_proto()
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.INT64, [7, 7, 7]))
    model = models.load(write(proto, tmp_path / "m.onnx"))
    hidden = model.graph.node("first").outputs[0]
    assert hidden.dtype == ir.DataType.FLOAT
    assert str(hidden.shape) == "[batch,400]"
    models.save(model, tmp_path / "out.onnx")
    # What is stored is never what was read, and nothing that readers infer.
    stored = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out.onnx")).graph.value_info
    assert [v for v in onnx.load(tmp_path / "out.onnx").graph.value_info if v.name == "h"] == []
    (stored,) = [v for v in stored if v.name == "h"]
    assert stored.type.tensor_type.elem_type == TensorProto.FLOAT
    dims = stored.type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value) == ("batch", 400)


def test_shape_inference_knows_values_and_leaves_weights_alone(tmp_path, monkeypatch):
    """Shapes that are computed from constants are found, and no large tensor is serialised on the way."""
    proto = small_proto(size=4000)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 2, 2000]), "target"))
    proto.graph.node[1].CopyFrom(helper.make_node("Reshape", ["h", "target"], ["wide"], name="fold"))
    proto.graph.node.insert(2, helper.make_node("Reshape", ["wide", "back"], ["r"], name="unfold"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 4000]), "back"))
    model = models.load(write(proto, tmp_path / "m.onnx"))
    assert model.graph.node("fold").outputs[0].shape[1:] == (2, 2000)
    tensor = model.graph.initializers["w"].const_value
    seen = []
    monkeypatch.setattr(type(tensor), "tobytes", lambda self: seen.append(self.name) or b"")
    models.infer_shapes(model)
    assert seen == []
    assert model.graph.initializers["w"].const_value is tensor


def test_shapes_inside_subgraphs_and_behind_custom_operators(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones(4, np.float32), "one")],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], name="choice", then_branch=body, else_branch=other),
            helper.make_node("Mystery", ["y"], ["z"], name="mystery", domain="com.example"),
            helper.make_node("Relu", ["z"], ["o"], name="after"),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("com.example", 1)]
    model = models.load(write(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx"))
    choice = model.graph.node("choice")
    assert str(choice.attributes["then_branch"].as_graph().outputs[0].shape) == "[batch,4]"
    assert str(choice.outputs[0].shape) == "[batch,4]"
    assert model.graph.node("mystery").outputs[0].shape is None
    models.save(model, tmp_path / "again.onnx")
    assert len(models.load(tmp_path / "again.onnx").graph) == 3


def test_unsorted_nodes_are_sorted(tmp_path):
    proto = small_proto()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([nodes[2], nodes[0], nodes[1]])
    model = models.load(write(proto, tmp_path / "m.onnx"))
    assert [node.name for node in model.graph] == ["first", "act", "second"]


def test_fix_dims(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "m.onnx"))
    models.fix_dims(model, {"batch": 5})
    assert model.graph.inputs[0].shape == (5, 4)
    assert model.graph.node("first").outputs[0].shape == (5, 400)
    assert model.graph.outputs[0].shape == (5, 3)
    with pytest.raises(UsageError, match="none that is named"):
        models.fix_dims(model, {"batch": 5})


def test_fix_dims_names_the_dimensions_there_are(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "m.onnx"))
    with pytest.raises(UsageError, match=r"dimension bach: .* it has batch"):
        models.fix_dims(model, {"bach": 1})
    with pytest.raises(UsageError, match="not a positive"):
        models.fix_dims(model, {"batch": 0})


def test_weight_bytes_counts_shared_tensors_once(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "m.onnx"))
    assert models.weight_bytes(model) == (4 * 400 + 400 * 3) * 4
    twin = ir.Value(name="twin", const_value=model.graph.initializers["w"].const_value)
    model.graph.register_initializer(twin)
    assert models.weight_bytes(model) == (4 * 400 + 400 * 3) * 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_, np.uint8])
@pytest.mark.parametrize("offset", [0, 64, 3])
def test_mapped_tensor_reads_what_was_written(tmp_path, dtype, offset):
    array = (np.arange(6) % 2).astype(dtype).reshape(2, 3)
    (tmp_path / "w.bin").write_bytes(b"\7" * offset + array.tobytes() + b"tail")
    source = ir.ExternalTensor(
        "w.bin", offset, array.nbytes, ir.DataType.from_numpy(array.dtype), shape=ir.Shape([2, 3]), name="w"
    )
    tensor = MappedTensor(source, FileMap(tmp_path / "w.bin"))
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.numpy().flags.aligned
    assert tensor.tobytes() == array.tobytes()
    assert b"".join(chunks(tensor, 5)) == array.tobytes()
    tensor.release()
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_packed_four_bit_weights(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes([0x21, 0x43]))
    source = ir.ExternalTensor("w.bin", 0, 2, ir.DataType.UINT4, shape=ir.Shape([4]), name="w")
    assert MappedTensor(source, FileMap(tmp_path / "w.bin")).numpy().astype(int).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn"])
def test_contains_nan(dtype):
    import ml_dtypes  # noqa: F401 - registers the narrow dtypes

    healthy = np.array([1.0, -2.0, 0.0]).astype(dtype)
    sick = np.array([1.0, np.nan, 0.0]).astype(dtype)
    assert not contains_nan(ir.tensor(healthy))
    assert contains_nan(ir.tensor(sick))


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_shared_models_survive_a_round_trip(data_dir, tmp_path, name):
    """Load, check, save in both forms, reload: the same outputs on real (or plausible) inputs, bit by bit."""
    from graphopt.data.random_feeds import random_feeds

    source = data_dir / "models" / f"{name}.onnx"
    model = models.load(source)
    models.check(model)
    feeds = first_sample(data_dir / "inputs" / f"{name}.npz") or random_feeds(model, 0, 1)[0]
    with Session(source) as session:
        expected = session.run(feeds)
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        models.save(model, path, external=external)
        with Session(path) as session:
            found = session.run(feeds)
        assert list(found) == list(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
    assert models.weight_bytes(models.load(path)) == models.weight_bytes(model)


def first_sample(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    with np.load(path) as arrays:
        first = arrays.files[0].split("|")[0]
        feeds = {key.split("|", 1)[1]: arrays[key] for key in arrays.files if key.split("|")[0] == first}
    return feeds if "|" in arrays.files[0] else None
