"""Every operator of to_torch against ONNX Runtime, values and (where there are any) the shape of a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

torch = pytest.importorskip("torch")

from graphopt.executor import Session  # noqa: E402
from graphopt.fx.operators import table  # noqa: E402
from graphopt.fx.to_torch import to_torch, uncovered  # noqa: E402
from graphopt.model import infer_shapes  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One node: a tuple is a float input of that shape, an array a stored tensor, None is left out."""

    op: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    domain: str = ""

    def __str__(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in self.attributes.items() if not isinstance(v, onnx.TensorProto))
        return f"{self.op}-{self.opset}({settings})"


def case(op: str, *inputs: Any, opset: int = 20, outputs: int = 1, domain: str = "", **attributes: Any) -> Case:
    return Case(op, inputs, attributes, opset, outputs, domain)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


MS = "com.microsoft"
X, IMAGE, ROW = (2, 3, 4), (2, 4, 7, 6), (2, 3, 9)
BITS = np.array([[1, 0, 1], [0, 1, 1]], bool)
SMALL = np.array([[3, -7, 5], [-2, 9, 4]], np.int64)
UNIT = np.linspace(-0.9, 0.9, 24, dtype=np.float32).reshape(X)
INDICES = np.array([[0, -1], [2, 1]], np.int64)
W = {"W": (1, 20, 4), "R": (1, 20, 5), "B": (1, 40), "P": (1, 15)}


def store(shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CASES = [
    *(
        case(op, X)
        for op in (
            "Abs",
            "Asinh",
            "Atan",
            "Ceil",
            "Cos",
            "Cosh",
            "Erf",
            "Exp",
            "Floor",
            "Neg",
            "Reciprocal",
            "Round",
            "Sign",
            "Sin",
            "Sinh",
            "Tan",
            "Identity",
            "IsNaN",
        )
    ),
    *(case(op, UNIT) for op in ("Acos", "Asin", "Atanh")),
    *(case(op, np.abs(UNIT) + 1) for op in ("Acosh", "Log", "Sqrt")),
    *(case(op, X, (3, 1)) for op in ("Add", "Div", "Mul", "Sub", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(case(op, SMALL, i64(2, -3, 2)) for op in ("Add", "Div", "Equal", "Mod")),
    *(case(op, BITS, BITS[:1]) for op in ("And", "Or", "Xor")),
    case("Not", BITS),
    *(case(op, SMALL, i64(2, 3, 6)) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    case("BitwiseNot", SMALL),
    *(
        case("BitShift", np.array([1, 8, 200], np.uint8), np.array([1, 2, 3], np.uint8), direction=d)
        for d in ("LEFT", "RIGHT")
    ),
    case("Mod", UNIT, UNIT[:1, ::-1] + 2, fmod=1),
    case("Pow", np.abs(UNIT) + 1, (3, 1)),
    case("Pow", X, i64(2)),
    case("Pow", SMALL, i64(2)),
    *(case(op, X, (3, 1), (4,)) for op in ("Max", "Min", "Sum", "Mean")),
    case("Clip", X, f32(-0.5).reshape(()), f32(0.5).reshape(())),
    case("Clip", X, None, f32(0.1).reshape(())),
    case("Clip", X, opset=9, min=-0.3, max=0.4),
    case("IsInf", f32(1, np.inf, -np.inf)),
    case("IsInf", f32(1, np.inf, -np.inf), detect_negative=0),
    case("Cast", X, to=7),
    case("Cast", X, to=11),
    case("CastLike", X, SMALL),
    case("Where", BITS, (2, 3), (3,)),
    case("Dropout", X, outputs=2),
    case("Dropout", X, opset=10, ratio=0.3),
    *(
        case(op, X)
        for op in (
            "Relu",
            "Sigmoid",
            "Softsign",
            "Tanh",
            "Mish",
            "Softplus",
            "Elu",
            "Celu",
            "Selu",
            "Shrink",
            "LeakyRelu",
            "ThresholdedRelu",
            "HardSigmoid",
            "HardSwish",
            "Gelu",
        )
    ),
    case("Gelu", X, approximate="tanh"),
    case("Swish", X, alpha=0.7, opset=24),
    case("Elu", X, alpha=0.5),
    case("Selu", X, alpha=1.2, gamma=0.9),
    case("Shrink", X, bias=0.2, lambd=0.3),
    case("PRelu", IMAGE, store((4, 1, 1))),
    case("QuickGelu", X, domain=MS, alpha=1.5),
    case("BiasGelu", X, (4,), domain=MS),
    case("Gelu", X, domain=MS),
    case("FastGelu", X, (4,), domain=MS),
    case("FastGelu", X, domain=MS),
    *(
        case(op, X, axis=a, opset=o)
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for a, o in ((1, 20), (1, 11), (-1, 13))
    ),
    case("MatMul", (2, 3, 4), (4, 5)),
    case("MatMul", (4,), (2, 4, 5)),
    case("Det", (2, 3, 3)),
    case("Einsum", (2, 3, 4), (2, 5, 4), equation="b i k, b j k -> b i j"),
    case("Einsum", (3, 4), (4,), equation="ij,j"),
    case("Gemm", (3, 4), (4, 5), (5,), alpha=0.5, beta=2.0),
    case("Gemm", (4, 3), (5, 4), transA=1, transB=1),
    case("FusedMatMul", (2, 4, 3), (2, 5, 4), domain=MS, transA=1, transB=1, alpha=0.3),
    case("Conv", IMAGE, store((6, 2, 3, 3)), store((6,)), group=2, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]),
    case("Conv", ROW, store((5, 3, 4)), auto_pad="SAME_UPPER", strides=[2]),
    case("Conv", ROW, store((5, 3, 4)), auto_pad="SAME_LOWER"),
    case("Conv", (1, 2, 5, 4, 3), store((3, 2, 2, 2, 2)), kernel_shape=[2, 2, 2]),
    case(
        "ConvTranspose",
        IMAGE,
        store((4, 3, 3, 2)),
        store((6,)),
        group=2,
        strides=[2, 3],
        pads=[1, 0, 0, 1],
        output_padding=[1, 2],
    ),
    case("ConvTranspose", ROW, store((3, 2, 4)), strides=[2], dilations=[2], pads=[1, 2]),
    case("ConvTranspose", ROW, store((3, 2, 3)), strides=[2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", ROW, store((3, 2, 3)), strides=[2], output_shape=[20]),
    case(
        "BatchNormalization", IMAGE, store((4,)), store((4,), 1), store((4,), 2), np.abs(store((4,), 5)), epsilon=0.01
    ),
    case("InstanceNormalization", IMAGE, store((4,)), store((4,), 1)),
    case("GroupNormalization", IMAGE, store((4,)), store((4,), 1), num_groups=2, opset=21),
    case("GroupNormalization", IMAGE, store((2,)), store((2,), 1), num_groups=2, opset=18),
    case("LayerNormalization", X, store((4,)), store((4,), 1), outputs=3),
    case("LayerNormalization", X, store((3, 4)), axis=1, epsilon=0.1),
    case("RMSNormalization", X, store((4,)), opset=23),
    case("SimplifiedLayerNormalization", X, store((4,)), axis=-1),
    case("SkipLayerNormalization", X, X, store((4,)), store((4,), 1), store((4,), 2), domain=MS, epsilon=0.01),
    case("SkipSimplifiedLayerNormalization", X, X, store((4,)), domain=MS, epsilon=0.01),
    case("LpNormalization", X, axis=1, p=1),
    case("LpNormalization", X),
    case("MeanVarianceNormalization", IMAGE),
    case("LRN", IMAGE, size=3, alpha=0.2, beta=0.6, bias=1.5),
    *(case(op, IMAGE) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    *(
        case(op, IMAGE, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], ceil_mode=c)
        for op in ("MaxPool", "AveragePool")
        for c in (0, 1)
    ),
    case("MaxPool", ROW, kernel_shape=[3], dilations=[2], auto_pad="VALID"),
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
    case(
        "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1, strides=[2, 2], ceil_mode=1
    ),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]),
    case("AveragePool", ROW, kernel_shape=[3], dilations=[2], pads=[1, 1]),
    case("LpPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], p=2),
    *(
        case(op, np.abs(UNIT) + 1, i64(1, -1))
        for op in (
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceSumSquare",
        )
    ),
    case("ReduceSum", X, keepdims=0),
    case("ReduceSum", X, noop_with_empty_axes=1),
    case("ReduceMean", X, opset=13, axes=[0, 2], keepdims=0),
    case("ReduceProd", SMALL, i64(1), keepdims=0),
    *(
        case(op, SMALL % 3, axis=1, keepdims=k, select_last_index=s)
        for op in ("ArgMax", "ArgMin")
        for k, s in ((1, 0), (0, 1))
    ),
    *(case("CumSum", X, i64(1), exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)),
    case("TopK", X, i64(2), outputs=2),
    case("TopK", X, i64(2), outputs=2, axis=1, largest=0),
    case("Shape", X),
    case("Shape", X, start=1, end=-1),
    case("Size", X),
    case("Concat", X, (2, 1, 4), axis=1),
    case("Expand", (3, 1), i64(2, 1, 4)),
    case("Tile", (2, 3), i64(2, 3)),
    case("Reshape", X, i64(0, -1)),
    case("Reshape", X, i64(2, 12), allowzero=1),
    case("Flatten", X),
    case("Flatten", X, axis=0),
    case("Flatten", X, axis=-1),
    case("Transpose", X),
    case("Transpose", X, perm=[2, 0, 1]),
    case("Squeeze", (2, 1, 3, 1)),
    case("Squeeze", (2, 1, 3, 1), i64(-1)),
    case("Squeeze", (2, 1, 3), opset=11, axes=[1]),
    case("Unsqueeze", X, i64(0, -1)),
    case("Unsqueeze", X, opset=11, axes=[1, 3]),
    case("Split", (2, 7), i64(3, 4), axis=1, outputs=2),
    case("Split", (2, 7), axis=1, num_outputs=3, outputs=3),
    case("Split", (2, 6), axis=1, opset=13, outputs=3),
    case("Split", (2, 6), axis=1, opset=11, split=[1, 5], outputs=2),
    case("Slice", X, i64(0, -2), i64(9, 4), i64(1, 2)),
    case("Slice", X, i64(-1, 3), i64(-9, 0), i64(1, -1), i64(-1, -2)),
    case("Slice", X, opset=9, starts=[1], ends=[3], axes=[2]),
    case("Pad", X, i64(0, 1, 2, 1, 0, 3), f32(0.5).reshape(())),
    case("Pad", X, i64(0, -1, 1, 0, 0, -2)),
    case("Pad", X, i64(1, 2), None, i64(2), mode="reflect"),
    case("Pad", X, i64(0, 2, 1, 0, 1, 3), mode="edge"),
    case("Pad", X, i64(0, 1, 2, 0, 1, 1), mode="wrap"),
    case("Pad", X, opset=9, pads=[0, 1, 0, 0, 0, 1], value=2.0),
    *(case("DepthToSpace", (1, 8, 2, 3), blocksize=2, mode=m) for m in ("DCR", "CRD")),
    case("SpaceToDepth", (1, 2, 4, 6), blocksize=2),
    case("Trilu", (4, 5), i64(1).reshape(())),
    case("Trilu", (2, 4, 4), upper=0),
    case("ReverseSequence", (4, 3, 2), i64(4, 1, 2)),
    case("ReverseSequence", (3, 4), i64(4, 1, 2), batch_axis=0, time_axis=1),
    case("Gather", X, INDICES, axis=1),
    case("Gather", X, i64(1).reshape(()), axis=2),
    case("GatherElements", (3, 2), INDICES, axis=0),
    case("GatherND", (3, 3, 4), INDICES),
    case("GatherND", X, INDICES[:, :1], batch_dims=1),
    case("GatherND", (2, 2, 3, 4), np.array([[[0], [1]], [[2], [0]]]), batch_dims=2),
    *(case("ScatterElements", (3, 2), INDICES, (2, 2), axis=0, reduction=r) for r in ("none", "add", "max")),
    case("Scatter", (3, 2), INDICES, (2, 2), axis=0, opset=9),
    *(case("ScatterND", (3, 3, 2), INDICES, (2, 2), reduction=r) for r in ("none", "add", "mul", "min")),
    case("OneHot", INDICES, i64(3), f32(-1, 2)),
    case("OneHot", INDICES, i64(3), f32(-1, 2), axis=0),
    case("Range", i64(1).reshape(()), i64(9).reshape(()), i64(3).reshape(())),
    case("NonZero", SMALL % 2),
    case("ConstantOfShape", i64(2, 3)),
    case("ConstantOfShape", i64(2, 3), value=helper.make_tensor("v", onnx.TensorProto.INT64, [1], [7])),
    case("EyeLike", (3, 4), k=1),
    case("EyeLike", SMALL, dtype=1),
    *(case("Resize", IMAGE, None, f32(1, 1, 2, 1.5), mode=m) for m in ("nearest", "linear", "cubic")),
    *(
        case("Resize", IMAGE, None, None, i64(2, 4, 5, 9), mode=m, coordinate_transformation_mode=c)
        for m, c in (
            ("nearest", "asymmetric"),
            ("linear", "align_corners"),
            ("linear", "pytorch_half_pixel"),
            ("cubic", "align_corners"),
            ("linear", "half_pixel_symmetric"),
        )
    ),
    *(
        case("Resize", IMAGE, None, f32(1, 1, 0.6, 0.8), mode="nearest", nearest_mode=m)
        for m in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
    *(case("Resize", IMAGE, None, f32(1, 1, 0.6, 0.5), mode=m, antialias=1) for m in ("linear", "cubic")),
    case("Resize", IMAGE, None, f32(1, 1, 2, 2), mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5),
    case(
        "Resize",
        IMAGE,
        f32(0, 0, 0.2, 0.3, 1, 1, 0.8, 1.2),
        None,
        i64(2, 4, 6, 5),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=3.0,
    ),
    case("Resize", IMAGE, None, None, i64(14, 14), axes=[2, 3], mode="linear", keep_aspect_ratio_policy="not_larger"),
    case("Resize", IMAGE, f32(1, 1, 2, 2), opset=10),
    case("Upsample", IMAGE, f32(1, 1, 2, 3), opset=9),
    case("Upsample", IMAGE, scales=[1.0, 1.0, 2.0, 2.0], opset=7, mode="linear"),
    case(
        "LSTM",
        (6, 2, 4),
        store(W["W"]),
        store(W["R"]),
        store(W["B"]),
        None,
        (1, 2, 5),
        (1, 2, 5),
        store(W["P"]),
        hidden_size=5,
        outputs=3,
    ),
    case(
        "LSTM",
        (6, 2, 4),
        store((2, 20, 4)),
        store((2, 20, 5)),
        store((2, 40)),
        np.array([6, 3], np.int32),
        hidden_size=5,
        direction="bidirectional",
        outputs=3,
    ),
    case(
        "LSTM",
        (6, 2, 4),
        store(W["W"]),
        store(W["R"]),
        hidden_size=5,
        direction="reverse",
        clip=0.4,
        input_forget=1,
        outputs=3,
        activations=["HardSigmoid", "Relu", "Softsign"],
    ),
    *(
        case(
            "GRU",
            (6, 2, 4),
            store((2, 15, 4)),
            store((2, 15, 5)),
            store((2, 30)),
            None,
            (2, 2, 5),
            hidden_size=5,
            outputs=2,
            direction="bidirectional",
            linear_before_reset=r,
        )
        for r in (0, 1)
    ),
    case(
        "GRU",
        (6, 2, 4),
        store((1, 15, 4)),
        store((1, 15, 5)),
        None,
        np.array([6, 2], np.int32),
        hidden_size=5,
        outputs=2,
    ),
    case(
        "RNN",
        (6, 2, 4),
        store((1, 5, 4)),
        store((1, 5, 5)),
        store((1, 10)),
        hidden_size=5,
        outputs=2,
        direction="reverse",
    ),
    case(
        "RNN",
        (6, 2, 4),
        store((2, 5, 4)),
        store((2, 5, 5)),
        hidden_size=5,
        outputs=2,
        direction="bidirectional",
        activations=["Relu", "Tanh"],
    ),
    case("QuantizeLinear", X, f32(0.1).reshape(()), np.array(3, np.uint8)),
    case("QuantizeLinear", X, f32(0.1, 0.2, 0.3), np.zeros(3, np.int8), axis=1),
    case(
        "DequantizeLinear",
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        f32(0.1, 0.2, 0.3),
        np.array([1, 2, 3], np.uint8),
        axis=1,
    ),
    case("DynamicQuantizeLinear", X, outputs=3),
    case(
        "MatMulInteger",
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.arange(12, dtype=np.int8).reshape(3, 4),
        np.array(2, np.uint8),
    ),
    case("Attention", (2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), opset=23),
    case(
        "Attention",
        (2, 3, 12),
        (2, 3, 12),
        (2, 3, 12),
        opset=23,
        q_num_heads=3,
        kv_num_heads=3,
        is_causal=1,
        scale=0.7,
        softcap=1.5,
    ),
    case("Attention", (2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 4), store((4, 4)), opset=23, softcap=2.0),
    *(
        case(
            "RotaryEmbedding",
            (2, 3, 5, 4),
            store((9, 2)),
            store((9, 2), 1),
            np.arange(10, dtype=np.int64).reshape(2, 5) % 9,
            opset=23,
            interleaved=i,
        )
        for i in (0, 1)
    ),
    case(
        "RotaryEmbedding",
        (2, 5, 12),
        store((2, 5, 1)),
        store((2, 5, 1), 1),
        opset=23,
        num_heads=3,
        rotary_embedding_dim=2,
    ),
]


def build(c: Case) -> tuple[ir.Model, dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    feeds, stored, names = {}, [], []
    for index, given in enumerate(c.inputs):
        name = f"i{index}"
        if isinstance(given, tuple):
            feeds[name] = random.normal(size=given).astype(np.float32)
        elif given is not None:
            stored.append(onnx.numpy_helper.from_array(np.array(given, order="C"), name))
        names.append("" if given is None else name)
    outputs = [f"o{i}" for i in range(c.outputs)]
    node = helper.make_node(c.op, names, outputs, domain=c.domain, **c.attributes)
    inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in feeds.items()]
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name=n) for n in outputs], stored)
    imports = [helper.make_opsetid("", c.opset)] + ([helper.make_opsetid(c.domain, 1)] if c.domain else [])
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))
    infer_shapes(model)
    return model, feeds


@pytest.mark.parametrize("c", CASES, ids=str)
def test_equal_to_onnx_runtime(c):
    model, feeds = build(c)
    expected = Session(model).run(feeds)
    module = to_torch(model)
    inputs = [torch.from_numpy(feeds[name]).requires_grad_() for name in module.meta["inputs"]]
    found = module(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    for (name, wanted), got in zip(expected.items(), found, strict=True):
        assert got.shape == wanted.shape, name
        assert got.detach().numpy().dtype == wanted.dtype, name
        np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=2e-4, atol=2e-5, err_msg=name)


def test_every_operator_of_the_table_has_a_case():
    tried = {(c.domain, c.op) for c in CASES}
    assert set(table()) - tried == set()
    for (domain, op), rows in table().items():
        versions = [c.opset if not domain else 1 for c in CASES if (c.domain, c.op) == (domain, op)]
        for row in rows:
            assert any(row.since <= v <= row.until for v in versions), (op, row.since)


@pytest.mark.parametrize(
    "op", ["Relu", "Gelu", "Softplus", "Sigmoid", "HardSwish", "LayerNormalization", "Softmax", "Conv", "LSTM"]
)
def test_gradients_are_those_of_finite_differences(op):
    c = next(c for c in CASES if c.op == op and not c.domain)
    module = to_torch(build(c)[0]).double()
    inputs = [torch.randn(i, dtype=torch.float64, requires_grad=True) for i in c.inputs if isinstance(i, tuple)]
    assert torch.autograd.gradcheck(lambda *x: module(*x), inputs)


def test_an_unknown_attribute_or_output_is_refused():
    model, _ = build(case("MaxPool", IMAGE, kernel_shape=[2, 2], outputs=2))
    assert uncovered(model) == ["o0 (MaxPool: output 1 and later)"]
    model, _ = build(case("Attention", (2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), opset=23, qk_matmul_output_mode=1))
    assert uncovered(model) == ["o0 (Attention: attribute qk_matmul_output_mode)"]
