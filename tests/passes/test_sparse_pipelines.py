"""Sparse and factorised layers through pipelines: what later passes keep, and what they say where they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from sparse_layers import LAYERS, context, layer_model, mixed
from text_graph import graph

import graphopt
from graphopt.executor import Session
from graphopt.numerics.sparsity.patterns import parse
from graphopt.passes.armor import Armor
from graphopt.passes.fold_wrappers import FoldWrappers
from graphopt.passes.quantize import Quantize
from graphopt.rewriting.constants import array
from graphopt.sparsity.found import FoundWeight, sparse_weights

RNG = np.random.default_rng(0)


def cores(model: ir.Model) -> list[FoundWeight]:
    return [weight for weight in sparse_weights(model) if weight.role == "core"]


# -- quantize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "MatMul without a bias"])
@pytest.mark.parametrize("wrappers", ["in", "both"])
def test_integer_cores_keep_every_zero_between_float_wrappers(name: str, wrappers: Any) -> None:
    model, data = layer_model(name), mixed(name)
    run = context(model, data)
    Armor(form="factors", wrappers=wrappers, overhead=0.6, cycles=2).run(model, run)
    (before,) = cores(model)
    zeros = np.asarray(before.weight.const_value.numpy()) == 0
    wrapped = Session(model.clone()).run(data)["y"]
    result = Quantize(sensitive="none").run(model, run)
    (core,) = cores(model)
    stored = core.weight.const_value.numpy()
    assert stored.dtype == np.int8
    assert core.holds(parse("2:4"))
    assert not stored[zeros].any()
    dequantise = core.node.inputs[1].producer()
    assert not np.asarray(array(dequantise.inputs[2])).any()
    assert array(dequantise.inputs[1]).shape == (24,)  # one scale for each output channel
    assert {"the wrapper of a sparse core: it stays in float"} == {skip.reason for skip in result.skipped}
    for node in core.wrappers:
        for value in node.inputs:
            assert value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64)
    now = Session(model).run(data)["y"]
    assert np.linalg.norm(now - wrapped) < 0.03 * np.linalg.norm(wrapped)


def test_the_range_of_a_core_is_that_of_what_the_wrapper_gives_it() -> None:
    model, data = layer_model("Gemm"), mixed("Gemm")
    run = context(model, data)
    Armor(form="factors", overhead=0.6, cycles=2).run(model, run)
    (core,) = cores(model)
    product = next(n for n in core.wrappers if n.op_type == "MatMul")
    blocks = product.inputs[1]
    blocks.const_value = ir.tensor(100 * blocks.const_value.numpy(), name=blocks.name)
    Quantize(sensitive="none", ranges="minmax").run(model, run)
    (core,) = cores(model)
    step = array(core.node.inputs[0].producer().inputs[1])
    assert 255 * step > 20 * np.ptp(data["x"])


# -- prune -------------------------------------------------------------------------------------------------------------


def chain() -> ir.Model:
    body = "a = Gemm(x, w1, b1) r = Relu(a) c = Gemm(r, w2, b2) s = Relu(c) y = Gemm(s, w3, b3)"
    return graph("(float[n,32] x) => (float[n,8] y)", body,
                 w1=(32, 32), b1=(32,), w2=(32, 32), b2=(32,), w3=(32, 8), b3=(8,))  # fmt: skip


def calibration() -> dict[str, np.ndarray]:
    x = RNG.normal(size=(256, 32)) @ RNG.normal(size=(32, 32))
    return {"x": (x * np.geomspace(2, 0.2, 32)).astype(np.float32)}


def run(model: ir.Model, spec: str, data: dict[str, np.ndarray]) -> graphopt.Result:
    return graphopt.optimize(model, spec, calib=data, bench=False)


def test_a_pattern_that_pruning_breaks_is_told_with_its_layers() -> None:
    found = run(chain(), "sparsify,prune{params=0.7}", calibration())
    (warning,) = [note for note in found.report.passes[1].notes if "no longer holds" in note]
    assert "2:4" in warning
    assert "Gemm(y)" in warning
    assert "behind this pass" in warning
    again = run(chain(), "sparsify,prune{params=0.7},sparsify", calibration())
    assert not [note for note in again.report.passes[2].notes if "no longer holds" in note]
    assert all(weight.holds(parse("2:4")) for weight in sparse_weights(again.model))


def test_pruned_layers_are_factorised_and_quantised() -> None:
    spec = "prune{params=0.7},armor{form=factors,overhead=0.4},fold,quantize{sensitive=none}"
    found = run(chain(), spec, calibration())
    assert [record.status for record in found.report.passes if record.name != "fold"] == ["applied"] * 3
    assert len(cores(found.model)) == 2  # blocks of eight outputs would cost more
    assert all(core.quantised and core.holds(parse("2:4")) for core in cores(found.model))


def test_factorised_layers_can_be_pruned_and_stay_valid() -> None:
    found = run(chain(), "armor{form=factors,overhead=0.4},prune{params=0.8}", calibration())
    data = calibration()
    assert np.isfinite(Session(found.model).run(data)["y"]).all()
    broken = [weight for weight in sparse_weights(found.model) if weight.broken]
    told = [note for note in found.report.passes[1].notes if "no longer holds" in note]
    assert bool(broken) == bool(told)


# -- real models -------------------------------------------------------------------------------------------------------


def images(data_dir: Path, count: int) -> dict[str, np.ndarray]:
    with np.load(data_dir / "cifar10" / "train2048.npz") as stored:
        x = stored["images"][:count].astype(np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return {"input": ((x - mean[:, None, None]) / std[:, None, None]).astype(np.float32)}


def test_resnet20_factorised_folded_and_quantised(data_dir: Path) -> None:
    model = graphopt.load(data_dir / "models" / "resnet20_cifar10.onnx")
    spec = "armor{form=factors,overhead=0.1,cycles=1},fold,quantize{sensitive=none,ranges=minmax}"
    found = graphopt.optimize(model, spec, calib=images(data_dir, 32), bench=False)
    assert len(cores(found.model)) == 18
    assert all(core.quantised and core.holds(parse("2:4")) and core.wrappers for core in cores(found.model))
    assert found.report.fidelity.cosine > 0.95


def test_the_last_layer_of_minilm_factorised_folded_and_quantised(data_dir: Path) -> None:
    model = graphopt.load(data_dir / "models" / "minilm_l6.onnx")
    with np.load(data_dir / "sts" / "calib1024.npz") as stored:
        calib = {"input_ids": stored["ids"][:16], "attention_mask": stored["mask"][:16]}
    calib = {name: values.astype(np.int64) for name, values in calib.items()}
    layers = [n.name for n in model.graph if n.op_type == "MatMul" and n.name]
    others = tuple(layers[:-6])
    armor = Armor(form="factors", overhead=0.085, cycles=1, exclude=others)
    quantize = Quantize(sensitive="none", ranges="minmax", exclude=others)
    found = graphopt.optimize(model, [armor, FoldWrappers(), quantize], calib=calib, bench=False)
    assert cores(found.model)
    assert all(core.quantised and core.holds(parse("2:4")) for core in cores(found.model))
    assert found.report.fidelity.cosine > 0.95
