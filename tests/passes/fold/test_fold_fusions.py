"""What ONNX Runtime fuses in a model it still fuses after fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fusions import fused
from golden import assert_close, context, parse, random_feeds, reasons, run

from graphopt.model import infer_shapes, load
from graphopt.registry import pass_class

ERF = "a = Div (h, root) b = Erf (a) c = Add (b, one)"
TANH = """a = Pow (h, three) b = Mul (a, cubic) i = Add (h, b) e = Mul (i, slope)
    f = Tanh (e) c = Add (f, one)"""
ACTIVATIONS = {
    "erf, half last": f"{ERF} p = Mul (h, c) z = Mul (p, half)",
    "erf, half last, sides exchanged": f"{ERF} p = Mul (c, h) z = Mul (half, p)",
    "erf, half first": f"{ERF} p = Mul (h, half) z = Mul (p, c)",
    "tanh, half last": f"{TANH} p = Mul (h, c) z = Mul (p, half)",
    "tanh, half first": f"{TANH} p = Mul (h, half) z = Mul (p, c)",
    "silu": "c = Sigmoid (h) z = Mul (h, c)",
    "quick gelu": "a = Mul (h, beta) c = Sigmoid (a) z = Mul (h, c)",
}
HARD_SWISH = "a = Add (h, three) c = Clip (a, zero, six) p = Mul (h, c) z = Div (p, six)"
NORM = """m = ReduceMean <axes: ints = [-1]> (x) d = Sub (x, m) s = Pow (d, two)
    v = ReduceMean <axes: ints = [-1]> (s) w = Add (v, eps) q = Sqrt (w) n = Div (d, q)
    g = Mul (n, gamma) l = Add (g, beta_)"""


def _tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name)).uniform(0.2, 1.0, shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.4f}' for v in values)}}}"


def block(activation: str, opset: int = 13) -> ir.Model:
    """A pre-norm feed-forward block, its normalisation and activation written out as exporters do.

    Opset 13 has none of the operators that these are.
    """
    constants = """float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0}, float six = {6.0},
        float zero = {0.0}, float root = {1.4142135}, float cubic = {0.044715}, float slope = {0.79788456},
        float beta = {1.702}, float eps = {0.00001}, """
    weights = [("up", 4, 8), ("bias", 8), ("down", 8, 4), ("gamma", 4), ("beta_", 4), ("out", 4)]
    constants += ", ".join(_tensor(name, *shape) for name, *shape in weights)
    body = f"""{NORM} u = MatMul (l, up) h = Add (u, bias) {activation}
        j = MatMul (z, down) o = Add (j, out) y = Add (x, o)"""
    if opset >= 18:
        body = f"last = Constant <value = int64[1] {{-1}}> () {body}"
        body = body.replace("ReduceMean <axes: ints = [-1]> (x)", "ReduceMean (x, last)")
        body = body.replace("ReduceMean <axes: ints = [-1]> (s)", "ReduceMean (s, last)")
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    return parse(f"{header} g (float[N,3,4] x) => (float[N,3,4] y) <{constants}> {{ {body} }}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_transformer_block_keeps_its_fusions(activation: str) -> None:
    model = block(ACTIVATIONS[activation])
    before, feeds = fused(model), random_feeds(model)
    reference = run(model, feeds)
    result = pass_class("fold")().run(model, context())
    assert_close(run(model, feeds), reference)
    after = fused(model)
    assert before["LayerNormalization"] == 1
    assert all(after[operator] >= count for operator, count in before.items()), (before, after)
    why = reasons(result)
    assert "part of a normalisation that runtimes fuse" in why
    if "half last" in activation:
        assert "part of a Gelu that runtimes fuse" in why
    if activation.startswith("erf") or activation == "tanh, half first":
        assert sum(count for operator, count in before.items() if "Gelu" in operator) == 1, before


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name.startswith(("erf", "tanh"))])
def test_written_as_operators_a_transformer_block_keeps_its_fusions(activation: str) -> None:
    model = block(ACTIVATIONS[activation], opset=20)
    before, feeds = fused(model), random_feeds(model)
    reference = run(model, feeds)
    pass_class("fold")().run(model, context())
    assert_close(run(model, feeds), reference)
    assert [n.op_type for n in model.graph if n.op_type in ("LayerNormalization", "Gelu")] == [
        "LayerNormalization",
        "Gelu",
    ]
    after = fused(model)
    gelus = [sum(count for operator, count in found.items() if "Gelu" in operator) for found in (before, after)]
    assert gelus[1] >= gelus[0], (before, after)
    assert after["LayerNormalization"] == before["LayerNormalization"] == 1


@pytest.mark.parametrize(
    ("norm", "found"),
    [
        ("y = LayerNormalization <axis: int = -1> (t, ones)", {"SkipLayerNormalization"}),
        (f"{NORM.replace('(x', '(t')} y = Identity (l)", {"SkipLayerNormalization"}),
        (f"{NORM.replace('(x', '(t').split(' g = ')[0].split('    g = ')[0]} y = Identity (n)", set()),
    ],
)
def test_what_a_normalisation_without_its_scale_costs(norm: str, found: set[str]) -> None:
    """Why `fold` does not ask for `fold-norm-affine`: a scale of one in the operator is fused, none at all is not."""
    constants = ", ".join([_tensor("gamma", 4), _tensor("beta_", 4), "float two = {2.0}", "float eps = {0.00001}"])
    ones = "float[4] ones = {1.0, 1.0, 1.0, 1.0}"
    model = parse(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3,4] x, float[2,3,4] u) => (float[2,3,4] y) <{constants}, {ones}> {{ t = Add (x, u) {norm} }}""")
    infer_shapes(model)
    assert set(fused(model)) == found


def test_a_hard_swish_is_one_node_where_the_opset_has_it() -> None:
    model = block(HARD_SWISH, opset=14)
    pass_class("fold")().run(model, context())
    assert [n.op_type for n in model.graph if n.outputs[0].name in ("z", "p", "c")] == ["HardSwish"]


def test_the_sixth_of_a_hard_swish_folds() -> None:
    model = block(HARD_SWISH)
    pass_class("fold")().run(model, context())
    assert not [node for node in model.graph if node.outputs[0].name == "z"]


def test_a_vector_behind_a_gelu_still_folds() -> None:
    model = block(ACTIVATIONS["erf, half last"])
    z = next(v for n in model.graph for v in n.outputs if v.name == "z")
    scale = ir.Value(name="k", const_value=ir.tensor(np.arange(1, 9, dtype=np.float32), name="k"))
    model.graph.register_initializer(scale)
    (use,) = z.uses()
    node = ir.node("Mul", [z, scale], name="scaled")
    model.graph.insert_after(z.producer(), node)
    use.node.replace_input_with(use.idx, node.outputs[0])
    infer_shapes(model)
    before, nodes = fused(model), len(model.graph)
    assert pass_class("fold")().run(model, context()).changed
    assert len(model.graph) == nodes - 1
    assert all(fused(model)[operator] >= count for operator, count in before.items())


@pytest.mark.data
def test_minilm_keeps_its_fusions(data_dir: Path) -> None:
    source = data_dir / "models" / "minilm_l6.onnx"
    model = load(source)
    pass_class("fold")().run(model, context())
    before, after = fused(source), fused(model)
    assert before["SkipLayerNormalization"] == 12
    assert all(after[operator] >= count for operator, count in before.items()), (before, after)
