"""Matrix products of every form: against ONNX Runtime, and in the instructions that they are meant to become."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph
from tvm_kernels import Kernels, assembly, compared, scheduled, x86

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'graphopt[tvm]'")

TOLERANCE = 1e-5

# (rows, inner, columns): of the block and below, primes, one of each, wider and higher than many blocks.
SIZES = [
    (1, 1, 1),
    (1, 64, 96),
    (1, 7, 3),
    (2, 5, 17),
    (5, 1, 8),
    (13, 37, 29),
    (12, 64, 24),
    (128, 24, 70),
    (61, 300, 5),
]


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _type(shape: tuple[int, ...]) -> str:
    return f"float[{','.join(map(str, shape))}]"


def _exact(kernels: Kernels) -> None:
    assert kernels.failures == []
    assert not any("matmul" in name for name in kernels.unscheduled)
    assert kernels.error < TOLERANCE


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_weights_in_panels(rows: int, inner: int, columns: int) -> None:
    model = graph(f"({_type((rows, inner))} x) => (float[a,b] y)", "y = MatMul(x, w)", w=(inner, columns))
    kernels = compared(model, {"x": _normal(rows, inner)})
    _exact(kernels)
    assert kernels.names == ({"matmul_packed"} if min(inner, columns) > 1 else {"matmul"})


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_two_computed_operands(rows: int, inner: int, columns: int) -> None:
    left, right = (2, 3, rows, inner), (3, inner, columns)
    model = graph(f"({_type(left)} x, {_type(right)} w) => (float[a,b,c,d] y)", "y = MatMul(x, w)")
    _exact(compared(model, {"x": _normal(*left), "w": _normal(*right, seed=1)}))


@pytest.mark.parametrize(("rows", "columns"), [(1, 33), (9, 16), (9, 20)])
def test_transposed_weight_with_bias_activation_and_residual(rows: int, columns: int) -> None:
    """Everything behind a product is computed at its blocks."""
    model = graph(
        f"(float[{rows},20] x, float[{rows},{columns}] r) => (float[a,b] y)",
        "g = Gemm <transB=1> (x, w, b)  h = Erf(g)  t = Tanh(h)  s = Sigmoid(t)  m = Mul(s, g)  y = Add(m, r)",
        w=(columns, 20), b=(columns,),
    )  # fmt: skip
    kernels = compared(model, {"x": _normal(rows, 20), "r": _normal(rows, columns, seed=1)})
    _exact(kernels)
    assert len(kernels.names) == 1


def test_one_weight_in_two_products_is_packed_once() -> None:
    model = graph(
        "(float[4,20] x, float[4,20] z) => (float[a,b] y, float[c,d] v)",
        "y = MatMul(x, w)  v = MatMul(z, w)",
        w=(20, 33),
    )
    module, _ = scheduled(model, x86())
    constants: list[object] = []
    tvm.relax.analysis.post_order_visit(
        module["main"], lambda e: constants.append(e.value) if isinstance(e, tvm.ir.GenericConst) else None
    )
    assert len({value.numpy().ctypes.data for value in constants}) == 1  # type: ignore[attr-defined]
    _exact(compared(model, {"x": _normal(4, 20), "z": _normal(4, 20, seed=1)}))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 31])
def test_rows_of_open_number(rows: int) -> None:
    model = graph("(float[n,m,24] x) => (float[n,m,40] y)", "h = MatMul(x, w)  y = Relu(h)", w=(24, 40))
    _exact(compared(model, {"x": _normal(2, rows, 24)}))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
def test_attention_of_open_length(length: int) -> None:
    model = graph(
        "(float[2,n,8] q, float[2,n,8] v) => (float[2,n,8] y)",
        "t = Transpose <perm=[0,2,1]> (q)  s = MatMul(q, t)  p = Softmax <axis=-1> (s)  y = MatMul(p, v)",
    )
    _exact(compared(model, {"q": _normal(2, length, 8), "v": _normal(2, length, 8, seed=1)}))


@pytest.mark.parametrize("rows", [1, 6])
def test_columns_that_are_no_neighbours(rows: int) -> None:
    """x w^T of computed arrays, without a copy of w: einsum keeps the transposition within the product."""
    model = graph(
        f"(float[2,{rows},30] x, float[2,19,30] w) => (float[a,b,c] y)", 'y = Einsum <equation="bij,bkj->bik"> (x, w)'
    )
    kernels = compared(model, {"x": _normal(2, rows, 30), "w": _normal(2, 19, 30, seed=1)})
    assert kernels.failures == []
    assert kernels.error < TOLERANCE


@pytest.mark.parametrize(
    "nodes",
    [
        "h = MatMul(w, x)  y = Relu(h)",
        "h = MatMul(x, x)  y = Tanh(h)",
        "h = MatMul(x, w)  y = Add(h, w)",
        "y = Gemm <transA=1, transB=1, alpha=0.5> (x, w)",
        'y = Einsum <equation="ab,cb->ca"> (x, w)',
    ],
    ids=[
        "weight on the left",
        "the operand twice",
        "the weight behind the product",
        "both transposed",
        "result transposed",
    ],
)
def test_other_places(nodes: str) -> None:
    model = graph("(float[19,19] x) => (y)", nodes, w=(19, 19))
    kernels = compared(model, {"x": _normal(19, 19)})
    assert kernels.failures == []
    assert kernels.error < TOLERANCE


def test_infinities_and_nan_stay_where_they_belong() -> None:
    model = graph("(float[9,12] x) => (float[a,b] y)", "h = MatMul(x, w)  y = Tanh(h)", w=np.ones((12, 21), np.float32))
    x = _normal(9, 12)
    x[1, 2], x[3, 4], x[5, 6], x[7, 0], x[7, 1] = np.inf, -np.inf, np.nan, np.inf, -np.inf
    module, _ = scheduled(model, x86())
    machine = tvm.relax.VirtualMachine(tvm.compile(module, target=x86()), tvm.cpu())
    y = machine["main"](tvm.runtime.tensor(x)).numpy()
    assert (y[1] == 1).all()
    assert (y[3] == -1).all()
    assert np.isnan(y[[5, 7]]).all()
    assert np.isfinite(y[[0, 2, 4, 6, 8]]).all()


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ({"kind": "llvm", "mcpu": "haswell"}, "vfmadd231ps\t%ymm"),
        ({"kind": "llvm", "mcpu": "skylake-avx512"}, "%zmm"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78ae"}, ".4s"),
    ],
    ids=["AVX2", "AVX-512", "NEON"],
)
def test_products_become_vector_instructions(target: dict[str, str], instruction: str) -> None:
    """The inner loop multiplies and adds vectors in registers, and stores none."""
    machine = tvm.target.Target(target)
    model = graph("(float[32,64] x) => (float[a,b] y)", "y = MatMul(x, w)", w=(64, 96))
    lines = assembly(scheduled(model, machine)[0], machine).splitlines()
    fused = [line for line in lines if "fmla" in line or "fmadd" in line]
    assert sum(instruction.split("\t")[-1] in line for line in fused) >= 12
