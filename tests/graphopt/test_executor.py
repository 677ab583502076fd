"""Sessions: feeds, taps, weights that are shared, errors that name the node."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from model_files import small_proto, write
from onnx import TensorProto, helper

from graphopt import model as models
from graphopt.errors import DataError, MissingBackendError, ModelError, UsageError
from graphopt.executor import Session
from graphopt.files import writer as model_writer

X = np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)


def expected() -> dict[str, np.ndarray]:
    w, v = (onnx.numpy_helper.to_array(t) for t in small_proto().graph.initializer)
    return {"h": X @ w, "y": np.maximum(X @ w, 0) @ v}


def one_node(op: str, domain: str = "", **attributes) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], name="the_node", domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 13)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("ir_version", [3, 8])
def test_runs_what_numpy_computes(tmp_path, external, in_memory, optimize, low_memory, ir_version):
    path = write(small_proto(ir_version), tmp_path / "m.onnx", external)
    with Session(models.load(path) if in_memory else path, optimize=optimize, low_memory=low_memory) as session:
        assert session.output_names == ["y"]
        (spec,) = session.inputs
        assert (spec.name, spec.dtype, spec.shape) == ("x", np.float32, ("batch", 4))
        np.testing.assert_allclose(session.run({"x": X})["y"], expected()["y"], rtol=1e-4, atol=1e-4)


def test_an_initialiser_that_nothing_reads(tmp_path):
    model = models.load(write(small_proto(), tmp_path / "m.onnx"))
    spare = ir.tensor(np.zeros(4000, np.float32), name="spare")
    model.graph.register_initializer(ir.Value(name="spare", const_value=spare))
    with Session(model) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], expected()["y"], rtol=1e-4, atol=1e-4)
    assert "spare" in model.graph.initializers


@pytest.mark.parametrize("in_memory", [False, True])
def test_taps(tmp_path, in_memory):
    path = write(small_proto(), tmp_path / "m.onnx")
    with Session(models.load(path) if in_memory else path, outputs=["h", "w", "y", "h"]) as session:
        result = session.run({"x": X})
    assert list(result) == ["h", "w", "y"]
    np.testing.assert_allclose(result["h"], expected()["h"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result["w"], onnx.numpy_helper.to_array(small_proto().graph.initializer[0]))


def test_tap_of_an_unknown_tensor(tmp_path):
    with pytest.raises(UsageError, match="tensor nowhere"):
        Session(models.load(write(small_proto(), tmp_path / "m.onnx")), outputs=["nowhere"])


def test_the_model_is_not_changed_and_its_weights_are_not_serialised(tmp_path, monkeypatch):
    model = models.load(write(small_proto(), tmp_path / "m.onnx", external=True))
    before = ir.to_proto(model)
    tensor = model.graph.initializers["w"].const_value
    monkeypatch.setattr(type(tensor), "tobytes", lambda self: pytest.fail(f"{self.name} was serialised"))
    with Session(model, outputs=["h"]) as session:
        session.run({"x": X})
    assert ir.to_proto(model) == before
    assert model.graph.initializers["w"].const_value is tensor


def test_weights_without_a_numpy_type_go_through_files_when_they_are_many(tmp_path, monkeypatch):
    """bfloat16 weights cannot be shared from numpy."""
    import ml_dtypes

    proto = small_proto()
    w = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    narrow = ir.to_proto(ir.tensor(w.astype(ml_dtypes.bfloat16), name="narrow"))
    proto.graph.initializer[0].CopyFrom(narrow)
    proto.graph.node.insert(0, helper.make_node("Cast", ["narrow"], ["w"], to=TensorProto.FLOAT))
    model = models.load(write(proto, tmp_path / "m.onnx"))
    with Session(model) as session:
        inline = session.run({"x": X})["y"]
    monkeypatch.setattr(model_writer, "INLINE_LIMIT", 10)
    with Session(model) as session:
        folder = session._folder.name
        np.testing.assert_array_equal(session.run({"x": X})["y"], inline)
    import pathlib

    assert not pathlib.Path(folder).exists()


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"input x: the data has no array for it"),
        ({"x": X, "z": X}, r"array z: the model has no such input; its inputs are x; leave it out"),
        (
            {"x": X.astype(np.float64)},
            r"input x: it is float64, the model takes float32; store it as .astype\('float32'\) gives it",
        ),
        ({"x": X[0]}, r"input x: its shape is \[4\], the model takes \[batch, 4\]"),
        ({"x": X[:, :3]}, r"input x: its shape is \[3, 3\], the model takes \[batch, 4\]"),
    ],
)
def test_feeds_that_do_not_fit(tmp_path, feeds, message):
    with Session(write(small_proto(), tmp_path / "m.onnx")) as session, pytest.raises(DataError, match=message):
        session.run(feeds)


def test_initialisers_that_are_inputs_may_be_overridden_and_are_checked(tmp_path):
    proto = small_proto(ir_version=3)
    proto.ir_version = 8  # before version 4, the runtime takes every initialiser for a constant
    with Session(write(proto, tmp_path / "m.onnx")) as session:
        assert [spec.name for spec in session.inputs] == ["x"]
        zero = np.zeros((400, 3), np.float32)
        np.testing.assert_array_equal(session.run({"x": X, "v": zero})["y"], np.zeros((3, 3)))
        with pytest.raises(DataError, match="input v"):
            session.run({"x": X, "v": zero.astype(np.int64)})


@pytest.mark.parametrize(("op", "domain"), [("Mystery", "com.example"), ("Mystery", "com.microsoft"), ("Mystery", "")])
def test_a_missing_operator_is_named(op, domain):
    with pytest.raises(MissingBackendError, match="Mystery") as caught:
        Session(one_node(op, domain))
    assert "\n" not in str(caught.value)


def test_a_missing_kernel_names_the_node():
    model = one_node("Relu")
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    with pytest.raises((MissingBackendError, ModelError), match="the_node"):
        Session(model)


def test_a_missing_provider():
    with pytest.raises(MissingBackendError, match="NoSuchProvider"):
        Session(one_node("Relu"), providers=["NoSuchProvider"])


def test_a_failing_node_is_named_without_the_runtimes_source_locations(tmp_path):
    proto = small_proto()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, -1]), "target"))
    proto.graph.node[1].CopyFrom(helper.make_node("Reshape", ["h", "target"], ["r"], name="bad_reshape"))
    session = Session(models.load(write(proto, tmp_path / "m.onnx")))
    with pytest.raises(ModelError, match=r"node bad_reshape \(Reshape\)") as caught:
        session.run({"x": X})
    text = str(caught.value)
    assert "\n" not in text
    assert "onnxruntime" not in text
    assert "Status" not in text


def test_the_innermost_node_is_named():
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running If node. Name:'outer' "
        "Status Message: Non-zero status code returned while running Pad node. Name:'inner' Status Message: too far"
    )
    from graphopt.executor import explain

    assert str(explain(Exception(text), "it failed")) == "node inner (Pad): it failed (too far)"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        Session(tmp_path / "none.onnx")


def test_strings(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"])],
        "g",
        [helper.make_tensor_value_info("s", TensorProto.STRING, [2])],
        [helper.make_tensor_value_info("t", TensorProto.STRING, [2])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with Session(models.load(write(proto, tmp_path / "m.onnx"))) as session:
        assert session.run({"s": np.array(["a", "bc"])})["t"].tolist() == ["a", "bc"]
