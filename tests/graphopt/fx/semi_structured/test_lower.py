"""Lowered modules equal ONNX Runtime on the CPU, whatever form a sparse layer has; every layer's fate is told."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sparse_models import make_factorised, make_sparse
from text_graph import graph

from graphopt.executor import Session
from graphopt.fx.semi_structured.lower import Lowered, fate_rows, lower
from graphopt.fx.semi_structured.modules import BlockDiagonal, SparseLinear, SparseLinearInt8

CPU = torch.device("cpu")
TOKENS = "(float[n,t,36] x) => (float[n,t,24] y)"
FORMS = {
    "MatMul": ("(float[n,t,36] x) => (float[n,t,24] y)", "y = MatMul(x, w)", {"w": (36, 24)}, (3, 5, 36)),
    "MatMul and Add": (TOKENS, "h = MatMul(x, w)  y = Add(b, h)", {"w": (36, 24), "b": (24,)}, (1, 7, 36)),
    "MatMul of two axes": ("(float[n,36] x) => (float[n,24] y)", "y = MatMul(x, w)", {"w": (36, 24)}, (16, 36)),
    "Gemm": ("(float[n,36] x) => (float[n,24] y)", "y = Gemm(x, w, b)", {"w": (36, 24), "b": (24,)}, (1, 36)),
    "Gemm, scaled": (
        "(float[n,36] x) => (float[n,24] y)",
        "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        {"w": (24, 36), "b": (24,)},
        (9, 36),
    ),
    "Conv": (
        "(float[n,36,h,w] x) => (float[n,24,i,j] y)",
        "y = Conv(x, k, b)",
        {"k": (24, 36, 1, 1), "b": (24,)},
        (2, 36, 5, 3),
    ),
    "Conv with strides": (
        "(float[n,36,h,w] x) => (float[n,24,i,j] y)",
        "c = Conv<strides=[2,1]>(x, k)  y = Add(c, b)",
        {"k": (24, 36, 1, 1), "b": (24, 1, 1)},
        (2, 36, 5, 3),
    ),
    "Conv of one axis": (
        "(float[n,36,h] x) => (float[n,24,i] y)", "y = Conv(x, k)", {"k": (24, 36, 1)}, (3, 36, 11),
    ),
}  # fmt: skip


def run(lowered: Lowered, *inputs: np.ndarray) -> list[np.ndarray]:
    return [y.float().numpy() for y in lowered(*(torch.from_numpy(x) for x in inputs))]


def agree(model: ir.Model, lowered: Lowered, x: np.ndarray, tolerance: float = 2e-6) -> None:
    wanted = list(Session(model).run({"x": x}).values())
    for got, want in zip(run(lowered, x), wanted, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=tolerance * float(np.abs(want).max()), rtol=0)


def kinds(lowered: Lowered) -> list[type]:
    calls = [node for node in lowered.module.graph.nodes if node.op == "call_module"]
    return [type(lowered.module.get_submodule(str(node.target))) for node in calls]


@pytest.mark.parametrize("wrappers", ["none", "in", "out", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_runtime(form: str, wrappers: str) -> None:
    signature, body, shapes, size = FORMS[form]
    model = graph(signature, body, **shapes)
    if wrappers == "none":
        make_sparse(model)
    else:
        make_factorised(model, wrappers, 12)
    lowered = lower(model, CPU, None)
    (fate,) = lowered.fates
    # 24 x 36 is padded to what float16 kernels take, and computed so on the CPU, too
    assert (fate.runs, fate.reason, fate.shape, fate.padded) == ("dense", "no CUDA device", (24, 36), (32, 48))
    assert fate.wrappers == {"none": (), "in": ("in 12",), "out": ("out 12",), "both": ("in 12", "out 12")}[wrappers]
    assert kinds(lowered) == [BlockDiagonal] * (wrappers in {"in", "both"}) + [SparseLinear]
    # nothing of the layer is left outside of the module
    assert not [n for n in lowered.module.graph.nodes if n.op == "get_attr"]
    random = np.random.default_rng(3)
    agree(model, lowered, random.normal(size=size).astype(np.float32))
    agree(model, lowered, random.normal(size=(size[0] + 1, *size[1:])).astype(np.float32))


def test_a_wrapper_that_layers_share_runs_once() -> None:
    model = graph(
        "(float[n,32] x) => (float[n,64] y)",
        "a = MatMul(x, u)  b = MatMul(x, v)  y = Concat<axis=-1>(a, b)",
        u=(32, 32),
        v=(32, 32),
    )
    make_factorised(model, "in", 8)
    cores = [node for node in model.graph if node.outputs[0].name in {"a", "b"}]
    cores[1].replace_input_with(0, cores[0].inputs[0])
    lowered = lower(model, CPU, None)
    assert kinds(lowered).count(BlockDiagonal) == 1
    assert kinds(lowered).count(SparseLinear) == 2
    agree(model, lowered, np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32))


def test_what_is_read_elsewhere_stays() -> None:
    """A product whose value is also an output, and a bias that comes behind it."""
    model = graph(
        "(float[n,32] x) => (float[n,32] h, float[n,32] y)", "h = MatMul(x, w)  y = Add(h, b)", w=(32, 32), b=(32,)
    )
    make_sparse(model)
    lowered = lower(model, CPU, None)
    assert kinds(lowered) == [SparseLinear]
    agree(model, lowered, np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32))


DENSE = {
    "its weight is not 2:4: 4 of a group of 4": ("(float[n,32] x) => (float[n,32] y)", "y = MatMul(x, w)", (32, 32)),
    "the weight is the left operand": ("(float[32,n] x) => (float[32,n] y)", "y = MatMul(w, x)", (32, 32)),
    "2 inputs are no group of 4": ("(float[n,2] x) => (float[n,32] y)", "y = MatMul(x, w)", (2, 32)),
    "a grouped convolution": ("(float[1,8,4,4] x) => (float[1,8,4,4] y)", "y = Conv<group=8>(x, w)", (8, 1, 1, 1)),
    "torch has no sparse 3x3 convolution, and unfolding writes 9 times its input": (
        "(float[1,8,4,4] x) => (float[1,8,2,2] y)", "y = Conv(x, w)", (8, 8, 3, 3),
    ),
    "a padded 1x1 convolution": (
        "(float[1,8,4,4] x) => (float[1,8,6,6] y)", "y = Conv<pads=[1,1,1,1]>(x, w)", (8, 8, 1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", DENSE)
def test_dense_layers_say_why(reason: str) -> None:
    signature, body, shape = DENSE[reason]
    model = graph(signature, body, w=shape)
    lowered = lower(model, CPU, None)
    (fate,) = lowered.fates
    assert (fate.layer, fate.runs) == ("w", "dense")
    assert fate.reason.startswith(reason)
    assert not kinds(lowered)
    sizes = [d if isinstance(d, int) else 3 for d in model.graph.inputs[0].shape or ()]
    agree(model, lowered, np.random.default_rng(0).normal(size=sizes).astype(np.float32))


def test_a_layer_that_padding_doubles_stays() -> None:
    model = graph("(float[n,8] x) => (float[n,8] y)", "y = MatMul(x, w)", w=(8, 8))
    make_sparse(model)
    (fate,) = lower(model, CPU, None).fates
    assert fate.reason == "padded to 16x16 it is 4.0 times as large, and 2:4 saves half"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_products_in_half_precision(kind: torch.dtype) -> None:
    model = graph(
        "(float[n,t,32] x) => (float[n,t,24] y)",
        "h = MatMul(x, w)  i = Add(h, b)  s = Softmax<axis=-1>(i)  d = MatMul(s, v)  y = Relu(d)",
        w=(32, 32), b=(32,), v=(32, 24),
    )  # fmt: skip
    make_factorised(model, "both", 8)
    lowered = lower(model, CPU, kind)
    assert [fate.dtype for fate in lowered.fates] == [str(kind).removeprefix("torch.")] * 2
    weights = [p.dtype for p in lowered.module.state_dict().values()]
    assert set(weights) == {kind}
    agree(model, lowered, np.random.default_rng(0).normal(size=(2, 6, 32)).astype(np.float32), 4e-2)


def test_weights_that_overflow_stay_in_float32() -> None:
    model = graph("(float[n,32] x) => (float[n,32] y)", "h = MatMul(x, w)  y = Add(h, b)", w=(32, 32), b=(32,))
    make_sparse(model)
    bias = model.graph.initializers["b"]
    bias.const_value = ir.Tensor(np.full(32, 1e6, np.float32), name="b")
    lowered = lower(model, CPU, torch.float16)
    (fate,) = lowered.fates
    assert fate.reason == "its weights overflow float16"
    assert lowered.module.get_parameter("b").dtype == torch.float32
    agree(model, lowered, np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32), 1e-3)


def quantised(kind: str, body: str, weight: np.ndarray, axis: int, signature: str, **more: object) -> ir.Model:
    random = np.random.default_rng(5)
    outputs = weight.shape[axis]
    zero = np.array(-3, np.int8) if kind == "int8" else np.array(117, np.uint8)
    lines = f"q = QuantizeLinear(x, xs, xz)  d = DequantizeLinear(q, xs, xz)  e = DequantizeLinear<axis={axis}>(w, ws)"
    scales = random.uniform(0.005, 0.02, outputs).astype(np.float32)
    return graph(
        signature, f"{lines}  {body}", xs=np.array(0.05, np.float32), xz=zero, w=weight, ws=scales, **more
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Conv"])
def test_integers_are_multiplied_as_integers(kind: str, form: str) -> None:
    random = np.random.default_rng(2)
    weight = random.integers(-127, 128, (60, 60)).astype(np.int8)
    weight.reshape(60, 15, 4)[:, :, [1, 2]] = 0
    if form == "MatMul":
        signature, size = "(float[n,t,60] x) => (float[n,t,60] y)", (2, 5, 60)
        model = quantised(
            kind, "h = MatMul(d, e)  y = Add(h, b)", np.ascontiguousarray(weight.T), 1, signature, b=(60,)
        )
    elif form == "Gemm":
        signature, size = "(float[n,60] x) => (float[n,60] y)", (5, 60)
        model = quantised(kind, "y = Gemm<transB=1>(d, e, b)", weight, 0, signature, b=(60,))
    else:
        signature, size = "(float[n,60,h,i] x) => (float[n,60,h,i] y)", (2, 60, 3, 3)
        model = quantised(kind, "y = Conv(d, e)", weight.reshape(60, 60, 1, 1), 0, signature)
    lowered = lower(model, CPU, None)
    (fate,) = lowered.fates
    assert (fate.dtype, fate.shape, fate.padded) == ("int8", (60, 60), (64, 64))
    assert kinds(lowered) == [SparseLinearInt8]
    agree(model, lowered, random.normal(size=size).astype(np.float32), 1e-5)


def test_rows_of_fates_are_plain_data() -> None:
    model = graph("(float[n,32] x) => (float[n,32] y)", "y = MatMul(x, w)", w=(32, 32))
    make_factorised(model, "in", 16)
    (row,) = fate_rows(lower(model, CPU, None).fates)
    assert row == {
        "layer": "w", "runs": "dense", "reason": "no CUDA device", "shape": (32, 32), "padded": (32, 32),
        "dtype": "float32", "wrappers": ("in 16",),
    }  # fmt: skip
