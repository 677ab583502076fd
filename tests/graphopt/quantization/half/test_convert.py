"""float16 and bfloat16: what becomes half, what stays with its reason, valid models that ONNX Runtime executes."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import context, run
from text_graph import graph

from graphopt import calibration, registry
from graphopt.base import PassResult
from graphopt.errors import UsageError
from graphopt.executor import Session
from graphopt.model import infer_shapes
from graphopt.quantization.half.convert import Converted, to_half
from graphopt.quantization.half.scheme import quantise_half

RNG = np.random.default_rng(0)


def convert(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16, **options: Any) -> Converted:
    infer_shapes(model)
    done = to_half(model, dtype, **options)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return done


def close(model: ir.Model, feeds: dict[str, Any], tolerance: float = 3e-3, **options: Any) -> Converted:
    """Convert, run both; inputs and outputs are float32."""
    before = run(model, feeds)
    done = convert(model, **options)
    for a, b in zip(before, run(model, feeds), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(1e-6, float(np.abs(a).max(initial=0))))
    return done


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def types(model: ir.Model) -> dict[str, str]:
    """Operators and the type of what they give; Casts by where they lead."""
    return {f"{n.op_type}:{n.outputs[0].name}": n.outputs[0].dtype.name for g in (model.graph,) for n in g}


def why(done: Converted | PassResult) -> str:
    skips = done.kept if isinstance(done, Converted) else done.skipped
    return "\n".join(f"{skip.node}: {skip.reason}" for skip in skips)


def casts(model: ir.Model) -> int:
    return sum(n.op_type == "Cast" for n in model.graph.all_nodes())


def mlp(**more: Any) -> ir.Model:
    return graph(
        "(float[N,16] x) => (float[N,4] y)", "h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v)",
        w=(16, 8), b=(8,), v=(8, 4), **more,
    )  # fmt: skip


def test_a_network_becomes_half_between_two_casts() -> None:
    model = mlp()
    done = close(model, {"x": normal(5, 16)})
    assert (done.nodes, done.casts, done.kept) == (3, 2, [])
    assert [n.op_type for n in model.graph] == ["Cast", "Gemm", "Relu", "MatMul", "Cast"]
    assert {v.const_value.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert set(model.graph.initializers) == {"w", "b", "v"}
    assert model.graph.outputs[0].name == "y"
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_keep_io_false_changes_the_interface() -> None:
    model = mlp()
    x = normal(5, 16)
    before = run(model, {"x": x})[0]
    done = convert(model, keep_io=False)
    assert done.casts == 0
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    after = run(model, {"x": x.astype(np.float16)})[0]
    np.testing.assert_allclose(after.astype(np.float32), before, atol=0.02)


def test_bfloat16_is_valid_and_raises_the_opset() -> None:
    model = graph(
        "(float[1,3,8,8] x) => (float[1,4,6,6] y)", "c = Conv(x, w, b)  y = Relu(c)", w=(4, 3, 3, 3), b=(4,), opset=17
    )
    done = convert(model, ir.DataType.BFLOAT16)
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.BFLOAT16
    assert model.opset_imports[""] >= 22
    assert any("opset 17 -> 22" in note for note in done.notes)


def test_inputs_that_the_schema_keeps_in_float32() -> None:
    model = graph(
        "(float[1,2,4,4] x) => (float[1,2,8,8] y)", "y = Resize<mode=\"linear\">(x, , s)",
        s=np.array([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    done = close(model, {"x": normal(1, 2, 4, 4)})
    assert done.nodes == 1
    assert model.graph.initializers["s"].const_value.dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_recurrent_layers(op: str, gates: int) -> None:
    model = graph(
        "(float[6,N,5] x) => (float[6,1,N,7] y)", f"y = {op}<hidden_size=7>(x, w, r, b)",
        w=(1, 7 * gates, 5), r=(1, 7 * gates, 7), b=(1, 14 * gates),
    )  # fmt: skip
    assert close(model, {"x": normal(6, 2, 5)}, tolerance=1e-2).nodes == 1
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT16


def test_constants_in_nodes_casts_and_fillers() -> None:
    model = graph(
        "(float[2,4] x, int64[1] n) => (float[2,4] y, float[2,4] z)",
        """c = Constant<value_float=0.5>()  h = Mul(x, c)  f = ConstantOfShape<value=float[1] {2.0}>(n)
        b = Greater(x, c)  m = Cast<to=1>(b)  z = Mul(h, m)  y = Mul(h, f)""",
    )  # fmt: skip
    done = close(model, {"x": normal(2, 4), "n": np.array([1])})
    assert not done.kept
    kinds = types(model)
    assert kinds["Cast:m"] == kinds["ConstantOfShape:f"] == "FLOAT16"
    assert "Constant" not in {n.op_type for n in model.graph}


def test_bodies_of_if_loop_and_scan() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2,3] x, bool c, bool d, int64 m) => (float[2,3] y, float[K,2,3] s, float[2,3] o) {
        one = Constant<value_float=0.25>()
        h = Add(x, one)
        y1 = If (c) <then_branch = t () => (float[2,3] a) { a = Mul(h, h) },
                     else_branch = e () => (float[2,3] b) { b = Identity(one2)  }>
        yes = Or(c, d)
        y, s = Loop (m, yes, y1) <body = l (int64 i, bool k, float[2,3] v) => (bool k2, float[2,3] w, float[2,3] u)
                     { k2 = Identity(k) w = Add(v, h) u = Mul(w, one) }>
        z = Constant<value_float=0.0>()
        start = Mul(x, z)
        p, q = Scan <num_scan_inputs=1, body = n (float[2,3] st, float[2,3] el) => (float[2,3] st2, float[2,3] ou)
                     { st2 = Add(st, el) ou = Identity(st) }> (start, s)
        o = Identity(p)
    }""".replace("b = Identity(one2)", "two = Constant<value_float=2.0>() b = Mul(h, two)")
    )
    infer_shapes(model)
    for flag in (True, False):
        done = close(
            model.clone(),
            {"x": normal(2, 3), "c": np.array(flag), "d": np.array(True), "m": np.array(3)},
            tolerance=1e-2,
        )
        assert not done.kept, why(done)
        assert done.nodes >= 6
    convert(model)
    inner = {v.dtype for n in model.graph.all_nodes() for v in n.outputs if n.op_type in {"Mul", "Add"}}
    assert inner == {ir.DataType.FLOAT16}


def test_a_loop_that_carries_what_stays_in_float32_is_cast_inside() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x, int64 m, bool c) => (float[4] y) {
        y = Loop (m, c, x) <body = l (int64 i, bool k, float[4] v) => (bool k2, float[4] w)
                     { k2 = Identity(k) e = Exp(v) f = Neg(e) w = Tanh(f) }>
    }""")
    done = close(model, {"x": normal(4), "m": np.array(2), "c": np.array(True)}, tolerance=1e-2)
    assert "Exp" in why(done)
    assert "17" not in why(done)


def test_functions_are_inlined() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[2,3] x) => (float[2,3] y) { y = my.twice(x) }
    <domain: "my", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }""")
    done = close(model, {"x": normal(2, 3)})
    assert done.nodes == 1


def test_masks_come_into_the_range_and_infinities_stay() -> None:
    model = graph(
        "(float[2,8] x, bool[2,8] m, float[2,8] a) => (float[2,8] y, float[2,8] z)",
        """s = Where(m, x, lowest)  t = Add(s, a)  y = Softmax<axis=-1>(t)  u = Where(m, x, inf)  z = Relu(u)""",
        lowest=np.array(np.finfo(np.float32).min), inf=np.array(-np.inf, np.float32),
    )  # fmt: skip
    mask = np.ones((2, 8), bool)
    mask[0, :3] = mask[1] = False
    # a row that is masked altogether must stay finite, whatever is added
    done = close(model, {"x": normal(2, 8), "m": mask, "a": np.full((2, 8), -100, np.float32)})
    assert any("stand for infinity" in note for note in done.notes)
    assert float(model.graph.initializers["lowest"].const_value.numpy()) == -32752
    assert np.isneginf(model.graph.initializers["inf"].const_value.numpy())


def test_a_mask_computed_from_integers_is_cast_without_overflow() -> None:
    model = graph(
        "(float[2,8] x, int64[2,8] m) => (float[2,8] y)",
        "f = Cast<to=1>(m)  g = Sub(one, f)  h = Mul(g, low)  s = Add(x, h)  y = Softmax<axis=-1>(s)",
        one=np.array(1, np.float32), low=np.array(-3.4e38, np.float32),
    )  # fmt: skip
    done = close(model, {"x": normal(2, 8), "m": np.array([[0, 1] * 4, [1] * 8])})
    assert "positions or counts" in why(done)


def test_a_bound_takes_the_whole_range() -> None:
    model = graph(
        "(float[4] x) => (float[4] y)", "y = Clip(x, low, high)",
        low=np.array(0, np.float32), high=np.array(np.finfo(np.float32).max),
    )  # fmt: skip
    close(model, {"x": np.array([-1, 1, 40000, 65504], np.float32)})
    assert float(model.graph.initializers["high"].const_value.numpy()) == 65504


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([1, 1e5, 2, 3], np.float32), "its constant 'c' reaches 1e+05, beyond float16"),
        (np.array(1e-12, np.float32), "its constant 'c' (1e-12) is zero in float16"),
        (np.array([1e-7, 2.2e-7, 3.3e-7, 1.1e-7], np.float32), "its constant 'c' loses"),
    ],
)
def test_constants_that_half_cannot_hold(value: np.ndarray, reason: str) -> None:
    model = graph("(float[3,4] x) => (float[3,4] y)", "r = Relu(x)  y = Add(r, c)", c=value)
    assert reason in why(close(model, {"x": normal(3, 4)}))


def test_bfloat16_holds_what_float16_does_not() -> None:
    model = graph("(float[3,4] x) => (float[3,4] y)", "y = Add(x, c)", c=np.array([1, 1e5, 1e-12, 3], np.float32))
    assert not convert(model, ir.DataType.BFLOAT16).kept


def test_a_division_by_a_guarded_norm_does_not_divide_by_zero() -> None:
    model = graph(
        "(float[2,4] x) => (float[2,4] y)",
        "n = ReduceL2<axes=[-1], keepdims=1>(x)  g = Max(n, eps)  e = Expand(g, s)  y = Div(x, e)",
        eps=np.array(1e-12, np.float32), s=np.array([2, 4]),
    )  # fmt: skip
    x = normal(2, 4)
    x[0] = 0
    done = close(model, {"x": x})
    assert "adds up" in why(done)
    assert "must not become zero" in why(done)


def test_a_written_out_norm_stays_between_one_pair_of_casts() -> None:
    model = graph(
        "(float[2,64] x) => (float[2,64] y)",
        """r = Relu(x)  m = ReduceMean<axes=[-1]>(r)  d = Sub(r, m)  q = Pow(d, two)  v = ReduceMean<axes=[-1]>(q)
        e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)  y = Mul(n, g)""",
        two=np.array(2, np.float32), eps=np.array(1e-6, np.float32), g=(64,),
    )  # fmt: skip
    done = close(model, {"x": 300 * normal(2, 64)})
    assert {skip.node.split("(")[0] for skip in done.kept} == {"ReduceMean", "Pow", "Add", "Sqrt"}
    assert casts(model) == 6  # the border, two into the sums, two out of them


def test_what_stands_between_two_nodes_in_float32_is_not_cast_back_and_forth() -> None:
    model = graph(
        "(float[4,8] x) => (float[8,4] y)", "r = Relu(x)  e = Exp(r)  t = Transpose(e)  z = Exp(t)  y = Neg(z)"
    )
    done = close(model, {"x": normal(4, 8)})
    assert "between operators in float32" in why(done)
    assert casts(model) == 4


def test_positions_stay_in_float32() -> None:
    model = graph(
        "(float[1,4096,8] x) => (float[1,4096,8] y)",
        """n = Shape<start=1, end=2>(x)  k = Squeeze(n)  p = Range(zero, k, one)  f = Cast<to=1>(p)
        c = Unsqueeze(f, last)
        a = Mul(c, w)  s = Sin(a)  y = Mul(x, s)""",
        zero=np.array(0), one=np.array(1), last=np.array([1]), w=np.linspace(0.5, 1, 8).astype(np.float32),
    )  # fmt: skip
    done = close(model, {"x": np.ones((1, 4096, 8), np.float32)})
    assert "positions or counts" in why(done)


def test_images_of_bytes_are_no_positions() -> None:
    model = graph("(uint8[1,4] x) => (float[1,4] y)", "f = Cast<to=1>(x)  y = Mul(f, c)", c=np.array(0.5, np.float32))
    assert not close(model, {"x": np.array([[0, 1, 128, 255]], np.uint8)}).kept


def test_sums_by_scattering_stay() -> None:
    model = graph(
        "(float[4,2] x, int64[3,1] i, float[3,2] u) => (float[4,2] y)", 'y = ScatterND<reduction="add">(x, i, u)',
    )  # fmt: skip
    done = close(model, {"x": normal(4, 2), "i": np.array([[0], [0], [3]]), "u": normal(3, 2)})
    assert "adds up" in why(done)


def test_sequences_and_unknown_operators_stay() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
    g (float[2,3] x) => (float[2,3] y, float[2,3] z) {
        r = Relu(x)
        s = SequenceConstruct(r)
        i = Constant<value_int=0>()
        y = SequenceAt(s, i)
        z = acme.Thing(r)
    }""")
    infer_shapes(model)
    done = to_half(model, ir.DataType.FLOAT16)
    assert "it handles sequences" in why(done)
    assert "no schema of acme.Thing" in why(done)


def test_operators_of_the_runtime_are_read_off_its_schemas() -> None:
    model = graph(
        "(float[2,3,8] x) => (float[2,3,8] y)",
        "z = com.microsoft.SkipLayerNormalization(x, x, g, b)  y = com.microsoft.Gelu(z)",
        imports='"com.microsoft" : 1', g=(8,), b=(8,),
    )  # fmt: skip
    done = close(model, {"x": normal(2, 3, 8)}, tolerance=5e-3)
    assert done.nodes == 2


def test_quantised_layers_stay_as_they_are() -> None:
    model = graph(
        "(float[2,4] x) => (float[2,4] y)",
        """q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, t)
        m = MatMul(d, e)  y = Relu(m)""",
        s=np.array(0.05, np.float32), z=np.array(128, np.uint8), t=np.array(0.1, np.float32),
        w=RNG.integers(-9, 9, (4, 4)).astype(np.int8),
    )  # fmt: skip
    done = close(model, {"x": normal(2, 4)})
    assert why(done).count("quantised already") == 4
    assert done.nodes == 1


def ctx(model: ir.Model, target: str, data: dict[str, Any] | None = None) -> Any:
    found = dataclasses.replace(context(), target=registry.target(target))
    return found if data is None else dataclasses.replace(found, calibration=calibration.load(data, model))


def half(model: ir.Model, scheme: str, target: str, data: dict[str, Any] | None = None) -> PassResult:
    return quantise_half(model, ctx(model, target, data), scheme, exclude=(), samples=64)


def test_activations_beyond_the_range_stay_in_float32_with_the_reason() -> None:
    def model() -> ir.Model:
        return graph(
            "(float[N,4] x) => (float[N,4] y)", "a = Mul(x, c)  b = Mul(a, a)  d = Mul(b, e)  y = Tanh(d)",
            c=np.array(100, np.float32), e=np.array(1e-5, np.float32),
        )  # fmt: skip

    x = np.linspace(-20, 20, 64, dtype=np.float32).reshape(16, 4)
    blind, seeing = model(), model()
    result = half(seeing, "fp16", "jetson-orin", {"x": x})
    assert "'b' reaches 4e+06 on the calibration data; float16 ends at 65504" in why(result)
    want = run(model(), {"x": x})[0]
    np.testing.assert_allclose(run(seeing, {"x": x})[0], want, atol=3e-3)
    assert any("was not checked" in note for note in half(blind, "fp16", "jetson-orin").notes)
    gave = {v.name: v.dtype for n in blind.graph for v in n.outputs}
    assert gave["b"] == ir.DataType.FLOAT16  # without data nobody knows


def test_the_target_decides() -> None:
    with pytest.raises(UsageError, match=r"target cpu does not execute bfloat16.*take scheme=fp16"):
        half(mlp(), "bf16", "cpu")
    slow, fast = half(mlp(), "fp16", "cpu"), half(mlp(), "fp16", "jetson-orin")
    assert any(note.startswith("warning: float16 saves memory on target cpu, not time") for note in slow.notes)
    assert not any("not time" in note for note in fast.notes)
    assert half(mlp(), "bf16", "torch-cuda").changed


def test_operators_without_a_kernel_on_the_target_and_excluded_ones_stay() -> None:
    done = close(mlp(), {"x": normal(3, 16)}, float_ops=("Relu",), exclude=("MatMul*",))
    assert "the target has no float16 kernel for Relu" in why(done)
    assert "excluded by 'MatMul*'" in why(done)


@pytest.mark.parametrize("name", ["cpu", "cpu-arm64"])
@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_products_behind_recurrent_layers_stay_in_float32_where_the_runtime_dies(operator, gates, name) -> None:
    """Batch-first recurrent layers end in Transpose<perm=[1,0,2]>: ONNX Runtime cannot load the product behind it."""
    model = graph(
        "(float[5,N,6] x) => (float[N,5,3] y)",
        f"h, last = {operator} <hidden_size=4> (x, w, r)  s = Squeeze(h, axes)  t = Transpose <perm=[1,0,2]> (s)  "
        "y = MatMul(t, v)",
        w=normal(1, gates * 4, 6), r=normal(1, gates * 4, 4), v=normal(4, 3), axes=np.array([1], np.int64),
    )  # fmt: skip
    before, x = model.clone(), normal(5, 2, 6)
    result = half(model, "fp16", name)
    assert result.changed and "cannot load float16 products behind a Transpose" in why(result)
    found = Session(model, optimize=True).run({"x": x})["y"]
    np.testing.assert_allclose(found, run(before, {"x": x})[0], atol=1e-2)
    assert not half(before, "fp16", "jetson-orin").skipped


def test_weights_that_two_types_read_are_stored_in_both() -> None:
    model = graph(
        "(float[2,4] x) => (float[2,4] y)",
        "a = Mul(x, c)  b = Pow(c, two)  y = Mul(a, b)",
        c=(4,),
        two=np.array(2, np.float32),
    )
    close(model, {"x": normal(2, 4)})
    kinds = {v.const_value.dtype for name, v in model.graph.initializers.items() if name.startswith("c")}
    assert kinds == {ir.DataType.FLOAT, ir.DataType.FLOAT16}


def test_models_that_are_half_already_do_not_change() -> None:
    model = graph("(float16[2,4] x) => (float16[2,4] y)", "y = Mul(x, c)", c=np.ones(4, np.float16))
    result = half(model, "fp16", "jetson-orin")
    assert not result.changed
    assert result.notes == ["nothing is float32"]


@pytest.mark.parametrize("first", ["fp16", "bf16"])
def test_what_stayed_in_float32_stays_when_the_model_is_converted_again(first: str) -> None:
    """Without the data that showed why, a second conversion would let it overflow."""
    model = graph(
        "(float[N,4] x) => (float[N,4] y)", "a = Mul(x, c)  b = Mul(a, a)  d = Mul(b, e)  y = Tanh(d)",
        c=np.array(100, np.float32), e=np.array(1e-5, np.float32),
    )  # fmt: skip
    assert half(model, first, "jetson-orin", {"x": np.full((8, 4), 20, np.float32)}).changed
    before = {v.name: v.dtype for n in model.graph for v in n.outputs}
    again = half(model, "fp16", "jetson-orin")
    assert not again.changed and "was left so" in again.notes[0]
    assert {v.name: v.dtype for n in model.graph for v in n.outputs} == before


def test_bfloat16_rounds_as_it_should() -> None:
    model = mlp()
    weights = model.graph.initializers["w"].const_value.numpy().copy()
    convert(model, ir.DataType.BFLOAT16)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weights.astype(ml_dtypes.bfloat16))
