"""Compressed files: any runtime runs them and gets the same bits, and loading brings back the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from sparse_files import keep_n_of_m, scattered, sparse_network
from text_graph import graph

from graphopt.files.compression import storage_of
from graphopt.model import load, save

X = np.random.default_rng(1).normal(size=(2, 32, 9, 9)).astype(np.float32)
FAST = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
PLAIN = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def run(path: Path, feeds: dict[str, Any], level: Any = PLAIN) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level, options.intra_op_num_threads = 3, level, 1
    found: list[Any] = ort.InferenceSession(str(path), options).run(None, feeds)
    return found


def operators(path: Path) -> list[str]:
    """What ONNX Runtime runs after it has loaded a file."""
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".seen"))
    ort.InferenceSession(str(path), options)
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
def test_the_runtime_unpacks_and_folds_the_weights(tmp_path: Path, opset: int, external: bool) -> None:
    model = sparse_network(opset)
    full, small = tmp_path / "full.onnx", tmp_path / "small.onnx"
    save(model, full, external=external)
    storage = save(model, small, external=external, compress=True)
    assert storage is not None
    assert [(t.name, t.form) for t in storage.tensors] == [
        ("k", "2:4 along axis 1"),
        ("w1", "2:4 along axis 1"),
        ("w2", "mask"),
        ("w3", "1:4 along axis 0"),
    ][: len(storage.tensors)]
    assert {t.name for t in storage.tensors} >= {"k", "w1", "w2"}
    assert np.array_equal(run(full, {"x": X}, FAST), run(small, {"x": X}, FAST))
    # Unfolded, the runtime takes other kernels for weights that it takes for computed.
    assert np.allclose(run(full, {"x": X}), run(small, {"x": X}), rtol=1e-4, atol=1e-4)
    assert operators(small) == operators(full)


def test_another_runtime_unpacks_them_too(tmp_path: Path) -> None:
    save(sparse_network(), tmp_path / "m.onnx", compress=True)
    save(sparse_network(), tmp_path / "full.onnx")
    found, expected = (ReferenceEvaluator(str(tmp_path / n)).run(None, {"x": X}) for n in ("m.onnx", "full.onnx"))
    assert np.allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
@pytest.mark.parametrize("ir_version", [7, 8, 10])
def test_loading_brings_the_same_model_back(tmp_path: Path, suffix: str, ir_version: int) -> None:
    model = sparse_network()
    model.ir_version = ir_version
    model.graph.initializers["k"].const_value.metadata_props["made by"] = "us"  # type: ignore[union-attr]
    full, small, again = (tmp_path / f"{name}{suffix}" for name in ("full", "small", "again"))
    save(model, full)
    save(model, small, compress=True)
    assert small.stat().st_size < 0.6 * full.stat().st_size
    back = load(small)
    assert list(back.graph.initializers) == list(model.graph.initializers)
    save(back, again)
    assert again.read_bytes() == full.read_bytes()
    save(back, again, compress=True)
    assert again.read_bytes() == small.read_bytes()
    assert back.ir_version == ir_version


def test_what_was_compressed_is_known_after_loading(tmp_path: Path) -> None:
    model = sparse_network()
    written = save(model, tmp_path / "m.onnx", compress=True)
    found = storage_of(load(tmp_path / "m.onnx"))
    assert found is not None
    assert written is not None
    assert (found.before, found.after, found.tensors) == (written.before, written.after, written.tensors)
    assert found.tensors[0].before == 62 * 32 * 9 * 4
    assert found.tensors[0].share == 0.5 + 1 / 32
    assert found.tensors[0].share_of_float16 == 2 * found.tensors[0].share
    save(model, tmp_path / "full.onnx")
    assert storage_of(load(tmp_path / "full.onnx")) is None


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = sparse_network()
    save(model, tmp_path / "before.onnx")
    save(model, tmp_path / "m.onnx", compress=True)
    save(model, tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_saving_over_the_file_it_came_from(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    save(sparse_network(), path)
    first = path.read_bytes()
    save(load(path), path, compress=True)
    assert path.stat().st_size < len(first)
    save(load(path), path)
    assert path.read_bytes() == first


DTYPES = ["float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bfloat16"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(96, 130), (130, 96), (33, 34, 3, 3), (40, 37, 3), (4000,), (5, 7, 11, 13)]),
    pattern=st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (2, 8), (1, 16), None]),
    axis=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    opset=st.sampled_from([13, 18, 21]),
)
def test_every_pattern_type_and_layout_in_the_runtime(tmp_path, shape, pattern, axis, dtype, opset):
    """The weight itself is what the model returns, so that every bit of it is compared."""
    axis %= len(shape)
    weight = scattered(shape, 0.3) if pattern is None else keep_n_of_m(shape, axis, *pattern)
    weight = np.where(np.abs(weight) > 2, np.float32(-0.0), weight * 100)
    array = weight.astype(ir.DataType[NAMES.get(dtype, dtype.upper())].numpy())
    size = ",".join(map(str, shape))
    kind = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    model = graph(f"({kind}[{size}] x) => (float[{size}] y, float[{size}] z)",
                  "y = Cast<to=1>(w)  z = Cast<to=1>(x)", opset=opset, w=array)  # fmt: skip
    model.ir_version = 10
    storage = save(model, tmp_path / "m.onnx", compress=True)
    save(model, tmp_path / "full.onnx")
    assert (tmp_path / "m.onnx").stat().st_size <= (tmp_path / "full.onnx").stat().st_size
    back = load(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert back is not None
    assert back.tobytes() == array.tobytes()
    if dtype != "bfloat16":  # numpy cannot hand it to the runtime
        feeds = {"x": np.zeros(shape, array.dtype)}
        for level in (PLAIN, FAST):
            found, expected = (run(tmp_path / name, feeds, level)[0] for name in ("m.onnx", "full.onnx"))
            assert found.tobytes() == expected.tobytes()
    assert storage is not None
    assert storage.after <= storage.before


NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}


def test_int8_weights_between_quantize_and_dequantize(tmp_path: Path) -> None:
    weight = np.clip(keep_n_of_m((256, 128), 0) * 40, -127, 127).round().astype(np.int8)
    model = graph(
        "(float[n,256] x) => (float[n,128] y)",
        "d = DequantizeLinear<axis=1>(w, s, z)  y = MatMul(x, d)",
        w=weight,
        s=np.full(128, 0.02, np.float32),
        z=np.zeros(128, np.int8),
    )
    storage = save(model, tmp_path / "m.onnx", compress=True)
    save(model, tmp_path / "full.onnx")
    assert storage is not None
    assert [t.share for t in storage.tensors] == [0.5 + 1 / 8]
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    assert np.array_equal(run(tmp_path / "m.onnx", {"x": x}, FAST), run(tmp_path / "full.onnx", {"x": x}, FAST))
    assert operators(tmp_path / "m.onnx") == operators(tmp_path / "full.onnx")


def test_what_is_left_alone_and_why(tmp_path: Path) -> None:
    model = graph(
        "(float[n,64] x, bool c) => (float[n,64] y, float[64,64] out)",
        """a = MatMul(x, dense)  b = MatMul(a, fed)  d = MatMul(b, twice)  e = MatMul(d, twice)  f = MatMul(e, out)
        y = MatMul(f, tiny)""",
        dense=(64, 64),
        fed=keep_n_of_m((64, 64), 0),
        twice=keep_n_of_m((64, 64), 0, seed=1),
        tiny=keep_n_of_m((64, 16), 0)[:, :1] * np.ones((1, 64), np.float32)[:, :1] + np.zeros((64, 8), np.float32),
        out=keep_n_of_m((64, 64), 0, seed=2),
    )
    model.graph.inputs.append(model.graph.initializers["fed"])
    storage = save(model, tmp_path / "m.onnx", compress=True)
    assert storage is not None
    assert [t.name for t in storage.tensors] == ["twice"]
    assert storage.kept == {
        "too few of its elements are equal": 1,
        "callers may override it": 1,
        "it is small": 1,
        "it is an output": 1,
    }
    assert load(tmp_path / "m.onnx").graph.inputs[-1].name == "fed"


def test_weights_that_a_body_reads(tmp_path: Path) -> None:
    model = graph(
        "(float[n,64] x, bool c) => (float[n,64] y)",
        """y = If (c) <then_branch = yes () => (float[n,64] r) { r = MatMul (x, w) }, else_branch = no () => (float[n,64] s) { s = Relu (x) }>""",  # noqa: E501
        w=keep_n_of_m((64, 64), 0),
    )
    storage = save(model, tmp_path / "m.onnx", compress=True)
    save(model, tmp_path / "full.onnx")
    assert storage is not None
    assert [t.name for t in storage.tensors] == ["w"]
    for taken in (True, False):
        feeds = {"x": np.ones((3, 64), np.float32), "c": np.array(taken)}
        assert np.array_equal(run(tmp_path / "m.onnx", feeds, FAST), run(tmp_path / "full.onnx", feeds, FAST))
    save(load(tmp_path / "m.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "full.onnx").read_bytes()


@pytest.mark.parametrize("reason", ["opset", "no zeros"])
def test_where_nothing_is_compressed_the_file_is_the_same(tmp_path: Path, reason: str) -> None:
    if reason == "opset":
        model = graph("(float[n,64] x) => (float[n,64] y)", "y = MatMul(x, w)", opset=10, w=keep_n_of_m((64, 64), 0))
    else:
        model = graph("(float[n,64] x) => (float[n,64] y)", "y = MatMul(x, w)", w=(64, 64))
    storage = save(model, tmp_path / "m.onnx", compress=True)
    save(model, tmp_path / "full.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == (tmp_path / "full.onnx").read_bytes()
    assert storage is not None
    assert storage.tensors == []
    assert ("opset 10" if reason == "opset" else "enough equal elements") in storage.summary()
    assert storage.after == storage.before


def test_names_that_are_taken(tmp_path: Path) -> None:
    model = graph(
        "(float[n,64] x) => (float[n,64] y)",
        "w.values = MatMul(x, w)  y = MatMul(w.values, w.places)".replace(".", "_"),
        w=keep_n_of_m((64, 64), 0),
        w_places=keep_n_of_m((64, 64), 0),
    )
    for old, new in (("w_places", "w.places"), ("w_values", "w.values")):
        value = next(v for n in model.graph for v in (*n.inputs, *n.outputs) if v is not None and v.name == old)
        value.name = new
    save(model, tmp_path / "full.onnx")
    save(model, tmp_path / "m.onnx", compress=True)
    feeds = {"x": np.ones((1, 64), np.float32)}
    assert np.array_equal(run(tmp_path / "m.onnx", feeds, FAST), run(tmp_path / "full.onnx", feeds, FAST))
    save(load(tmp_path / "m.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "full.onnx").read_bytes()


@pytest.mark.data
def test_a_real_model(data_dir: Path, tmp_path: Path) -> None:
    from graphopt.api import optimize

    result = optimize(
        data_dir / "models" / "minilm_l6.onnx",
        "sparsify{method=magnitude}",
        verify_each="structure",
        units=False,
        bench=False,
    )
    full, small = tmp_path / "full.onnx", tmp_path / "small.onnx"
    save(result.model, full)
    storage = save(result.model, small, compress=True)
    assert storage is not None
    grouped = [t for t in storage.tensors if t.form.startswith("2:4")]
    assert len(grouped) >= 36
    assert all(t.share <= 0.5 + 1 / 32 for t in grouped)
    assert small.stat().st_size < full.stat().st_size
    assert abs(small.stat().st_size - full.stat().st_size + storage.before - storage.after) < 30_000
    ids = np.arange(1, 17, dtype=np.int64).reshape(2, 8)
    feeds = {i.name: ids if "ids" in i.name and "type" not in i.name else np.ones_like(ids) for i in
             ort.InferenceSession(str(full)).get_inputs()}  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(run(full, feeds, FAST), run(small, feeds, FAST), strict=True))
    assert operators(small) == operators(full)
    save(load(small), small)
    assert small.read_bytes() == full.read_bytes()
