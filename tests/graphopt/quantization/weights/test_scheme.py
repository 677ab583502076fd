"""Weights as integers: what runs agrees with what numpy unpacks, in every form, for every operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.rounding.interface import WeightGrid, nearest
from graphopt.quantization.weights.readers import weights_of
from graphopt.quantization.weights.scheme import Written, weight_layers, write_weights
from graphopt.target import WeightKernels

RNG = np.random.default_rng(0)
KERNELS = WeightKernels("MatMulNBits", inputs=1, inputs_small_block=1, outputs=1, table=1)
ARITHMETIC = WeightKernels("arithmetic")
STANDARD = WeightKernels("DequantizeLinear")


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    """The first output; products with integer weights multiply floats, so that only the weights can differ."""
    copy = private_clone(model)
    for node in copy.graph:
        if "accuracy_level" in node.attributes:
            node.attributes.add(ir.AttrInt64("accuracy_level", 0))
    return np.asarray(next(iter(Session(copy).run(feeds).values())))


def written(model: ir.Model, kernels: WeightKernels, **options: Any) -> tuple[ir.Model, Written]:
    copy = private_clone(model)
    keys, _ = weight_layers(copy, kernels=kernels, **options)
    return copy, write_weights(copy, keys, rounding=nearest, kernels=kernels, **options)


def on_grid(model: ir.Model, bits: int, block: int | None, *, symmetric: bool, full: bool | None = None) -> ir.Model:
    """The model with every weight on its grid, in floats: made by numpy alone."""
    copy = private_clone(model)
    for weight in weights_of(copy)[0]:
        reader, like = weight.readers[0], weight.array
        grid = WeightGrid(bits, symmetric, True, block, full=symmetric and bits < 8 if full is None else full)
        found = reader.restored(nearest("", reader.matrices(like), grid).dequantised(), like).astype(like.dtype)
        weight.value.const_value = ir.Tensor(np.ascontiguousarray(found), name=weight.value.name)
    return copy


def distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def holds(model: ir.Model, integers: ir.Model, rounded: ir.Model, tolerance: float = 1e-6, **feeds: Any) -> None:
    """What runs on integers is the model with rounded weights, and not the float model."""
    found = run(integers, **feeds)
    assert distance(found, run(rounded, **feeds)) < tolerance
    assert distance(found, run(model, **feeds)) > 3 * tolerance


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def product(kind: str, columns: int, rows: int = 6) -> tuple[ir.Model, np.ndarray]:
    k, n = columns, rows
    if kind == "MatMul":
        return graph(f"(float[2,3,{k}] x) => (float[2,3,{n}] y)", "y = MatMul (x, w)", w=(k, n)), random(2, 3, k)
    if kind == "Gemm":
        body = "y = Gemm <alpha = -0.5, beta = 2.0> (x, w, b)"
        return graph(f"(float[3,{k}] x) => (float[3,{n}] y)", body, w=(k, n), b=(n,)), random(3, k)
    return graph(f"(float[3,{k}] x) => (float[3,{n}] y)", "y = Gemm <transB = 1> (x, w)", w=(n, k)), random(3, k)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block"), [(64, 16), (50, 16), (7, 32), (172, 64), (300, 256)])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm transposed"])
def test_the_kernel_reads_what_numpy_rounds(kind: str, columns: int, block: int, bits: int, symmetric: bool) -> None:
    model, x = product(kind, columns)
    found, done = written(model, KERNELS, bits=bits, block=block, symmetric=symmetric)
    assert ops(found) == ["MatMulNBits"] and set(done.forms.values()) == {"kernel"}
    own = found.graph[0].attributes["block_size"].as_int()
    assert own <= block and -columns % own <= max(columns / 8, 15)
    holds(model, found, on_grid(model, bits, own, symmetric=symmetric), x=x)


def test_the_kernel_makes_integers_of_its_input_unless_told_otherwise() -> None:
    model, x = product("MatMul", 64)
    found, _ = written(model, KERNELS, bits=8)
    assert found.graph[0].attributes["accuracy_level"].as_int() == 4
    as_written = np.asarray(next(iter(Session(found).run({"x": x}).values())))
    assert 1e-4 < distance(as_written, run(found, x=x)) < 2e-2


FOLDED: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "MatMul": ("(float[2,3,64] x) => (float[2,3,30] y)", "y = MatMul (x, w)", {"w": (64, 30)}, (2, 3, 64)),
    "batched": ("(float[4,3,64] x) => (float[4,3,30] y)", "y = MatMul (x, w)", {"w": (4, 64, 30)}, (4, 3, 64)),
    "left": ("(float[2,64,30] x) => (float[2,20,30] y)", "y = MatMul (w, x)", {"w": (20, 64)}, (2, 64, 30)),
    "Gemm": (
        "(float[3,64] x) => (float[3,30] y)",
        "y = Gemm <alpha = 0.5, transB = 1> (x, w)",
        {"w": (30, 64)},
        (3, 64),
    ),
    "Conv": ("(float[1,16,9,9] x) => (float[1,24,7,7] y)", "y = Conv (x, w)", {"w": (24, 16, 3, 3)}, (1, 16, 9, 9)),
    "grouped": (
        "(float[1,32,9] x) => (float[1,24,7] y)",
        "y = Conv <group = 2> (x, w)",
        {"w": (24, 16, 3)},
        (1, 32, 9),
    ),
    "ConvTranspose": (
        "(float[1,16,5,5] x) => (float[1,24,7,7] y)",
        "y = ConvTranspose (x, w)",
        {"w": (16, 24, 3, 3)},
        (1, 16, 5, 5),
    ),
    "grouped transposed": (
        "(float[1,32,5] x) => (float[1,24,7] y)",
        "y = ConvTranspose <group = 2> (x, w)",
        {"w": (32, 12, 3)},
        (1, 32, 5),
    ),
    "GRU": (
        "(float[5,1,32] x) => (float[5,1,1,32] y)",
        "y = GRU <hidden_size = 32> (x, w, r)",
        {"w": (1, 96, 32), "r": (1, 96, 32)},
        (5, 1, 32),
    ),
    "LSTM": (
        "(float[5,1,32] x) => (float[5,2,1,32] y)",
        'y = LSTM <hidden_size = 32, direction = "bidirectional"> (x, w, r)',
        {"w": (2, 128, 32), "r": (2, 128, 32)},
        (5, 1, 32),
    ),
    "float16": ("(float16[3,64] x) => (float16[3,30] y)", "y = MatMul (x, w)", {"w": None}, (3, 64)),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 16), (4, 16), (4, 48)])
@pytest.mark.parametrize("kind", FOLDED)
def test_arithmetic_gives_what_numpy_rounds(kind: str, bits: int, block: int | None, symmetric: bool) -> None:
    signature, body, shapes, shape = FOLDED[kind]
    half = kind == "float16"
    model = graph(signature, body, **{k: v or random(64, 30).astype(np.float16) for k, v in shapes.items()})
    x = random(*shape).astype(np.float16) if half else random(*shape)
    found, done = written(model, ARITHMETIC, bits=bits, block=block, symmetric=symmetric)
    assert set(done.forms.values()) == {"unpacked"} and not done.skipped
    assert ops(found)[-1] == ops(model)[-1] and set(ops(found)[:-1]) <= {
        "Cast", "Sub", "Mul", "Mod", "Concat", "Reshape",
    }  # fmt: skip
    assert not set(shapes) & set(found.graph.initializers), "the floats are gone"
    assert {i.name for i in model.graph[-1].inputs} == {i.name for i in found.graph[-1].inputs}, "names stay"
    if block is None:
        own = None if kind not in ("MatMul", "batched", "left", "Gemm", "float16") else 32
    else:
        own = _blocks(found)
    holds(model, found, on_grid(model, bits, own, symmetric=symmetric), 1e-3 if half else 1e-6, x=x)


def _blocks(model: ir.Model) -> int:
    """Columns that share a scale, counted in what was written."""
    integers = next(v for k, v in model.graph.initializers.items() if k.startswith("w_quantized"))
    scale = next(v for k, v in model.graph.initializers.items() if k.startswith("w_scale"))
    assert integers.const_value is not None and scale.const_value is not None
    bits = 4 if any(n.op_type == "Mod" for n in model.graph) else 8
    return integers.const_value.size * 8 // bits // scale.const_value.size


def test_runtimes_fold_the_arithmetic() -> None:
    import onnxruntime as ort

    signature, body, shapes, _ = FOLDED["Conv"]
    found, _ = written(graph(signature, body, **shapes), ARITHMETIC, bits=4, block=16)
    assert _optimised(found, ort) == ["Conv"] or set(_optimised(found, ort)) <= {
        "Conv",
        "ReorderInput",
        "ReorderOutput",
    }


def _optimised(model: ir.Model, ort: Any) -> list[str]:
    import tempfile
    from pathlib import Path

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "m.onnx")
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


TABLE = "(int64[2,5] i) => (float[2,5,{d}] y)"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "width", "block"), [(8, 64, 64), (4, 64, 32), (4, 50, 16), (8, 7, 16)])
def test_tables_are_looked_up_as_integers(bits: int, width: int, block: int, symmetric: bool) -> None:
    model = graph(TABLE.format(d=width), "y = Gather (t, i)", t=(20, width))
    found, _ = written(model, KERNELS, bits=bits, block=block, symmetric=symmetric)
    assert ops(found) == ["GatherBlockQuantized"]
    i = RNG.integers(-20, 20, (2, 5))
    holds(model, found, on_grid(model, bits, block, symmetric=symmetric), i=i)


def test_rows_of_integers_are_looked_up_with_operators_of_the_standard() -> None:
    model = graph(TABLE.format(d=64), "y = Gather (t, i)", t=(20, 64))
    found, done = written(model, WeightKernels("arithmetic", table=1), bits=8)
    assert ops(found) == ["Gather", "Gather", "Cast", "Mul"] and set(done.forms.values()) == {"rows"}
    holds(model, found, on_grid(model, 8, None, symmetric=True), i=RNG.integers(-20, 20, (2, 5)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_that_a_product_shares_is_stored_once(bits: int) -> None:
    body = "e = Gather (t, i)  u = Transpose <perm = [1, 0]> (t)  y = MatMul (e, u)"
    model = graph("(int64[2,5] i) => (float[2,5,40] y)", body, t=(40, 64))
    found, _ = written(model, KERNELS, bits=bits, block=32)
    assert sorted(ops(found)) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    stored = [v.const_value.nbytes for v in found.graph.initializers.values() if v.const_value is not None]
    assert sum(stored) < 40 * 64 * bits // 8 + 40 * 2 * 5 + 16
    holds(model, found, on_grid(model, bits, 32, symmetric=bits == 8), i=RNG.integers(0, 40, (2, 5)))


STANDARD_CASES = {
    "MatMul": ("(float[3,64] x) => (float[3,30] y)", "y = MatMul (x, w)", (64, 30), (3, 64)),
    "Gemm": ("(float[3,64] x) => (float[3,30] y)", "y = Gemm <transB = 1> (x, w)", (30, 64), (3, 64)),
    "Conv": ("(float[1,16,9] x) => (float[1,24,7] y)", "y = Conv (x, w)", (24, 16, 3), (1, 16, 9)),
    "ConvTranspose": ("(float[1,16,5] x) => (float[1,24,7] y)", "y = ConvTranspose (x, w)", (16, 24, 3), (1, 16, 5)),
}


@pytest.mark.parametrize("kind", STANDARD_CASES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_standard_form(kind: str, bits: int) -> None:
    signature, body, weight, shape = STANDARD_CASES[kind]
    model, x = graph(signature, body, w=weight), random(*shape)
    found, done = written(model, STANDARD, bits=bits, block=None)
    if bits == 4 and kind.startswith("Conv"):
        _, skipped = weight_layers(model, bits=4, kernels=STANDARD)
        assert "for matrices alone" in skipped[0].reason
        return
    assert ops(found) == ["DequantizeLinear", kind]
    assert any("opset 17 -> 21" in note for note in done.notes) == (bits == 4)
    holds(model, found, on_grid(model, bits, 128 if bits == 4 else None, symmetric=True, full=False), x=x)


def test_golden() -> None:
    weight = np.array([[7, -8, 0, 1]] * 16, np.float32).T.repeat(4, axis=0) / 8
    model = graph("(float[2,16] x) => (float[2,16] y)", "y = MatMul (x, w)", w=np.ascontiguousarray(weight))
    found, _ = written(model, KERNELS, bits=8, block=16)
    text = ir.to_proto(found)
    node = text.graph.node[0]
    assert list(node.input) == ["x", "w_quantized", "w_scale"] and list(node.output) == ["y"]
    assert {a.name: a.i for a in node.attribute} == {
        "K": 16, "N": 16, "accuracy_level": 4, "bits": 8, "block_size": 16,
    }  # fmt: skip
    shapes = {i.name: list(i.dims) for i in text.graph.initializer}
    assert shapes == {"w_quantized": [16, 1, 16], "w_scale": [16, 1]}
    assert {o.domain: o.version for o in text.opset_import} == {"": 17, "com.microsoft": 1}


def test_small_products_are_not_given_to_kernels_that_lose() -> None:
    model, x = product("MatMul", 64, 64)
    kernels = WeightKernels("MatMulNBits", inputs=256, inputs_small_block=384, outputs=256)
    found, done = written(model, kernels, bits=8)
    assert ops(found)[-1] == "MatMul" and set(done.forms.values()) == {"unpacked"}
    assert any("products of less than 384 to 256 channels are faster in float" in note for note in done.notes)
    holds(model, found, on_grid(model, 8, 32, symmetric=True), x=x)


CASES_IN_FLOAT: list[tuple[str, str, dict[str, Any], str]] = [
    ("(float[3,4] x) => (float[3,4] y)", "y = MatMul (x, w)", {"w": (4, 4)}, "too small: 64 bytes"),
    (
        "(float[3,64] x) => (float[3,32] y)",
        "z = Neg (w)  v = MatMul (x, w)  s = ReduceSum (z)  y = Add (v, s)",
        {"w": (64, 32)},
        "also read by Neg(z)",
    ),
    (
        "(float[64,64] x) => (float[64,64] y)",
        "u = MatMul (x, w)  y = Sub (u, w)",
        {"w": (64, 64)},
        "also read by Sub(y)",
    ),
    ("(float[1,4,9] x, float[4,4,3] w) => (float[1,4,7] y)", "y = Conv (x, w)", {}, "computed, no constant"),
    ("(float[3,64] x) => (float[3,32] y)", "y = MatMul (x, w)", {"w": np.full((64, 32), np.nan, np.float32)}, "NaN"),
    ("(int64[2] i) => (float[8,2,16] y)", "y = Gather <axis = 1> (w, i)", {"w": (8, 64, 16)}, "another axis"),
]


@pytest.mark.parametrize(("signature", "body", "parameters", "reason"), CASES_IN_FLOAT)
def test_what_stays_in_float_says_why(signature: str, body: str, parameters: dict[str, Any], reason: str) -> None:
    model = graph(signature, body, **parameters)
    before = ir.to_proto(model).SerializeToString()
    keys, skipped = weight_layers(model, bits=8, kernels=ARITHMETIC)
    assert not keys and len(skipped) == 1 and reason in skipped[0].reason
    done = write_weights(model, ["y"], bits=8, rounding=nearest, kernels=ARITHMETIC)
    assert not done.forms and ir.to_proto(model).SerializeToString() == before


def test_a_shared_weight_needs_all_of_its_readers() -> None:
    body = "u = MatMul (x, w)  v = Relu (u)  y = MatMul (v, w)"
    model = graph("(float[3,64] x) => (float[3,64] y)", body, w=(64, 64))
    keys, _ = weight_layers(model, bits=8, kernels=ARITHMETIC)
    assert list(keys) == ["u", "y"]
    done = write_weights(private_clone(model), ["u"], bits=8, rounding=nearest, kernels=ARITHMETIC)
    assert "shared with MatMul(y), which stays in float" in done.skipped[0].reason
    assert not weight_layers(model, bits=8, exclude=("MatMul(y)",), kernels=ARITHMETIC)[0]
    found, _ = written(model, KERNELS, bits=8, block=64)
    assert len({node.inputs[1] for node in found.graph if node.op_type == "MatMulNBits"}) == 1


def test_weights_in_constant_nodes_and_in_branches() -> None:
    numbers = ",".join(f"{v:.4f}" for v in RNG.normal(size=1024))
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        branching (bool c, float[2,32] x) => (float[2,32] y) {{
            y = If (c) <then_branch = yes () => (float[2,32] p) {{ w = Constant <value = float[32,32] {{{numbers}}}> ()
                p = MatMul (x, w) }}, else_branch = no () => (float[2,32] q) {{ q = Neg (x) }}>
        }}"""
    )
    found, done = written(model, KERNELS, bits=4, block=16)
    inside = [n.op_type for graph_ in found.graph.subgraphs() for n in graph_]
    assert inside == ["MatMulNBits", "Neg"] and done.forms == {"p": "kernel"}
    holds(model, found, on_grid_in_body(model), 1e-2, c=np.array(True), x=random(2, 32))


def on_grid_in_body(model: ir.Model) -> ir.Model:
    copy = private_clone(model)
    (weight,) = weights_of(copy)[0]
    rounded = nearest("", weight.array.T[None], WeightGrid(4, False, True, 16)).dequantised()[0].T
    producer = weight.value.producer()
    assert producer is not None
    producer.attributes.add(ir.AttrTensor("value", ir.Tensor(np.ascontiguousarray(rounded))))
    return copy


def test_zeros_stay_zeros() -> None:
    weight = random(64, 32) * (RNG.random((64, 32)) < 0.5)
    model = graph("(float[64,64] x) => (float[64,32] y)", "y = MatMul (x, w)", w=weight.astype(np.float32))
    for bits, symmetric in ((4, True), (4, False), (8, True), (8, False)):
        for kernels in (KERNELS, ARITHMETIC):
            found, _ = written(model, kernels, bits=bits, symmetric=symmetric)
            assert (run(found, x=np.eye(64, dtype=np.float32))[weight == 0] == 0).all()


def test_other_bits_are_refused() -> None:
    model, _ = product("MatMul", 64)
    with pytest.raises(ValueError, match="3 bits: weights have 4 or 8"):
        write_weights(model, ["y"], bits=3, rounding=nearest, kernels=KERNELS)


def test_small_tables_and_small_weights_keep_8_bits() -> None:
    body = "e = Gather (t, i)  y = MatMul (e, w)"
    model = graph("(int64[2,5] i) => (float[2,5,64] y)", body, t=(40, 64), w=(64, 64))
    found, done = written(model, ARITHMETIC, bits=4)
    stored = {name: v.const_value for name, v in found.graph.initializers.items() if v.const_value is not None}
    assert stored["t_quantized"].dtype == ir.DataType.INT8 and stored["t_quantized"].size == 40 * 64
    assert stored["w_quantized"].dtype == ir.DataType.UINT8 and stored["w_quantized"].size == 64 * 64 // 2
    assert any(note.startswith("1 of these have 8 bits") for note in done.notes)
    asked, _ = written(model, ARITHMETIC, bits=4, block=32)
    assert asked.graph.initializers["t_quantized"].dtype == ir.DataType.UINT8
    tiny = graph("(float[1,8,9] x) => (float[1,8,7] y)", "y = Conv (x, w)", w=(8, 8, 3))
    assert ops(written(tiny, ARITHMETIC, bits=4)[0]) == ["Cast", "Mul", "Conv"]


def test_an_older_opset_is_told() -> None:
    model = graph("(float[3,64] x) => (float[3,64] y)", "y = MatMul (x, w)", w=(64, 64), opset=9)
    assert "opset 9 cannot take bytes apart" in weight_layers(model, bits=8, kernels=ARITHMETIC)[1][0].reason
    assert list(weight_layers(model, bits=8, kernels=KERNELS)[0]) == ["y"]
