"""Archives: a model in one `.safetensors` file, read back exactly, and readable for others as what it claims to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_files import sparse_network
from text_graph import graph

from graphopt.errors import ModelError
from graphopt.files.archive import GRAPH
from graphopt.model import load, save

HALF = np.linspace(-1, 1, 12).astype(np.float16).reshape(3, 4)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors, read as the format's own description says."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    model = graph(
        "(float[n,4] x) => (float[n,4] y, float16[3,4] z, float[2] u)",
        "y = MatMul(x, w)  z = Identity(half)  u = Cast<to=1>(odd)",
        w=(4, 4), half=HALF, odd=np.array([1.5, -2], ml_dtypes.bfloat16), opset=18,
    )  # fmt: skip
    save(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_the_format(archive: Path) -> None:
    header, body = split(archive.read_bytes())
    assert header.pop("__metadata__") == {"format": "onnx", "graphopt.archive": "1"}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != GRAPH} == {
        "w": ("F32", [4, 4]),
        "half": ("F16", [3, 4]),
        "odd": ("BF16", [2]),
    }
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end, "no gaps, in the order of the header"
        end = entry["data_offsets"][1]
        width = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[entry["dtype"]]
        assert (len(archive.read_bytes()) - len(body) + entry["data_offsets"][0]) % width == 0, "aligned"
    assert end == len(body)
    start, stop = header["half"]["data_offsets"]
    assert np.array_equal(np.frombuffer(body[start:stop], np.float16).reshape(3, 4), HALF)
    start, stop = header[GRAPH]["data_offsets"]
    proto = onnx.load_from_string(body[start:stop])
    assert [node.op_type for node in proto.graph.node] == ["MatMul", "Identity", "Cast"]
    assert all(not tensor.raw_data for tensor in proto.graph.initializer)


def test_it_comes_back(archive: Path, tmp_path: Path) -> None:
    back = load(archive)
    assert {name: value.const_value.tobytes() for name, value in back.graph.initializers.items()}["half"] == (  # type: ignore[union-attr]
        HALF.tobytes()
    )
    save(back, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == archive.read_bytes()
    save(back, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx.data").exists(), "an archive is one file, and so is what is made of it"
    save(load(tmp_path / "m.onnx"), archive)
    assert (tmp_path / "again.safetensors").read_bytes() == archive.read_bytes()


def test_under_another_name_and_through_a_link(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    archive.rename(tmp_path / "store" / "blob.safetensors")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "m.safetensors").symlink_to(tmp_path / "store" / "blob.safetensors")
    assert len(load(tmp_path / "linked" / "m.safetensors").graph.initializers) == 3


def test_what_the_format_cannot_hold_stays_in_the_graph(tmp_path: Path) -> None:
    model = graph(
        "(float[n,4] x) => (float[n,4] y, float[0] z)",
        "y = MatMul(x, w)  z = Identity(nothing)",
        w=(4, 4), nothing=np.zeros(0, np.float32),
    )  # fmt: skip
    model.graph.initializers["w"].name = GRAPH
    save(model, tmp_path / "m.safetensors")
    header, _ = split((tmp_path / "m.safetensors").read_bytes())
    assert header.keys() == {"__metadata__", GRAPH}
    assert load(tmp_path / "m.safetensors").graph.initializers.keys() == {GRAPH, "nothing"}


def test_weights_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(joined({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)))
    with pytest.raises(ModelError, match="holds weights, but no model"):
        load(path)


def _entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def damage(header: dict[str, Any]) -> None:
        header[name].update(fields)

    return damage


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    def damage(header: dict[str, Any]) -> None:
        del header[name]

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_entry("w", data_offsets=[0, 1 << 70]), "natural numbers"),
        (_entry("w", data_offsets=[64, 0]), "natural numbers"),
        (_entry("w", data_offsets=[0, 1 << 40], shape=[1 << 38]), "starts at byte"),
        (_entry("w", data_offsets=[8, 72]), "starts at byte"),
        (_entry("w", shape=[1 << 62, 1 << 62]), "does not take 64 bytes"),
        (_entry("w", shape=[-4, -4]), "natural numbers"),
        (_entry("w", shape=[4.0, 4]), "natural numbers"),
        (_entry("w", shape=[True, 16]), "natural numbers"),
        (_entry("w", shape=[2, 8]), ""),
        (_entry("w", dtype="F128"), "is unknown"),
        (_entry("w", dtype=["F32"]), "is unknown"),
        (_entry("w", dtype="I16"), "does not take"),
        (_entry("w", more=1), "three parts"),
        (_without("w"), "starts at byte"),
        (_without(GRAPH), "bytes, but it holds"),
        (_entry(GRAPH, shape=[7]), "does not take"),
    ],
)
def test_damaged_header(archive: Path, damage: Callable[[dict[str, Any]], None], words: str) -> None:
    header, body = split(archive.read_bytes())
    damage(header)
    archive.write_bytes(joined(header, body))
    if not words:  # the graph says what shape its weights have
        assert load(archive).graph.initializers["w"].shape == (4, 4)
        return
    with pytest.raises(ModelError) as caught:
        load(archive)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 63).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        joined(b"[]", b""),
        joined(b"null", b""),
        joined(b"{", b""),
        joined(b"\xff\xfe", b""),
        joined(b"[" * 100_000, b""),
        joined(b'{"a":' + b"9" * 5000 + b"}", b""),
        joined(b'{"w":1,"w":2}', b""),
        joined({"w": 1}, b""),
        joined({GRAPH: {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}, b"hello"),
        joined({GRAPH: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, b""),
    ],
)
def test_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


def test_a_graph_that_names_other_files(archive: Path) -> None:
    """Weights of an archive are in the archive; what its graph says about where they are is not believed."""
    header, body = split(archive.read_bytes())
    start, stop = header[GRAPH]["data_offsets"]
    proto = onnx.load_from_string(body[start:stop])
    for tensor in proto.graph.initializer:
        tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.initializer.add(name="stray", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    encoded = proto.SerializeToString()
    header[GRAPH].update(shape=[len(encoded)], data_offsets=[start, start + len(encoded)])
    archive.write_bytes(joined(header, body[:start] + encoded))
    with pytest.raises(ModelError, match="does not hold it"):
        load(archive)
    del proto.graph.initializer[-1]
    encoded = proto.SerializeToString()
    header[GRAPH].update(shape=[len(encoded)], data_offsets=[start, start + len(encoded)])
    archive.write_bytes(joined(header, body[:start] + encoded))
    assert load(archive).graph.initializers["half"].const_value.tobytes() == HALF.tobytes()  # type: ignore[union-attr]


def test_every_truncation(archive: Path) -> None:
    data = archive.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        archive.write_bytes(data[:length])
        with pytest.raises(ModelError):
            load(archive)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), values=st.binary(min_size=1, max_size=4))
def test_byte_mutations_load_or_raise_model_error(archive, position, values):
    data = bytearray(archive.read_bytes())
    position %= len(data)
    data[position : position + len(values)] = values
    damaged = archive.with_name("damaged.safetensors")
    damaged.write_bytes(data)
    try:
        load(damaged)
    except ModelError as error:
        assert "\n" not in str(error)


def test_compressed(tmp_path: Path) -> None:
    model = sparse_network()
    save(model, tmp_path / "full.safetensors")
    save(model, tmp_path / "small.safetensors", compress=True)
    header, _ = split((tmp_path / "small.safetensors").read_bytes())
    assert header["k.values"]["shape"] == [62, 16, 3, 3]
    assert header["k.places"] == {**header["k.places"], "dtype": "U8", "shape": [62 * 16 * 9 // 4]}
    save(load(tmp_path / "small.safetensors"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "full.safetensors").read_bytes()
