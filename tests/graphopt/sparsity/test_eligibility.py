"""eligibility: every rule of a target fires on the layer that breaks it, and on none that does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from random_graphs import random_graph
from sparse_layers import context, layer_model, mixed
from sparse_models import sparse
from text_graph import graph

import graphopt
from graphopt import registry
from graphopt.inspection import inspect
from graphopt.passes.armor import Armor
from graphopt.passes.quantize import Quantize
from graphopt.report.data import Report
from graphopt.sparsity.eligibility import eligibility
from graphopt.sparsity.found import sparse_weights
from graphopt.sparsity.marks import is_wrapper, role_of
from graphopt.sparsity.verdicts import Eligibility, LayerVerdict
from graphopt.target import SparseKernels, Target

RNG = np.random.default_rng(0)
JETSON = registry.target("jetson-orin")
SMALL = replace(JETSON, sparse=replace(JETSON.sparse, inputs=16, outputs=16))


def kernel(outputs: int, inputs: int, *spatial: int) -> np.ndarray:
    """A convolution's weight that is 2:4 along its input channels."""
    taps = int(np.prod(spatial))
    flat = sparse((outputs * taps, inputs), RNG).reshape(outputs, *spatial, inputs)
    return np.moveaxis(flat, -1, 1).astype(np.float32)


def matrix(outputs: int, inputs: int) -> np.ndarray:
    """(inputs, outputs), as MatMul holds it, 2:4 along its inputs."""
    return np.ascontiguousarray(sparse((outputs, inputs), RNG).T.astype(np.float32))


def verdict(model: ir.Model, target: Target = SMALL) -> LayerVerdict:
    (row,) = eligibility(model, target).layers
    assert row.source == target.sparse.sources.get(row.rule, "")
    return row


def matmul(weight: np.ndarray, signature: str = "(float[n,32] x) => (float[n,m] y)") -> ir.Model:
    return graph(signature, "y = MatMul(x, w)", w=weight)


def convolution(weight: np.ndarray, inputs: int, attributes: str = "", op: str = "Conv") -> ir.Model:
    return graph(f"(float[n,{inputs},9,9] x) => (float[n,o,p,q] y)", f"y = {op}{attributes}(x, w)", w=weight)


# -- float weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda: matmul(matrix(24, 32)),
        lambda: matmul(matrix(24, 32), "(float[n,t,32] x) => (float[n,t,m] y)"),
        lambda: graph("(float[n,32] x) => (float[n,24] y)", "y = Gemm(x, w)", w=matrix(24, 32)),
        lambda: graph("(float[n,32] x) => (float[n,24] y)", "y = Gemm<transB=1>(x, w)", w=matrix(24, 32).T.copy()),
        lambda: graph(
            "(float[n,32] x) => (float[n,24] y)", "t = Transpose(w)  y = MatMul(x, t)", w=matrix(24, 32).T.copy()
        ),
        lambda: graph("(float[n,32] x) => (float[n,24] y)", "t = Identity(w)  y = MatMul(x, t)", w=matrix(24, 32)),
        lambda: convolution(kernel(24, 32, 3, 3), 32),
        lambda: convolution(kernel(24, 32, 1, 1), 32),
    ],
)
def test_layers_against_which_nothing_speaks(model: Any) -> None:
    row = verdict(model())
    assert (row.verdict, row.rule, row.sparse, row.type) == ("may", "", True, "float16")
    assert (row.inputs, row.outputs) == (32, 24)


@pytest.mark.parametrize(
    ("model", "rule", "reason"),
    [
        (lambda: matmul(RNG.normal(size=(32, 24)).astype(np.float32)), "pattern", "dense"),
        (lambda: matmul(matrix(32, 24).T.copy()), "pattern", "along its output channels"),
        (lambda: matmul(matrix(24, 30), "(float[n,30] x) => (float[n,m] y)"), "multiple", "30 input channels"),
        (
            lambda: convolution(kernel(32, 16, 3, 3), 32, "<group=2>"),
            "grouped",
            "no grouped convolutions",
        ),
        (lambda: convolution(kernel(32, 1, 3, 3), 32, "<group=32>"), "grouped", "no grouped convolutions"),
        (lambda: convolution(kernel(32, 24, 3, 3), 32, op="ConvTranspose"), "transposed", "do not transpose"),
        (
            lambda: graph(
                "(float[8,n,32] x) => (float[8,n,24] y)", "y = MatMul(x, w)", w=np.stack([matrix(24, 32)] * 8)
            ),
            "batched",
            "8x32x24",
        ),
        (lambda: graph("(float[32,n] x) => (float[24,n] y)", "y = MatMul(w, x)", w=(24, 32)), "operand", "left"),
        (
            lambda: graph("(float[n,32] x) => (float[n,24] y)", "v = Sin(w)  y = MatMul(x, v)", w=matrix(24, 32)),
            "constant",
            "computed by Sin",
        ),
        (
            lambda: graph("(float[n,8,9,9] x, float[8,8,3,3] w) => (float[n,o,p,q] y)", "y = Conv(x, w)"),
            "constant",
            "an input of the graph",
        ),
    ],
)
def test_layers_that_no_kernel_takes(model: Any, rule: str, reason: str) -> None:
    row = verdict(model())
    assert (row.verdict, row.rule) == ("not", rule) and reason in row.reason


def test_a_pattern_along_the_kernel_or_across_taps_is_none() -> None:
    flat = sparse((24, 32 * 9), RNG).reshape(24, 32, 3, 3).astype(np.float32)  # groups of four in (C, R, S) order
    assert verdict(convolution(flat, 32)).rule == "pattern"


def test_small_layers_are_unlikely_to_gain_and_large_kernels_count() -> None:
    assert verdict(matmul(matrix(24, 32)), JETSON).verdict == "unlikely"
    row = verdict(matmul(matrix(256, 252), "(float[n,252] x) => (float[n,m] y)"), JETSON)
    assert (row.verdict, row.rule, row.reason) == ("unlikely", "size", "252 input channels are fewer than 256")
    assert verdict(matmul(matrix(256, 256), "(float[n,256] x) => (float[n,m] y)"), JETSON).verdict == "may"
    assert verdict(convolution(kernel(256, 32, 3, 3), 32), JETSON).verdict == "may"  # 32 x 9 = 288
    row = verdict(convolution(kernel(256, 28, 3, 3), 28), JETSON)
    assert row.reason == "28 input channels x 9 positions are fewer than 256"


def test_types_of_operands() -> None:
    in_float = replace(SMALL, dtype="model")
    row = verdict(matmul(matrix(24, 32)), in_float)
    assert (row.verdict, row.rule) == ("not", "type") and "multiplies in float32" in row.reason
    half = graph("(float16[n,32] x) => (float16[n,24] y)", "y = MatMul(x, w)", w=matrix(24, 32).astype(np.float16))
    assert verdict(half, in_float).verdict == "may"


def test_bodies_of_control_flow() -> None:
    model = graph(
        "(bool c, float[4,32] x) => (float[4,24] y)",
        """y = If(c) <then_branch = a () => (float[4,24] s) { s = MatMul(x, w) },
                     else_branch = b () => (float[4,24] t) { t = MatMul(x, w) }>""",
        w=matrix(24, 32),
    )
    assert [(row.verdict, row.rule) for row in eligibility(model, SMALL).layers] == [("unlikely", "body")] * 2


def test_products_of_activations_are_no_layers() -> None:
    model = graph("(float[n,8,16] q, float[n,16,8] k) => (float[n,8,8] y)", "y = MatMul(q, k)")
    assert eligibility(model, SMALL).layers == []


def test_a_weight_that_a_caller_may_override_is_no_constant() -> None:
    model = matmul(matrix(24, 32))
    model.graph.inputs.append(model.graph.initializers["w"])
    row = verdict(model)
    assert row.rule == "constant" and "override" in row.reason


# -- quantised weights -------------------------------------------------------------------------------------------------

QDQ = """
    xq = QuantizeLinear(x, sx, zx)  xd = DequantizeLinear(xq, sx, zx)
    wd = DequantizeLinear<axis=1>(w, sw, zw)  p = MatMul(xd, wd)
    pq = QuantizeLinear(p, sx, zx)  y = DequantizeLinear(pq, sx, zx)
"""
PARAMETERS = {
    "sx": np.array(0.1, np.float32),
    "zx": np.array(0, np.int8),
    "sw": np.full(24, 0.1, np.float32),
    "zw": np.zeros(24, np.int8),
}


def quantised(body: str = QDQ, outputs: int = 24, **changed: Any) -> ir.Model:
    integers = np.rint(matrix(24, 32) * 20).astype(np.int8)
    parameters = {"w": integers, **PARAMETERS, **changed}
    return graph(f"(float[n,32] x) => (float[n,{outputs}] y)", body, **parameters)


def test_the_form_of_q_and_dq_that_sparse_kernels_take() -> None:
    row = verdict(quantised())
    assert (row.verdict, row.type, row.sparse) == ("may", "int8", True)
    one_scale = quantised(sw=np.array(0.1, np.float32), zw=np.array(0, np.int8))
    assert verdict(one_scale).verdict == "may"


def test_weights_in_float_behind_q_and_dq() -> None:
    body = QDQ.replace(
        "wd = DequantizeLinear<axis=1>(w", "wq = QuantizeLinear<axis=1>(w, sw, zw)\nwd = DequantizeLinear<axis=1>(wq"
    )
    row = verdict(quantised(body, w=matrix(24, 32)))
    assert (row.verdict, row.type) == ("may", "int8")


@pytest.mark.parametrize(
    ("changes", "verdicts", "rule", "reason"),
    [
        ({"zx": np.array(3, np.int8)}, "not", "zero-point", "its input has a zero point"),
        ({"zw": np.full(24, 1, np.int8)}, "not", "zero-point", "its weight has a zero point"),
        ({"zx": np.array(0, np.uint8)}, "not", "zero-point", "its weight is int8 and its input uint8"),
        ({"body": QDQ.replace("xd, wd", "x, wd")}, "not", "dequantised", "no product of integers"),
        ({"body": QDQ.replace("axis=1", "axis=0"), "sw": np.full(32, 0.1, np.float32), "zw": np.zeros(32, np.int8)},
         "not", "channel-axis", "axis 0"),
        ({"body": QDQ.replace("pq = ", "r = Relu(p)\npq = ").replace("Linear(p,", "Linear(r,")}, "may", "", ""),
        ({"body": QDQ.replace("pq = ", "r = Exp(p)\npq = ").replace("Linear(p,", "Linear(r,")},
         "unlikely", "output", "leaves in float"),
    ],
)  # fmt: skip
def test_every_part_of_that_form_matters(changes: dict[str, Any], verdicts: str, rule: str, reason: str) -> None:
    row = verdict(quantised(**changes))
    assert (row.verdict, row.rule) == (verdicts, rule) and reason in row.reason


def test_a_transpose_behind_the_dequantizelinear() -> None:
    body = QDQ.replace("axis=1", "axis=0").replace(
        "p = MatMul(xd, wd)", "t = Transpose<perm=[1,0]>(wd)\np = MatMul(xd, t)"
    )
    integers = np.rint(matrix(24, 32).T * 20).astype(np.int8)
    row = verdict(quantised(body, w=integers))
    assert (row.verdict, row.rule, row.sparse) == ("unlikely", "dequantised", True)


def test_zeros_that_quantisation_filled_are_seen() -> None:
    integers = np.rint(matrix(24, 32) * 20).astype(np.int8)
    integers[integers == 0] = 1
    assert verdict(quantised(w=integers)).rule == "pattern"


def check_form(model: ir.Model) -> None:
    """What TensorRT's parser takes: int8 between Q, storage and DQ alone, zero points 0, wrappers in float."""
    for node in model.graph:
        integers = [
            value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype == ir.DataType.INT8
        ]
        assert not integers or node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not node.inputs[2].const_value.numpy().any()
            assert all(value.dtype != ir.DataType.INT32 for value in node.inputs)
        if is_wrapper(node):
            assert all(value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64) for value in node.inputs)
    for each in sparse_weights(model):
        weight = each.node.inputs[1]
        if each.role != "core" and not each.quantised:
            continue
        before = weight.producer()
        assert before is None or (before.op_type == "DequantizeLinear" and before.inputs[0].is_initializer())


# -- targets, factors, pipelines ---------------------------------------------------------------------------------------


def test_every_rule_that_can_speak_has_a_source() -> None:
    rules = {
        "pattern", "constant", "batched", "operand", "transposed", "multiple", "grouped", "size", "type", "zero-point",
        "channel-axis", "dequantised", "output",
    }  # fmt: skip
    assert set(JETSON.sparse.sources) == rules
    assert all(len(text) > 20 for text in JETSON.sparse.sources.values())


def test_other_targets_have_other_rules() -> None:
    assert not eligibility(matmul(matrix(24, 32)), registry.target("cpu")).kernels
    board = Target("board", "ort", sparsity_2_4=True, dtype="float16", sparse=SparseKernels(convolutions=False))
    assert verdict(convolution(kernel(24, 32, 3, 3), 32), board).rule == "convolution"
    assert verdict(convolution(kernel(24, 32, 1, 1), 32), board).verdict == "may"  # a product of matrices
    assert verdict(convolution(kernel(32, 16, 1, 1), 32, "<group=2>"), board).verdict == "may"
    assert verdict(quantised(zx=np.array(0, np.uint8)), board).verdict == "may"


@pytest.mark.parametrize("name", ["MatMul and Add", "Gemm", "Conv"])
def test_cores_between_wrappers_are_eligible_in_float_and_in_integers(name: str) -> None:
    model, data = layer_model(name), mixed(name)
    run = replace(context(model, data), target=SMALL)
    Armor(overhead=0.6, cycles=1).run(model, run)
    for step in ("float16", "int8"):
        rows = eligibility(model, SMALL).layers
        (core,) = [row for row in rows if row.role == "core"]
        assert core.sparse and core.type == step and core.verdict != "not"
        assert {row.rule for row in rows if row.role in ("in", "out")} == {"wrapper"}
        assert len(rows) > 1
        if step == "float16":
            assert core.verdict == "may"
            Quantize(sensitive="none").run(model, run)
    check_form(model)
    (node,) = [node for node in model.graph if role_of(node) == "core"]
    scaled = node.inputs[0].producer()
    assert scaled.op_type == "DequantizeLinear" and role_of(scaled.inputs[0].producer().inputs[0].producer()) == "in"


def test_the_report_is_plain_data() -> None:
    found = inspect(matmul(matrix(24, 32)), target=SMALL)
    plain = json.loads(json.dumps(found.to_dict()))["sparsity"]
    assert plain["schema"] == 1 and plain["counts"] == {"may": 1, "unlikely": 0, "not": 0}
    assert plain["layers"][0]["verdict"] == "may" and "1 may run sparsely (100% of the weights)" in plain["summary"]
    assert inspect(matmul(matrix(24, 32))).to_dict()["sparsity"] is None


def test_summary_of_models_without_anything_sparse() -> None:
    dense = eligibility(matmul(np.ones((32, 24), np.float32)), SMALL)
    assert dense.summary() == "none of the 1 linear layers is 2:4 along its input channels (sparsify, armor)"
    assert dense.sparse().layers == []
    assert Eligibility("cpu", kernels=False).summary() == "target cpu has no kernels that skip zeros"


def pixels(data_dir: Path, count: int) -> dict[str, np.ndarray]:
    mean, std = (
        np.array(each, np.float32).reshape(1, 3, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with np.load(data_dir / "cifar10" / "train2048.npz") as stored:
        return {"input": (stored["images"][:count].astype(np.float32) / 255 - mean) / std}


def test_convolutions_of_a_residual_network(data_dir: Path) -> None:
    path, data = data_dir / "models" / "resnet56_cifar10.onnx", pixels(data_dir, 16)
    small = "sparsify{method=magnitude,smallest=64},quantize{sensitive=none}"
    found = graphopt.optimize(path, small, target="jetson-orin", calib=data, verify_each="structure", bench=False)
    assert found.report.sparsity is not None
    rows = found.report.sparsity.layers
    assert {(row.verdict, row.rule, row.type, row.outputs) for row in rows} == {("unlikely", "size", "int8", 64)}
    assert len(rows) == 17  # 64 -> 64 channels, 3x3
    check_form(found.model)
    again = Report.from_json(found.report.to_json())
    assert again.sparsity == found.report.sparsity and "17 are legal and unlikely" in again.sparsity.summary()
    assert "17 of 56 linear layers are 2:4" in again.sparsity.summary()
    left = graphopt.optimize(path, "sparsify{method=magnitude}", target="jetson-orin", verify_each="off", bench=False)
    assert left.report.sparsity is None  # no layer of this network would gain
    assert {skip.reason for skip in left.report.passes[0].skipped} >= {"64 output channels are fewer than 256"}


def test_products_of_a_transformer(data_dir: Path) -> None:
    with np.load(data_dir / "sts" / "calib1024.npz") as stored:
        data = {"input_ids": stored["ids"][:8].astype(np.int64), "attention_mask": stored["mask"][:8].astype(np.int64)}
    found = graphopt.optimize(
        data_dir / "models" / "minilm_l6.onnx",
        "sparsify{method=magnitude},quantize{sensitive=none,ranges=minmax,sparse_outputs=all}",
        target="jetson-orin", calib=data, verify_each="structure", bench=False,
    )  # fmt: skip
    assert found.report.sparsity is not None
    assert len(found.report.sparsity.layers) == 36
    assert {(row.verdict, row.type) for row in found.report.sparsity.layers} == {("may", "int8")}
    check_form(found.model)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_have_verdicts(seed: int) -> None:
    model = random_graph(seed)
    found = eligibility(model, SMALL)
    assert all(row.verdict in ("may", "unlikely", "not") for row in found.layers)
    assert all(bool(row.reason) != (row.verdict == "may") for row in found.layers)
    assert found.summary()


@pytest.mark.parametrize(
    "model",
    [
        lambda: graph("(float[n,0] x) => (float[n,4] y)", "y = MatMul(x, w)", w=np.zeros((0, 4), np.float32)),
        lambda: graph("(float[n,4] x) => (float[n] y)", "y = MatMul(x, w)", w=np.ones(4, np.float32)),
        lambda: graph("(float[n,8] x) => (float[n,8] y)", "y = MatMul(x, w)", w=np.full((8, 8), np.nan, np.float32)),
        lambda: graph("(float[n,4,9] x) => (float[n,o,p] y)", "y = Conv(x, w)", w=(8, 4, 3)),
    ],
)
def test_odd_weights_have_a_verdict(model: Any) -> None:
    row = verdict(model())
    assert row.verdict == "not" and row.reason
