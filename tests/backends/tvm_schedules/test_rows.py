"""Element-wise functions, copies, reductions and normalisations: against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from text_graph import graph
from tvm_kernels import Kernels, assembly, compared, scheduled, x86

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'graphopt[tvm]'")

TOLERANCE = 1e-5

# Size of x, nodes from x to y, constants that they read.
FORMULAS: dict[str, tuple[Any, ...]] = {
    "softmax of rows": ((3, 5, 37), "y = Softmax <axis=-1> (x)"),
    "softmax of columns": ((3, 5, 37), "y = Softmax <axis=1> (x)"),
    "softmax of one": ((3, 1), "y = Softmax <axis=-1> (x)"),
    "log-softmax": ((4, 70), "y = LogSoftmax <axis=-1> (x)"),
    "mean of the middle": ((4, 7, 19), "y = ReduceMean <axes=[1], keepdims=0> (x)"),
    "mean of rows, more than the partial vectors": ((3, 5, 131), "y = ReduceMean <axes=[2], keepdims=1> (x)"),
    "mean of an image": ((2, 6, 5, 9), "y = ReduceMean <axes=[2,3], keepdims=0> (x)"),
    "largest": ((4, 33), "y = ReduceMax <axes=[1], keepdims=0> (x)"),
    "smallest of everything": ((4, 33), "y = ReduceMin <keepdims=0> (x)"),
    "product": ((4, 9), "y = ReduceProd <axes=[1], keepdims=1> (x)"),
    "where the largest is": ((4, 33), "i = ArgMax <axis=1, keepdims=1> (x)  y = Cast <to=1> (i)"),
    "norm and what divides by it": ((5, 20), "n = ReduceL2 <axes=[1], keepdims=1> (x)  y = Div(x, n)"),
    "layer norm": ((3, 7, 50), "y = LayerNormalization <axis=-1> (x, g, b)", {"g": (50,), "b": (50,)}),
    "instance norm written out": (
        (2, 3, 5, 7),
        "m = ReduceMean <axes=[2,3]> (x)  d = Sub(x, m)  s = Mul(d, d)  v = ReduceMean <axes=[2,3]> (s)  q = Sqrt(v)  "
        "y = Div(d, q)",
    ),
    "transposed": ((5, 33, 18), "y = Transpose <perm=[2,0,1]> (x)"),
    "split into heads": ((2, 9, 24), "r = Reshape(x, h)  t = Transpose <perm=[0,2,1,3]> (r)  y = Sigmoid(t)",
                         {"h": np.array([2, 9, 3, 8])}),
    "heads joined": ((2, 3, 9, 8), "t = Transpose <perm=[0,2,1,3]> (x)  r = Reshape(t, h)  y = Relu(r)",
                     {"h": np.array([2, 9, 24])}),
    "padded": ((3, 5, 7), "q = Pad(x, p)  y = Sigmoid(q)", {"p": np.array([0, 2, 1, 0, 0, 3])}),
    "concatenated": (
        (3, 5, 7), "a = Tanh(x)  b = Exp(x)  c = Concat <axis=1> (a, b, x)  y = Transpose <perm=[1,2,0]> (c)"
    ),
    "every second, backwards": (
        (6, 11), "h = Slice(x, s, e, a, t)  y = Exp(h)",
        {"s": np.array([10]), "e": np.array([-12]), "a": np.array([1]), "t": np.array([-2])},
    ),
    "powers": ((3, 40), "a = Abs(x)  p = Pow(x, two)  q = Pow(a, h)  y = Add(p, q)",
               {"two": np.array(2, np.float32), "h": np.array(0.7, np.float32)}),
    "activations": (
        (3, 40), "a = Elu(x)  b = Softplus(a)  c = HardSwish(b)  d = LeakyRelu(c)  e = Erf(d)  y = Selu(e)"
    ),
    "running sums": ((3, 17), "y = CumSum(x, a)", {"a": np.array(1)}),
    "enlarged": ((1, 2, 3, 5), 'y = Resize <mode="nearest"> (x, , r)', {"r": np.array([1, 1, 2, 2], np.float32)}),
    "looked up": ((9, 20), "g = Gather <axis=0> (x, i)  y = Tanh(g)", {"i": np.array([3, 0, 8, 3])}),
}  # fmt: skip


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _exact(kernels: Kernels) -> None:
    assert [f for f in kernels.failures if f.rule in ("product", "rows")] == []
    assert kernels.error < TOLERANCE


@pytest.mark.parametrize("case", FORMULAS.values(), ids=FORMULAS)
def test_formula(case: tuple[Any, ...]) -> None:
    shape, nodes, *constants = case
    model = graph(f"(float[{','.join(map(str, shape))}] x) => (y)", nodes, **(constants[0] if constants else {}))
    _exact(compared(model, {"x": _normal(*shape)}))


@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (1, 1)])
def test_open_sizes_may_be_zero(shape: tuple[int, int]) -> None:
    model = graph(
        "(float[n,m] x, float[m,k] w) => (float[n,m] y, float[n,k] z)",
        "y = Softmax <axis=-1> (x)  h = MatMul(x, w)  z = Relu(h)",
    )
    module, failures = scheduled(model, x86())
    machine = tvm.relax.VirtualMachine(tvm.compile(module, target=x86()), tvm.cpu())
    y, z = machine["main"](*(tvm.runtime.tensor(v) for v in (_normal(*shape), _normal(shape[1], 21))))
    assert failures == []
    assert y.numpy().shape == shape
    assert z.numpy().shape == (shape[0], 21)
    np.testing.assert_array_equal(y.numpy(), np.ones(shape, np.float32))
    if shape[1] == 0:
        assert not z.numpy().any()


def test_integers_and_truth_values() -> None:
    model = graph(
        "(int64[5,9] x, int64[5,1] z) => (int64[a,b] y)",
        "m = Mul(x, z)  s = ReduceSum <keepdims=1> (m, a)  g = Greater(x, z)  w = Where(g, s, x)  "
        "y = Transpose <perm=[1,0]> (w)",
        a=np.array([1]),
    )
    random = np.random.default_rng(0)
    _exact(compared(model, {"x": random.integers(-9, 9, (5, 9)), "z": random.integers(-9, 9, (5, 1))}))


@pytest.mark.parametrize("kind", ["double", "float16"])
def test_other_floats_keep_the_functions_of_tvm(kind: str) -> None:
    model = graph(f"({kind}[3,20] x) => (y)", "e = Exp(x)  l = Log(e)  s = Sigmoid(l)  y = Tanh(s)")
    x = _normal(3, 20).astype({"double": np.float64, "float16": np.float16}[kind])
    kernels = compared(model, {"x": x})
    assert kernels.failures == []
    assert kernels.error < {"double": 1e-14, "float16": 2e-3}[kind]


@pytest.mark.parametrize("rows", [1, 5])
def test_open_sizes(rows: int) -> None:
    model = graph(
        "(float[n,21] x) => (float[n,21] y)",
        "s = Softmax <axis=-1> (x)  m = ReduceMean <axes=[1], keepdims=1> (s)  d = Sub(s, m)  y = Tanh(d)",
    )
    _exact(compared(model, {"x": _normal(rows, 21)}))


def test_a_chain_of_dear_functions_compiles_in_pieces() -> None:
    """TVM's simplifiers write names out: nested, a chain of ten takes hours."""
    chain = "  ".join(f"h{i + 1} = {name}(h{i})" for i, name in enumerate(["Sigmoid", "Tanh", "Erf", "Exp", "Log"] * 2))
    kernels = compared(graph("(float[3,20] h0) => (float[3,20] h10)", chain), {"h0": _normal(3, 20)})
    _exact(kernels)
    assert len(kernels.names) == 1


def test_sums_of_rows_on_several_cores() -> None:
    model = graph("(float[300,800] x) => (float[300,800] y)", "y = Softmax <axis=-1> (x)")
    kernels = compared(model, {"x": _normal(300, 800)}, x86(cores=2))
    _exact(kernels)
    assert "T.parallel" in scheduled(model, x86(cores=2))[0].script()


def test_softmax_in_vectors() -> None:
    """No call of libm is left: exp is arithmetic on vectors."""
    target = x86()
    text = assembly(
        scheduled(graph("(float[30,64] x) => (float[30,64] y)", "y = Softmax <axis=-1> (x)"), target)[0], target
    )
    assert "expf" not in text
    assert text.count("vfmadd") >= 7


def test_nan_and_infinities_in_softmax() -> None:
    model = graph("(float[4,20] x) => (float[4,20] y)", "y = Softmax <axis=-1> (x)")
    x = _normal(4, 20)
    x[0, 3], x[1, 4], x[2, :5] = np.nan, -np.inf, -np.inf
    module, _ = scheduled(model, x86())
    y = tvm.relax.VirtualMachine(tvm.compile(module, target=x86()), tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    assert np.isnan(y[0]).all()
    assert y[1, 4] == 0
    assert (y[2, :5] == 0).all()
    np.testing.assert_allclose(y[1:].sum(axis=1), 1, rtol=1e-5)


def test_blocks_that_are_no_formulas_are_left_alone() -> None:
    model = graph("(float[4,5] x, int64[2,1] i, float[2,5] u) => (float[4,5] y)", "y = ScatterND(x, i, u)")
    module, failures = scheduled(model, x86())
    functions = {name.name_hint: f for name, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert [name for name, f in functions.items() if not f.attrs.get("tirx.is_scheduled", 0)] == ["scatter_nd"]
    assert failures == []


def test_chains_that_use_their_operand_twice_keep_formulas_short() -> None:
    """Put into one another, the formulas of this chain would read x a billion times."""
    steps = [f"a{i} = Neg(d{i}) b{i} = Abs(d{i}) c{i} = Mul(a{i}, b{i}) d{i + 1} = Sub(c{i}, d{i})" for i in range(19)]
    model = graph("(float[4,33] x) => (float[4,33] y)", "  ".join(["d0 = Relu(x)", *steps, "y = Relu(d19)"]))
    x = np.random.default_rng(0).uniform(-0.01, 0.01, (4, 33)).astype(np.float32)
    kernels = compared(model, {"x": x})
    assert kernels.failures == [] and kernels.unscheduled == set()
    assert kernels.error < TOLERANCE
