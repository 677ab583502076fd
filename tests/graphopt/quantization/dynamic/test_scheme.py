"""Products on integers whose scales are found as the data arrives: form, numbers, what ONNX Runtime fuses, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fusions import fused
from numpy.typing import NDArray
from text_graph import graph

from graphopt.executor import Session
from graphopt.model import check
from graphopt.quantization.dynamic.scheme import dynamic_layers, write_dynamic
from graphopt.quantization.rounding.interface import Rounded, WeightGrid, nearest
from graphopt.rewriting.scopes import graphs
from graphopt.target import QuantScheme

Floats = NDArray[np.float32]
RNG = np.random.default_rng(0)
DIMS = {1: "", 2: "n,", 3: "n,t,", 4: "n,2,t,"}
SHAPES = {1: (6,), 2: (7, 6), 3: (2, 3, 6), 4: (2, 2, 3, 6)}


def product(rank: int = 2, bias: tuple[int, ...] | None = (5,)) -> ir.Model:
    """MatMul of 6 to 5 channels, with an Add behind it where there is a bias."""
    body = "y = MatMul(x, w)" if bias is None else "m = MatMul(x, w)  y = Add(m, b)"
    parameters = {"w": (6, 5)} if bias is None else {"w": (6, 5), "b": bias}
    return graph(f"(float[{DIMS[rank]}6] x) => (float[{DIMS[rank]}5] y)", body, **parameters)


def quantised(model: ir.Model, **options: Any) -> ir.Model:
    """Everything that can be, and the model is valid after it."""
    keys, _ = dynamic_layers(model, products=True)
    assert keys
    assert write_dynamic(model, keys, **options) == []
    check(model)
    return model


def run(model: ir.Model, **feeds: Floats) -> Floats:
    """The output y."""
    return Session(model).run(feeds)["y"]


def normal(*shape: int) -> Floats:
    return RNG.normal(size=shape).astype(np.float32)


def as_integers(x: Floats) -> Floats:
    """What DynamicQuantizeLinear and back makes of a tensor: the definition of ONNX, in numpy."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.float32(np.clip(np.rint(-low / scale), 0, 255))
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def weight_as_integers(w: Floats, per_channel: bool = True) -> Floats:
    """Symmetric int8 of a weight (inputs, outputs)."""
    scale = np.abs(w).max(axis=0 if per_channel else None, keepdims=True) / np.float32(127)
    return np.clip(np.rint(w / scale), -127, 127) * scale


def values(model: ir.Model, name: str) -> Floats:
    return np.asarray(model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]


def text(model: ir.Model) -> list[str]:
    """One line a node."""
    return [
        f"{', '.join(str(v.name) for v in n.outputs)} = {n.op_type}({', '.join(str(v.name) for v in n.inputs if v)})"
        for n in model.graph
    ]


def test_golden() -> None:
    model = quantised(product())
    assert text(model) == [
        "x_quantized, x_scale, x_zero_point = DynamicQuantizeLinear(x)",
        "m_int32 = MatMulInteger(x_quantized, w_quantized, x_zero_point)",
        "m_float = Cast(m_int32)",
        "m_scale = Mul(x_scale, w_scale)",
        "m = Mul(m_float, m_scale)",
        "y = Add(m, b)",
    ]
    stored = model.graph.initializers
    assert set(stored) == {"w_quantized", "w_scale", "b"}
    assert values(model, "w_quantized").dtype == np.int8
    assert values(model, "w_scale").shape == (5,)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("per_channel", [True, False])
def test_numbers_are_those_of_the_definition(rank: int, per_channel: bool) -> None:
    model = product(rank)
    w, b, x = values(model, "w"), values(model, "b"), normal(*SHAPES[rank])
    found = run(quantised(model, per_channel=per_channel), x=x)
    np.testing.assert_allclose(found, as_integers(x) @ weight_as_integers(w, per_channel) + b, rtol=1e-5, atol=1e-5)
    assert np.abs(found - (x @ w + b)).max() > 1e-4  # it is quantised


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5)])
def test_one_reader_becomes_one_kernel(rank: int, bias: tuple[int, ...] | None) -> None:
    model = quantised(product(rank, bias))
    assert fused(model) == {"DynamicQuantizeMatMul": 1}


def test_a_bias_of_higher_rank_is_in_the_kernel_too() -> None:
    model = product(3, (1, 1, 5))
    x = normal(*SHAPES[3])
    before = run(model, x=x)
    quantised(model)
    assert len(Session(model, optimize=True).run({"x": x})) == 1
    assert np.abs(run(model, x=x) - before).max() < 0.1
    assert [n.op_type for n in model.graph][-1] == "Add"
    assert values(model, str(list(model.graph)[-1].inputs[1].name)).shape == (5,)  # type: ignore[union-attr]
    assert fused(model) == {"DynamicQuantizeMatMul": 1}


def test_a_bias_that_adds_an_axis_stays() -> None:
    model = graph("(float[n,6] x) => (float[1,n,5] y)", "m = MatMul(x, w)  y = Add(m, b)", w=(6, 5), b=(1, 1, 5))
    x = normal(3, 6)
    assert run(quantised(model), x=x).shape == (1, 3, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_what_three_products_read_is_quantised_once(bias: bool) -> None:
    added = "".join(f"  h{i} = Add(m{i}, b{i})" if bias else f"  h{i} = Identity(m{i})" for i in range(3))
    parameters = {f"b{i}": (5,) for i in range(3)} if bias else {}
    model = graph(
        "(float[n,t,6] x) => (float[n,t,5] y)",
        "m0 = MatMul(x, w0)  m1 = MatMul(x, w1)  m2 = MatMul(x, w2)" + added + "  y = Sum(h0, h1, h2)",
        **{f"w{i}": (6, 5) for i in range(3)},
        **parameters,
    )
    quantised(model)
    assert [n.op_type for n in model.graph].count("DynamicQuantizeLinear") == 1
    assert fused(model) == {"MatMulIntegerToFloat": 3}


def test_a_shared_weight_is_stored_once() -> None:
    model = graph("(float[n,6] x) => (float[n,6] y)", "m = MatMul(x, w)  y = MatMul(m, w)", w=(6, 6))
    quantised(model)
    assert set(model.graph.initializers) == {"w_quantized", "w_scale"}
    assert fused(model) == {"DynamicQuantizeMatMul": 2}


def test_rounding_is_asked_for_the_matrix_of_the_layer() -> None:
    asked: list[tuple[str, tuple[int, ...], WeightGrid]] = []

    def rounding(key: str, weight: Any, grid: WeightGrid, least_scale: Any = 0.0) -> Rounded:
        asked.append((key, weight.shape, grid))
        return nearest(key, weight, grid, least_scale)

    quantised(product(), rounding=rounding)
    assert asked == [("m", (1, 5, 6), WeightGrid(bits=8, symmetric=True, per_channel=True))]


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", ["none", "vector", "row", "column", "scalar", "whole", "computed"])
def test_gemm(trans_a: int, trans_b: int, c: str) -> None:
    third = {"none": "", "computed": ", r"}.get(c, ", c")
    constant = {"vector": (5,), "row": (1, 5), "column": (7, 1), "scalar": (), "whole": (7, 5)}.get(c)
    model = graph(
        f"(float[{'6,7' if trans_a else '7,6'}] x, float[7,5] other) => (float[7,5] y)",
        f"r = Relu(other)  y = Gemm<alpha=0.5, beta=2.0, transA={trans_a}, transB={trans_b}>(x, w{third})",
        w=(5, 6) if trans_b else (6, 5),
        **({"c": constant} if constant is not None else {}),
    )
    x, other = normal(*((6, 7) if trans_a else (7, 6))), normal(7, 5)
    w = values(model, "w").T if trans_b else values(model, "w")
    term = {"none": 0, "computed": np.maximum(other, 0)}.get(c)
    term = values(model, "c") if term is None else term
    left = x.T if trans_a else x
    found = run(quantised(model), x=x, other=other)
    want = as_integers(left) @ weight_as_integers(0.5 * w) + 2 * term
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_gemm_with_a_bias_becomes_one_kernel() -> None:
    model = graph(
        "(float[n,6] x) => (float[n,5] y)", "y = Gemm<transB=1, beta=0.5>(x, w, c)", w=(5, 6), c=(1, 5)
    )  # fmt: skip
    assert fused(quantised(model)) == {"DynamicQuantizeMatMul": 1}


def test_two_activations_on_request_only() -> None:
    model = graph("(float[n,4,6] a, float[n,6,3] b) => (float[n,4,3] y)", "y = MatMul(a, b)")
    keys, skipped = dynamic_layers(model)
    assert not keys
    assert skipped[0].reason == "its weight is not a constant"
    a, b = normal(2, 4, 6), normal(2, 6, 3)
    found = run(quantised(model), a=a, b=b)
    np.testing.assert_allclose(found, as_integers(a) @ as_integers(b), rtol=1e-5, atol=1e-5)


def test_batched_weights_have_one_scale() -> None:
    model = graph("(float[3,t,6] x) => (float[3,t,5] y)", "y = MatMul(x, w)", w=(3, 6, 5))
    w, x = values(model, "w"), normal(3, 2, 6)
    found = run(quantised(model), x=x)
    np.testing.assert_allclose(found, as_integers(x) @ weight_as_integers(w, per_channel=False), rtol=1e-5, atol=1e-5)
    assert values(model, "w_scale").shape == ()


def test_no_samples_give_no_results() -> None:
    for optimize in (False, True):
        found = Session(quantised(product()), optimize=optimize).run({"x": normal(0, 6)})["y"]
        assert found.shape == (0, 5)


def test_a_constant_activation_of_zeros_is_exact() -> None:
    model = quantised(product())
    np.testing.assert_array_equal(
        run(model, x=np.zeros((2, 6), np.float32)), np.tile(values(model, "b"), (2, 1))
    )  # fmt: skip


def test_branches_are_quantised_and_a_captured_tensor_once_in_each() -> None:
    model = graph(
        "(bool c, float[n,6] x) => (float[n,5] y)",
        """y = If (c) <then_branch = one () => (float[n,5] p) { a = MatMul(x, w)  b = MatMul(x, v)  p = Add(a, b) },
        else_branch = two () => (float[n,5] q) { q = MatMul(x, w) }>""".replace("\n", " ").replace("  ", " "),
        w=(6, 5), v=(6, 5),
    )  # fmt: skip
    x = normal(4, 6)
    w, v = values(model, "w"), values(model, "v")
    quantised(model)
    operators = [node.op_type for body in list(graphs(model))[1:] for node in body]
    assert operators.count("DynamicQuantizeLinear") == 2
    assert operators.count("MatMulInteger") == 3
    assert set(model.graph.initializers) == {"w_quantized", "w_scale", "v_quantized", "v_scale"}
    for c in (True, False):
        found = Session(model, optimize=True).run({"c": np.array(c), "x": x})["y"]
        want = as_integers(x) @ (weight_as_integers(w) + (weight_as_integers(v) if c else 0))
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_older_opsets_are_raised() -> None:
    model = graph("(float[n,6] x) => (float[n,5] y)", "y = MatMul(x, w)", opset=9, w=(6, 5))
    x = normal(2, 6)
    before = run(model, x=x)
    quantised(model)
    assert model.graph.opset_imports[""] == 11
    assert np.abs(run(model, x=x) - before).max() < 0.1


@pytest.mark.parametrize(
    ("signature", "body", "parameters", "reason"),
    [
        ("(float[6] x) => (float y)", "y = MatMul(x, w)", {"w": (6,)}, "its weight is a vector"),
        ("(float[6,n] x) => (float[5,n] y)", "y = MatMul(w, x)", {"w": (5, 6)}, "stands on the left"),
        ("(float[n,0] x) => (float[n,5] y)", "y = MatMul(x, w)", {"w": (0, 5)}, "its weight is empty"),
        ("(float16[n,6] x) => (float16[n,5] y)", "y = MatMul(x, w)", {"w": np.ones((6, 5), np.float16)},
         "computes in float16"),
        ("(double[n,6] x) => (double[n,5] y)", "y = MatMul(x, w)", {"w": np.ones((6, 5))}, "computes in double"),
        ("(float[n,6] x) => (float[n,5] y)", "y = MatMul(x, w)", {"w": np.full((6, 5), np.inf, np.float32)},
         "holds inf or nan"),
        ("(float[n,6] x, float[6,5] w) => (float[n,5] y)", "y = Gemm(x, w)", {}, "its weight is not a constant"),
        ("(float[n,3,8,8] x) => (float[n,4,8,8] y)", "y = Conv(x, w)", {"w": (4, 3, 1, 1)}, "8 to 18 times"),
        ("(uint8[n,6] i) => (float[n,5] y)", "x = DequantizeLinear(i, s)  y = MatMul(x, w)",
         {"s": np.float32(0.1), "w": (6, 5)}, "quantised already"),
        ("(float[t,n,6] x) => (float[t,1,n,4] y)", "y = GRU<hidden_size=4>(x, w, r)",
         {"w": (1, 12, 6), "r": (1, 12, 4)}, "no int8 kernel for GRU"),
    ],
)  # fmt: skip
def test_what_stays_in_float_says_why(signature: str, body: str, parameters: dict[str, Any], reason: str) -> None:
    model = graph(signature, body, **parameters)
    before = [node.op_type for node in model.graph]
    keys, skipped = dynamic_layers(model)
    assert not keys
    assert len(skipped) == 1
    assert reason in skipped[0].reason
    assert [s.reason for s in write_dynamic(model, ["y"])] == [skipped[0].reason]
    assert [node.op_type for node in model.graph] == before


def test_weights_that_callers_can_override_stay() -> None:
    model = product(bias=None)
    model.graph.inputs.append(model.graph.initializers["w"])
    keys, skipped = dynamic_layers(model, products=True)
    assert not keys
    assert skipped[0].reason == "its weight is not a constant"


def test_excluded_nodes_stay() -> None:
    model = product()
    next(iter(model.graph)).name = "layers.0.q"
    keys, skipped = dynamic_layers(model, ("layers.*.q",))
    assert not keys
    assert skipped[0].reason == "excluded by 'layers.*.q'"


def test_a_target_without_such_kernels_refuses_all() -> None:
    keys, skipped = dynamic_layers(product(), scheme=QuantScheme(dynamic=()))
    assert not keys
    assert skipped[0].reason == "the target quantises no activations as they arrive"


def test_only_what_was_asked_for_is_written() -> None:
    model = graph("(float[n,6] x) => (float[n,6] y)", "m = MatMul(x, w)  y = MatMul(m, v)", w=(6, 6), v=(6, 6))
    assert write_dynamic(model, ["y"]) == []
    assert [n.op_type for n in model.graph][:3] == ["MatMul", "DynamicQuantizeLinear", "MatMulInteger"]
    keys, _ = dynamic_layers(model)
    assert list(keys) == ["m"]
