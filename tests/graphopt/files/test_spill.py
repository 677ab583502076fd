"""graphopt.files.spill: large computed weights are in a temporary file, and nobody can tell but by the memory."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fold_checks import context
from text_graph import graph

from graphopt.errors import GraphoptError
from graphopt.files import spill
from graphopt.files.piecewise import rows
from graphopt.files.spill import SpilledTensor, held
from graphopt.model import load, save
from graphopt.passes.merge_branches import MergeBranches
from graphopt.verify import compare, random_feeds


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "LARGE", 1)


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8])
def test_values_are_kept_and_no_file_is_left(
    kind: ir.DataType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = np.arange(24).reshape(2, 3, 4).astype(kind.numpy())
    tensor = held(data, kind, "w")
    assert isinstance(tensor, SpilledTensor)
    assert (tensor.name, tensor.dtype, tuple(tensor.shape)) == ("w", kind, (2, 3, 4))
    np.testing.assert_array_equal(tensor.numpy(), data)
    np.testing.assert_array_equal(rows(tensor, 1, 2), data[1:])
    del tensor
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_packed_and_small_ones_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(held(np.ones(4, ir.DataType.INT4.numpy()), ir.DataType.INT4, "w")) is ir.Tensor
    monkeypatch.setattr(spill, "LARGE", 17)
    assert type(held(np.ones(4, np.float32), ir.DataType.FLOAT, "w")) is ir.Tensor


def test_a_folded_model_is_written_as_it_came(tmp_path: Path) -> None:
    original = graph(
        "(float[2, 8] x) => (float[2, 6] y)", "h = MatMul (x, w)  a = MatMul (x, p)  b = MatMul (a, q)  y = Add (h, b)",
        w=(8, 6), p=(8, 2), q=(2, 6),
    )  # fmt: skip
    folded = original.clone()
    assert MergeBranches().run(folded, context()).changed
    assert isinstance(folded.graph.initializers["w"].const_value, SpilledTensor)
    assert compare(original, folded, random_feeds(original, 0)).equal
    save(folded, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"], "no data file: the model had none"
    assert compare(folded, load(tmp_path / "m.onnx"), random_feeds(original, 0)).equal


def test_no_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(GraphoptError, match="temporary file") as error:
        held(np.ones(4, np.float32), ir.DataType.FLOAT, "w")
    assert "TMPDIR" in (error.value.hint or "")
