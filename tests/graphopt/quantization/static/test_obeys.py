"""What is quantised for a target obeys the target's rules, and what is quantised for another one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import context
from text_graph import graph

from graphopt import calibration, model, registry
from graphopt.passes.quantize import Quantize
from graphopt.quantization.back.recognised import holds_quantised
from graphopt.quantization.static.obeys import violations
from graphopt.target import QuantScheme

TARGETS = [name for name, target in registry.targets().items() if target.quant is not None]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def residual() -> ir.Model:
    """Two blocks, the second with a layer on its shortcut, too."""
    return graph(
        "(float[1,8,8,8] x) => (float[1,10] y)",
        """a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,1,1,1]>(r, w2, b2)  s = Add(c, r)
        t = Relu(s)  d = Conv<pads=[1,1,1,1]>(t, w3)  e = Relu(d)  f = Conv<pads=[1,1,1,1]>(e, w4)  k = Conv(t, w5)
        u = Add(k, f)  v = Relu(u)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(v)  q = Concat<axis=1>(m, m)
        p = GlobalAveragePool(q)  h = Flatten(p)  y = Gemm(h, g, j)""",
        w1=normal(8, 8, 3, 3) / 8, b1=(8,), w2=normal(8, 8, 3, 3) / 8, b2=(8,), w3=normal(8, 8, 3, 3) / 8,
        w4=normal(12, 8, 3, 3) / 8, w5=normal(12, 8, 1, 1) / 3, g=normal(24, 10) / 5, j=(10,),
    )  # fmt: skip


def transformer() -> ir.Model:
    """One block: attention with two products of activations, norms, a feed-forward part."""
    return graph(
        "(float[1,6,16] x) => (float[1,6,16] y)",
        """n = LayerNormalization<axis=-1>(x, g1, h1)  q = MatMul(n, wq)  qb = Add(q, bq)  k = MatMul(n, wk)
        v = MatMul(n, wv)  kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(qb, kt)  z = Mul(s, scale)
        p = Softmax<axis=-1>(z)  o = MatMul(p, v)  w = MatMul(o, wo)  r = Add(x, w)
        m = LayerNormalization<axis=-1>(r, g2, h2)  f = MatMul(m, w1)  fb = Add(f, b1)  a = Relu(fb)
        e = MatMul(a, w2)  y = Add(r, e)""",
        g1=(16,), h1=(16,), wq=(16, 16), bq=(16,), wk=(16, 16), wv=(16, 16), wo=(16, 16), g2=(16,), h2=(16,),
        w1=(16, 32), b1=(32,), w2=(32, 16), scale=np.array(0.25, np.float32),
    )  # fmt: skip


def recurrent() -> ir.Model:
    return graph(
        "(float[5,1,8] x) => (float[5,1,4] y)",
        "a = MatMul(x, w)  h = LSTM<hidden_size=6>(a, i, r, b)  s = Squeeze(h, one)  y = MatMul(s, v)",
        w=(8, 8), i=(1, 24, 8), r=(1, 24, 6), b=(1, 48), v=(6, 4), one=np.array([1]),
    )  # fmt: skip


def mixed() -> ir.Model:
    """A depthwise layer, a transposed one, padding, slices, a resize, and outputs in the middle."""
    return graph(
        "(float[1,4,8,8] x) => (float[1,4,16,16] y, float[1,4,8,8] o)",
        """d = Conv<group=4, pads=[1,1,1,1]>(x, w1)  o = Relu(d)  c = Conv(o, w2)
        p = AveragePool<kernel_shape=[2,2]>(c)  t = ConvTranspose<strides=[2,2]>(p, w3)  e = Pad(t, pads)
        f = Conv(e, w4)  l = LeakyRelu(f)  z = Sigmoid(l)  m = Mul(l, z)  y = Conv(m, w2)""",
        w1=normal(4, 1, 3, 3), w2=normal(4, 4, 1, 1), w3=normal(4, 4, 2, 2), w4=normal(4, 4, 1, 1),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )  # fmt: skip


MODELS: dict[str, Callable[[], ir.Model]] = {
    "residual": residual, "transformer": transformer, "recurrent": recurrent, "mixed": mixed,
}  # fmt: skip


def quantised(made: ir.Model, target: str, samples: int = 8) -> ir.Model:
    feeds = [
        {str(v.name): normal(*[d if isinstance(d, int) else 1 for d in v.shape or ()]) * (1 + i / 8)
         for v in made.graph.inputs}
        for i in range(samples)
    ]  # fmt: skip
    data = {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]}
    ctx: Any = dataclasses.replace(context(), target=registry.target(target))
    batched = all(v.shape is not None and v.shape[0] == 1 for v in made.graph.inputs)
    ctx = dataclasses.replace(ctx, calibration=calibration.load(data if batched else feeds, made))
    Quantize(sensitive="none", ranges="minmax").run(made, ctx)
    model.check(made)
    model.infer_shapes(made)
    return made


def scheme(target: str) -> QuantScheme:
    found = registry.target(target).quant
    assert found is not None
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_quantised_for_a_target_obeys_its_rules(name: str, target: str) -> None:
    made = quantised(MODELS[name](), target)
    if not (name in {"recurrent", "transformer"} and target == "android-xnnpack"):
        assert holds_quantised(made)["QuantizeLinear"] > 0
    assert violations(made, scheme(target)) == []


@pytest.mark.data
@pytest.mark.parametrize("target", ["cpu", "cpu-arm64", "jetson-orin", "android-qnn"])
def test_resnet20(target: str, data_dir: Path) -> None:
    from graphopt.files.input_sizes import dimension_names
    from graphopt.model import fix_dims

    made = model.load(data_dir / "models" / "resnet20_cifar10.onnx")
    if registry.target(target).static_shapes:
        fix_dims(made, dict.fromkeys(dimension_names(made), 1))
    quantised(made, target)
    assert holds_quantised(made)["QuantizeLinear"] > 10
    assert violations(made, scheme(target)) == []


PAIRS = [
    ("cpu", "jetson-orin", {"activation type", "symmetric activations", "float bias", "fused sums"}),
    ("jetson-orin", "cpu", {"activation type", "int32 bias", "integer outputs", "integer inputs"}),
    ("cpu", "android-nnapi", {"one scale a weight", "integer outputs", "no idle pairs"}),
    ("cpu", "android-xnnpack", {"activation type"}),
    ("cpu-arm64", "android-qnn", {"activation type", "one scale a weight"}),
]


@pytest.mark.parametrize(("made_for", "asked", "rules"), PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_quantised_for_another_target_breaks_rules(made_for: str, asked: str, rules: set[str]) -> None:
    made = quantised(residual(), made_for)
    broken = {v.rule for v in violations(made, scheme(asked))}
    assert broken & rules, broken
    if asked == "jetson-orin":
        assert rules <= broken


def test_the_residual_branch_is_quantised_and_the_layer_that_computes_the_sum_is_not() -> None:
    made = quantised(residual(), "jetson-orin")
    sums = {n.outputs[0].name: [v.producer().op_type for v in n.inputs] for n in made.graph if n.op_type == "Add"}
    # the second sum: the branch of two layers is the main one, the shortcut is quantised
    assert sorted(sums.values()) == [["Conv", "DequantizeLinear"], ["DequantizeLinear", "Conv"]]
    assert not any(name.startswith("b1") and "scale" in name for name in made.graph.initializers)


def test_operators_on_integers_are_violations() -> None:
    made = graph(
        "(uint8[N,4] x) => (float[N,2] y)", "i = MatMulInteger(x, w)  y = Cast<to=1>(i)", w=np.ones((4, 2), np.int8)
    )
    assert [v.rule for v in violations(made, QuantScheme())] == ["operators"]
    fine = graph(
        "(float[N,4] x) => (float[N,2] y)",
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, s)  y = MatMul(d, e)",
        s=np.array(0.1, np.float32), z=np.array(3, np.uint8), w=np.ones((4, 2), np.int8),
    )  # fmt: skip
    assert violations(fine, QuantScheme()) == []
    assert violations(graph("(float[2] x) => (float[2] y)", "y = Relu(x)"), QuantScheme()) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"z": np.array(3, np.uint8)}, "symmetric activations"),
        ({"s": np.array([0.1, 0.1, 0.1, 0.1], np.float32)}, "one scale a tensor"),
        ({"w": np.ones((4, 2), np.uint8)}, "weight type"),
    ],
)
def test_single_rules(change: dict[str, Any], rule: str) -> None:
    given: dict[str, Any] = {
        "s": np.array(0.1, np.float32), "z": np.array(128, np.uint8), "t": np.array(0.1, np.float32),
        "w": np.ones((4, 2), np.int8),
    }  # fmt: skip
    text = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, t)  y = MatMul(d, e)"
    fine = graph("(float[3,4] x) => (float[3,2] y)", text, **given)
    rules = QuantScheme(symmetric_activation=True)
    assert violations(fine, rules) == []
    if "s" in change:
        given["z"] = np.full(4, 128, np.uint8)
    broken = graph("(float[3,4] x) => (float[3,2] y)", text, **(given | change))
    assert rule in {v.rule for v in violations(broken, rules)}
