"""Errors layer by layer: what a layer adds and what has accumulated, the bad layer first, and what to exclude."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

import graphopt
from graphopt import calibration
from graphopt.base import Context
from graphopt.diagnosis import layers as layers_module
from graphopt.diagnosis import running
from graphopt.diagnosis import sums as sums_module
from graphopt.diagnosis.layers import LayerErrors, layer_errors
from graphopt.errors import DataError, VerificationError
from graphopt.executor import Session
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.registry import pass_class, target
from graphopt.report.data import plain_json
from graphopt.spec import parse

RNG = np.random.default_rng(0)
CHAIN = "a = MatMul(x, u)  b = Relu(a)  c = MatMul(b, v)  d = Relu(c)  e = MatMul(d, w)  f = Relu(e)  y = MatMul(f, z)"


def chain() -> ir.Model:
    weights = {name: RNG.standard_normal((32, 32)).astype(np.float32) / 5 for name in ("u", "v", "w", "z")}
    model = graph("(float[N,32] x) => (float[N,32] y)", CHAIN, **weights)
    for node in model.graph:
        node.name = f"layer.{node.outputs[0].name}[0]"
    return model


def samples(model: ir.Model, count: int = 40) -> calibration.Calibration:
    return calibration.load({"x": RNG.standard_normal((count, 32)).astype(np.float32)}, model)


def quantised(model: ir.Model, data: calibration.Calibration) -> ir.Model:
    made = model.clone()
    ctx = Context(target("cpu"), data, None, seed=0, jobs=1, progress=Silent(), resolve=pass_class)
    assert Quantize(sensitive="none").run(made, ctx).changed
    return made


def change(model: ir.Model, name: str, by: Any) -> None:
    value = model.graph.initializers[name]
    old = value.const_value.numpy()
    value.const_value = ir.Tensor(np.asarray(by(old), old.dtype), name=name)


def by_tensor(found: LayerErrors) -> dict[str, layers_module.LayerError]:
    return {layer.tensor: layer for layer in found.layers}


def test_errors_are_those_of_the_definition() -> None:
    a = chain()
    b = a.clone()
    for name in ("v", "z"):
        change(b, name, lambda w: w + RNG.standard_normal(w.shape) / 50)
    data = samples(a)
    found = by_tensor(layer_errors(a, b, data))
    x = {"x": np.concatenate([feeds["x"] for feeds in data.batches()])}
    names = ("b", "c", "f", "y")
    first, second = (Session(m, outputs=names).run(x) for m in (a, b))
    weights = {name: b.graph.initializers[name].const_value.numpy().astype(np.float64) for name in ("v", "z")}

    def sqnr(want: np.ndarray, got: np.ndarray) -> float:
        want, got = want.astype(np.float64), got.astype(np.float64)
        return 10 * math.log10(np.sum(want**2) / np.sum((want - got) ** 2))

    for tensor, source, weight in (("c", "b", "v"), ("y", "f", "z")):
        alone = first[source].astype(np.float64) @ weights[weight]
        layer = found[tensor]
        assert layer.added.sqnr_db == pytest.approx(sqnr(first[tensor], alone), abs=1e-3)
        assert layer.total.sqnr_db == pytest.approx(sqnr(first[tensor], second[tensor]), abs=1e-6)
        want = first[tensor].astype(np.float64)
        assert layer.added.cosine == pytest.approx(
            np.vdot(want, alone) / np.linalg.norm(want) / np.linalg.norm(alone), abs=1e-6
        )
        assert layer.added.max_abs == pytest.approx(np.abs(want - alone).max(), rel=1e-4)
    assert found["a"].total.sqnr_db == found["e"].added.sqnr_db == math.inf
    assert found["e"].total.sqnr_db < 40, "e carries the error of c"


@pytest.mark.parametrize("bad", ["u", "v", "w", "z"])
def test_a_planted_bad_layer_is_found_first_and_excluded(bad: str) -> None:
    a = chain()
    data = samples(a)
    b = quantised(a, data)
    clean = layer_errors(a, b, data)
    assert clean.exclude == () and clean.suggestion is None
    change(b, f"{bad}_quantized", lambda q: np.round(q / 48.0) * 48)
    found = layer_errors(a, b, data)
    node = {"u": "a", "v": "c", "w": "e", "z": "y"}[bad]
    worst = found.layers[0]
    assert (worst.tensor, worst.exclude) == (node, f"layer.{node}[0]")
    assert found.exclude == (f"layer.{node}[0]",)
    assert worst.added.sqnr_db < 20 < found.layers[1].added.sqnr_db
    assert found.suggestion is not None
    again = parse(found.suggestion)[0]
    kept = a.clone()
    ctx = Context(target("cpu"), data, None, seed=0, jobs=1, progress=Silent(), resolve=pass_class)
    assert again.run(kept, ctx).changed
    assert by_tensor(layer_errors(a, kept, data))[node].added.sqnr_db == math.inf, "the suggestion leaves it in float"


def test_a_bad_layer_in_a_quiet_branch_is_no_other_meaning() -> None:
    body = "a = MatMul(x, u)  h = MatMul(a, v)  s = Add(x, h)  y = Relu(s)"
    a = graph(
        "(float[N,32] x) => (float[N,32] y)", body, u=(32, 32), v=RNG.standard_normal((32, 32)).astype(np.float32) / 500
    )
    b = a.clone()
    change(b, "u", lambda w: w * np.linspace(-1, 1, 32))
    found = layer_errors(a, b, samples(a))
    assert found.layers[0].tensor == "a" and found.unmatched == []
    assert by_tensor(found)["y"].total.sqnr_db > by_tensor(found)["a"].total.sqnr_db + 10


def test_channels_scaled_and_scaled_back_are_no_error() -> None:
    a = chain()
    b = a.clone()
    scale = np.exp(RNG.standard_normal(32))
    change(b, "u", lambda w: w * scale)
    change(b, "v", lambda w: w / scale[:, None])
    found = layer_errors(a, b, samples(a))
    assert [tensor.tensor for tensor in found.unmatched] == ["a", "b"]
    assert "means something else" in found.unmatched[-1].reason
    assert all(layer.added.sqnr_db > 100 for layer in found.layers)


def test_a_tensor_that_kept_its_name_and_became_a_later_one_is_matched_by_its_values() -> None:
    body = "c = MatMul(x, u)  n = Mul(c, s)  m = Add(n, t)  r = Relu(m)  y = MatMul(r, v)"
    s, t = np.exp(RNG.standard_normal(32)).astype(np.float32), np.full(32, 3, np.float32)
    a = graph("(float[N,32] x) => (float[N,32] y)", body, u=(32, 32), v=(32, 32), s=s, t=t)
    folded = graph(
        "(float[N,32] x) => (float[N,32] y)", "p = MatMul(x, u)  c = Add(p, t)  q = Relu(c)  y = MatMul(q, v)",
        u=a.graph.initializers["u"].const_value.numpy() * s, v=a.graph.initializers["v"].const_value.numpy(), t=t,
    )  # fmt: skip
    found = layer_errors(a, folded, samples(a))
    assert {(layer.tensor, layer.other, layer.matched) for layer in found.layers} >= {("m", "c", "value")}
    assert all(layer.added.sqnr_db > 100 for layer in found.layers)
    assert {tensor.tensor: tensor.reason for tensor in found.unmatched}["c"] == "c of B holds what m is"


def test_what_became_a_later_tensor_beside_that_tensor_is_left_out() -> None:
    a = graph(
        "(float[N,32] x) => (float[N,32] y)", "c = MatMul(x, u)  r = Relu(c)  y = MatMul(r, v)", u=(32, 32), v=(32, 32)
    )
    b = graph(
        "(float[N,32] x) => (float[N,32] y)", "p = MatMul(x, u)  c = Relu(p)  r = Identity(c)  y = MatMul(r, v)",
        **{name: a.graph.initializers[name].const_value.numpy() for name in ("u", "v")},
    )  # fmt: skip
    found = layer_errors(a, b, samples(a))
    assert [(layer.tensor, layer.other) for layer in found.layers] == [("r", "r"), ("y", "y")]
    assert [(tensor.tensor, tensor.reason) for tensor in found.unmatched] == [("c", "c of B holds what r is")]


def test_slices_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a = chain()
    data = samples(a)
    b = quantised(a, data)
    whole = layer_errors(a, b, data)
    monkeypatch.setattr(running, "TENSOR_BYTES", 1500)
    monkeypatch.setattr(running, "SLICE_BYTES", 3000)
    monkeypatch.setattr(running, "PROBED", 2)
    monkeypatch.setattr(sums_module, "BLOCK", 7)
    sliced = layer_errors(a, b, data)
    assert sliced.samples == whole.samples == 40
    for x, y in zip(whole.layers, sliced.layers, strict=True):
        assert x.tensor == y.tensor
        assert x.added.sqnr_db == pytest.approx(y.added.sqnr_db, abs=1e-3)
        assert x.total.sqnr_db == pytest.approx(y.total.sqnr_db, abs=1e-3)


def test_memory_bounds_the_samples_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    a = chain()
    data = samples(a)
    pairs = layers_module.match(a, a.clone())[0]
    sizes = running.probe(a, a, pairs, data, 1)
    assert {(first.bytes, first.shape, first.samples) for first, _ in sizes.values()} == {(128, (1, 32), 1)}
    per_sample = running.COPIES * 128 * len(pairs)
    monkeypatch.setattr(running, "TENSOR_BYTES", 3 * per_sample)
    rows = [seen.a.shape[0] for seen in running.stream(a, a, pairs, sizes, data, limit=7, threads=1)]
    assert rows == [3] * len(pairs) + [3] * len(pairs) + [1] * len(pairs)


def test_who_quantised_is_blamed_and_not_who_moves_integers() -> None:
    body = "c = MatMul(x, u)  m = Relu(c)  t = Transpose(m)  y = MatMul(v, t)"
    a = graph("(float[N,32] x) => (float[32,N] y)", body, u=(32, 32), v=(32, 32))
    data = samples(a)
    b = quantised(a, data)
    change(b, "m_scale", lambda s: s / 8)
    found = layer_errors(a, b, data)
    assert found.layers[0].tensor in ("t", "y") and found.exclude == ("MatMul(c)",)


def test_layers_that_move_what_one_quantised_are_one_layer() -> None:
    error = sums_module.Error(10.0, 1.0, 0.0)
    rows = [layers_module.LayerError(t, t, "Reshape", (1,), t, "name", error, error, 10.0, 0, e)
            for t, e in (("c", "fc"), ("m", "fc"), ("d", "other"))]  # fmt: skip
    assert [layer.tensor for layer in layers_module.worst_of_each(rows)] == ["c", "d"]


def test_a_function_that_amplifies_is_told() -> None:
    a = graph("(float[N,32] x) => (float[N,32] y)", "h = Add(x, k)  d = Sub(h, k)  y = Tanh(d)",
              k=np.full(32, 1000, np.float32))  # fmt: skip
    b = graph("(float[N,32] x) => (float[N,32] y)", "h = Add(x, l)  d = Sub(h, k)  y = Tanh(d)",
              k=np.full(32, 1000, np.float32), l=np.full(32, 1000.1, np.float32))  # fmt: skip
    found = layer_errors(a, b, samples(a))
    layer = by_tensor(found)["d"]
    assert layer.inherited_db == pytest.approx(80, abs=1) and layer.total.sqnr_db == pytest.approx(20, abs=2)
    assert found.amplifier == layer
    assert layer_errors(a, a, samples(a)).amplifier is None


def test_half_precision_is_compared_in_its_own_type() -> None:
    a = graph("(float[N,32] x) => (float[N,32] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, w)", w=(32, 32))
    half = a.graph.initializers["w"].const_value.numpy().astype(np.float16)
    b = graph(
        "(float[N,32] x) => (float[N,32] y)",
        "g = Cast<to = 10>(x)  h = MatMul(g, w)  r = Relu(h)  s = MatMul(r, w)  y = Cast<to = 1>(s)", w=half,
    )  # fmt: skip
    found = by_tensor(layer_errors(a, b, samples(a)))
    assert 40 < found["h"].added.sqnr_db < 90 and found["r"].matched == "name"
    assert found["y"].exclude == "MatMul(y)"


def test_masks_are_left_out_and_what_is_nowhere_finite_counts() -> None:
    a = graph("(float[N,32] x) => (float[N,32] y)", "h = Add(x, k)  l = Log(h)  y = Softmax(h)",
              k=np.where(np.arange(32) % 2, 0, np.finfo(np.float32).min).astype(np.float32))  # fmt: skip
    b = a.clone()
    change(b, "k", lambda k: np.where(k < 0, k, np.float32(0.01)))
    data = calibration.load({"x": np.abs(RNG.standard_normal((4, 32))).astype(np.float32) + 1}, a)
    found = by_tensor(layer_errors(a, b, data))
    assert 30 < found["h"].added.sqnr_db < 60 and found["l"].nonfinite == 0
    for mask in (-1e4, -1e9):
        soft, other = a.clone(), a.clone()
        for model, rest in ((soft, 0), (other, 0.01)):
            change(model, "k", lambda k, rest=rest, mask=mask: np.where(k < 0, mask, rest))
        scores = by_tensor(layer_errors(soft, other, data))["h"]
        assert scores.added.sqnr_db == pytest.approx(found["h"].added.sqnr_db, abs=0.1)
    change(b, "k", lambda k: np.where(k < 0, k, np.float32(-5)))
    broken = by_tensor(layer_errors(a, b, data))["l"]
    assert broken.nonfinite > 0 and broken.total.sqnr_db == -math.inf and broken.total.cosine == 0


def test_sizes_that_depend_on_the_data_are_no_error() -> None:
    body = "h = MatMul(x, w)  p = Greater(h, zero)  i = NonZero(p)  t = Transpose(i)  g = GatherND(h, t)  y = Exp(h)  "
    body += "s = ReduceSum<keepdims = 0>(g)"
    zero = {"zero": np.asarray(0, np.float32)}
    a = graph("(float[N,32] x) => (float[N,32] y, float s)", body, w=(32, 32), **zero)
    b = a.clone()
    data = samples(a)
    change(b, "w", lambda w: w + RNG.standard_normal(w.shape))
    found = layer_errors(a, b, data)
    reasons = {tensor.tensor: tensor.reason for tensor in found.unmatched}
    assert list(reasons) == ["g"] and reasons["g"].startswith("its shape")


def test_pruned_layers_are_told_apart_and_the_rest_is_measured() -> None:
    a = graph(
        "(float[N,32] x) => (float[N,32] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)", w=(32, 8), v=(8, 32)
    )
    b = graph(
        "(float[N,32] x) => (float[N,32] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)", w=(32, 6), v=(6, 32)
    )
    found = layer_errors(a, b, samples(a))
    assert [layer.tensor for layer in found.layers] == ["y"]
    assert [tensor.reason for tensor in found.unmatched] == [
        "its shape is [N, 8], and [N, 6] in B", "its shape is [N, 8], and [N, 6] in B"
    ]  # fmt: skip


def test_too_many_bad_layers_are_the_scheme_and_only_the_worst_are_named() -> None:
    a = chain()
    data = samples(a)
    b = quantised(a, data)
    for name in ("u", "v", "w", "z"):
        change(b, f"{name}_quantized", lambda q: np.round(q / 48.0) * 48)
    assert len(layer_errors(a, b, data).exclude) == 1


def test_bad_input_is_named() -> None:
    a = chain()
    other = graph("(float[N,32] x) => (float[N,32] other)", "other = Exp(x)")
    with pytest.raises(DataError, match="no tensor in common"):
        layer_errors(a, other, samples(a))
    with pytest.raises(DataError, match="no samples"):
        layer_errors(a, a, calibration.load({"x": np.zeros((0, 32), np.float32)}, a))
    crashing = graph(
        "(float[N,32] x) => (float[N,32] y)", "a = Reshape(x, n)  y = MatMul(a, w)",
        n=np.array([7, 32], np.int64), w=(32, 32),
    )  # fmt: skip
    with pytest.raises(VerificationError, match="second model fails"):
        graphopt.compare_layers(a, crashing, calib={"x": np.zeros((3, 32), np.float32)})


def test_json_is_as_it_was() -> None:
    w = np.array([[1, 2], [3, 4]], np.float32)
    a = graph("(float[N,2] x) => (float[N,2] y)", "h = MatMul(x, w)  r = Relu(h)  k = Exp(r)  y = Neg(r)", w=w)
    for node, name in zip(a.graph, ("fc", "act", "spare", "out"), strict=True):
        node.name = name
    b = graph("(float[N,2] x) => (float[N,2] y)", "h = MatMul(x, w)  r = Relu(h)  y = Neg(r)", w=w * np.float32(1.5))
    found = layer_errors(a, b, calibration.load({"x": np.array([[1, 0], [0, 1]], np.float32)}, a))
    off = {"sqnr_db": 10 * math.log10(4), "cosine": 1.0, "max_abs": 2.0}
    none = {"sqnr_db": "inf", "cosine": 1.0, "max_abs": 0.0}
    common = {"shape": [1, 2], "matched": "name", "nonfinite": 0}
    assert json.loads(plain_json(found.to_dict())) == {
        "schema": 1,
        "layers": [
            {"tensor": "h", "node": "fc", "op": "MatMul", "other": "h", "added": off, "total": off,
             "inherited_db": "inf", "exclude": "fc", **common},
            {"tensor": "r", "node": "act", "op": "Relu", "other": "r", "added": none, "total": off,
             "inherited_db": off["sqnr_db"], "exclude": "fc", **common},
            {"tensor": "y", "node": "out", "op": "Neg", "other": "y", "added": none, "total": off,
             "inherited_db": off["sqnr_db"], "exclude": "out", **common},
        ],
        "unmatched": [
            {"tensor": "k", "node": "spare", "op": "Exp",
             "reason": "B has nothing of its name, of its node's name or in its place"}
        ],
        "exclude": [],
        "suggestion": None,
        "amplifier": None,
        "samples": 2,
        "notes": [],
    }  # fmt: skip


@pytest.mark.data
def test_resnet20_in_integers(data_dir: Path) -> None:
    a = graphopt.load(data_dir / "models" / "resnet20_cifar10.onnx")
    with np.load(data_dir / "cifar10" / "train2048.npz") as stored:
        images = (stored["images"][:24].astype(np.float32) / 255 - np.float32(0.45)) / np.float32(0.225)
    data = calibration.load({"input": images}, a)
    b = quantised(a, data)
    clean = layer_errors(a, b, data)
    assert clean.exclude == () and len(clean.layers) > 50
    assert clean.unmatched == []
    assert min(layer.added.sqnr_db for layer in clean.layers) > 25
    node = next(n for n in list(b.graph)[40:] if n.op_type == "Conv")
    weight = node.inputs[1].producer().inputs[0].name
    change(b, weight, lambda q: np.round(q / 48.0) * 48)
    found = layer_errors(a, b, data)
    assert found.layers[0].node == node.name and found.exclude == (node.name,)
