"""Streamed activations equal those of the whole model, in bounded slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import calibration, model
from graphopt.data import activations
from graphopt.executor import Session

CHAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,4] x) => (float[N,3,4] z, float[N,3,4] late)
<float[1] w = {2}> { a = Relu(x)  b = Mul(a, w)  z = Neg(b)  c = Exp(z)  late = Sqrt(c) }"""
CAPTURE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x, bool pick) => (float[N,4] y) {
    a = Relu(x)  b = Neg(x)  dead = Exp(x)
    y = If (pick) <then_branch = t () => (float[N,4] p) { p = Identity(a) },
                   else_branch = e () => (float[N,4] q) { q = Identity(b) }> }"""


def test_slices_hold_every_tensor_once_per_batch_in_order() -> None:
    network = ir.from_onnx_text(CHAIN)
    x = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32)
    data = calibration.load({"x": x}, network, batch_size=4)
    names = ["late", "a", "z", "x", "w", "b"]
    expected = Session(network, outputs=["late", "a", "z", "b"]).run({"x": x}) | {"x": x}
    for budget, slices in ((1 << 20, 1), (2 * 4 * 48, 3)):
        got: dict[str, list[np.ndarray]] = {}
        calls = 0
        for tensors in activations.activations(network, names, data, slice_bytes=budget):
            calls += 1
            assert sum(t.nbytes for t in tensors.values()) <= budget
            for name, tensor in tensors.items():
                got.setdefault(name, []).append(np.array(tensor))
        assert calls == 3 * slices
        assert set(got) == set(names)
        for name, array in expected.items():
            np.testing.assert_allclose(np.concatenate(got[name]), array, rtol=1e-6)
        assert {float(w[0]) for w in got["w"]} == {2.0}


def test_grouped_tensors_come_together_and_the_batch_shrinks_to_the_budget() -> None:
    network = ir.from_onnx_text(CHAIN)
    data = calibration.load({"x": np.ones((8, 3, 4), np.float32)}, network, batch_size=4)
    streamed = list(activations.activations(network, [("a", "late"), "b"], data, slice_bytes=4 * 48))
    together = [t for t in streamed if "a" in t]
    assert all({"a", "late"} <= set(t) for t in together)
    assert {len(t["a"]) for t in together} == {2}
    assert sum(len(t["a"]) for t in together) == 8


def test_submodel_drops_what_no_tap_needs_and_keeps_what_subgraphs_capture() -> None:
    network = ir.from_onnx_text(CAPTURE)
    cut = activations.submodel(network, ["y"])
    assert [n.op_type for n in cut.graph] == ["Relu", "Neg", "If"]
    assert len(list(network.graph)) == 4  # the original is untouched
    early = activations.submodel(ir.from_onnx_text(CHAIN), ["a"])
    assert [n.op_type for n in early.graph] == ["Relu"]
    assert not early.graph.initializers


def test_pairs_run_on_the_same_batches() -> None:
    dense, other = (ir.from_onnx_text(CHAIN) for _ in range(2))
    other.graph.initializers["w"].const_value = ir.tensor(np.array([3], np.float32), name="w")
    x = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32)
    data = calibration.load({"x": x}, dense)
    rows = 0
    for a, b in activations.paired_activations([(dense, ["a", "b"]), (other, ["b"])], data, batch_size=3):
        np.testing.assert_allclose(a["b"] * 1.5, b["b"], rtol=1e-6)
        np.testing.assert_array_equal(a["a"], np.maximum(x[rows : rows + len(a["a"])], 0))
        rows += len(a["a"])
    assert rows == 10


@pytest.mark.data
@pytest.mark.parametrize("name", ["silero_vad_v5_if", "gtcrn"])
def test_any_main_graph_tensor_of_stateful_models_streams(data_dir: Path, name: str) -> None:
    network = model.load(data_dir / "models" / f"{name}.onnx")
    data = calibration.load(data_dir / "inputs" / f"{name}.npz", network)
    names = [v.name for node in network.graph for v in node.outputs if v.name][::37]
    seen = dict.fromkeys(names, 0)
    for tensors in activations.activations(network, names, data, limit=2, slice_bytes=1 << 20):
        for n in tensors:
            seen[n] += 1
    assert set(seen.values()) == {2}
