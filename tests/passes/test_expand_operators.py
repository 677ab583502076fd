"""expand-operators: the definitions compute what the operators compute."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from graphopt import registry
from graphopt.base import Context
from graphopt.executor import Session
from graphopt.files.shape_inference import infer_shapes
from graphopt.passes.expand_operators import ExpandOperators
from graphopt.progress import Silent
from graphopt.verify import random_feeds

CONTEXT = Context(registry.target("cpu"), None, None, seed=0, jobs=1, progress=Silent())
CASES = {
    "Celu": "(float[n,4] x) => (float[n,4] y) { y = Celu<alpha = 0.5>(x) }",
    "HardSwish": "(float[n,4] x) => (float[n,4] y) { y = HardSwish(x) }",
    "Mish": "(float[n,4] x) => (float[n,4] y) { y = Mish(x) }",
    "MeanVarianceNormalization": "(float[n,4,3,3] x) => (float[n,4,3,3] y) { y = MeanVarianceNormalization(x) }",
    "SoftmaxCrossEntropyLoss": """(float[n,5] x) => (float y)
        { i = ArgMax<axis = 1, keepdims = 0>(x) y = SoftmaxCrossEntropyLoss(x, i) }""",
    "CenterCropPad": """(float[6,4] x) => (float[3,8] y)
        { s = Constant<value = int64[2] {3, 8}>() y = CenterCropPad(x, s) }""",
    "RotaryEmbedding": """(float[2,3,4,8] x, float[2,4,4] c, float[2,4,4] s) => (float[2,3,4,8] y)
        { y = RotaryEmbedding(x, c, s) }""",
    "Attention": """(float[2,3,4,8] q, float[2,3,6,8] k, float[2,3,6,8] v) => (float[2,3,4,8] y)
        { y = Attention<softcap = 2.0, is_causal = 1>(q, k, v) }""",
}


def read(text: str, opset: int = 23) -> ir.Model:
    model = ir.from_proto(parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}'))
    infer_shapes(model)
    return model


@pytest.mark.parametrize("operator", CASES)
def test_definitions_compute_what_the_operator_computes(operator: str) -> None:
    model = read(CASES[operator])
    feeds = random_feeds(model, 0, samples=1)[0]
    before = Session(model, optimize=False).run(feeds)
    result = ExpandOperators(operators=(operator,)).run(model, CONTEXT)
    assert result.changed and result.notes == [f"written out: 1 {operator}"]
    assert operator not in {node.op_type for node in model.graph.all_nodes()}
    assert not model.functions and set(model.opset_imports) == {""}
    assert all(node.domain == "" for node in model.graph.all_nodes())
    np.testing.assert_allclose(Session(model, optimize=False).run(feeds)["y"], before["y"], rtol=1e-5, atol=1e-6)


def test_other_operators_stay_and_bodies_are_visited() -> None:
    model = read("""(bool c, float[n,4] x) => (float[n,4] y) {
        a = Mish(x) y = If(c) <then_branch = t () => (float[n,4] p) { p = Celu(a) },
                               else_branch = e () => (float[n,4] q) { q = Celu<alpha = 2.0>(a) }> }""")
    feeds = {"c": np.array(True), "x": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)}
    for taken in (True, False):
        feeds["c"] = np.array(taken)
        before = Session(model, optimize=False).run(feeds)["y"]
        ExpandOperators(operators=("Celu",)).run(model, CONTEXT)
        kinds = {node.op_type for node in model.graph.all_nodes()}
        assert "Mish" in kinds and "Celu" not in kinds
        np.testing.assert_allclose(Session(model, optimize=False).run(feeds)["y"], before, rtol=1e-5, atol=1e-6)


def test_what_the_standard_does_not_define_by_others_stays() -> None:
    model = read("(float[n,4] x) => (float[n,4] y) { y = Erf(x) }")
    result = ExpandOperators(operators=("Erf", "Celu")).run(model, CONTEXT)
    assert not result.changed and "does not define Erf by others in opset 23" in result.skipped[0].reason
