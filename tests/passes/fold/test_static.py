"""fold{static=true}: no size is computed at run time, or the report says which and why; tables stay bounded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fold_checks import context
from text_graph import graph

from graphopt.executor import Session
from graphopt.files.input_sizes import fix_sizes
from graphopt.model import load
from graphopt.passes.fold import Fold
from graphopt.rewriting.scopes import graphs
from graphopt.rewriting.shape_nodes import computed_sizes
from graphopt.rewriting.size import size
from graphopt.verify import compare, random_feeds

HEADS = """
s = Shape (x)
b = Gather <axis: int = 0> (s, zero)
b1 = Unsqueeze (b, axes)
t = Shape <start: int = 1, end: int = 2> (x)
target = Concat <axis: int = 0> (b1, t, rest)
y = Reshape (x, target)
"""
CONSTANTS = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([2, 4])}


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for each in graphs(model) for node in each}


def test_fixed_inputs_leave_no_size_to_compute():
    model = graph("(float[batch, time, 8] x) => (float[batch, time, 2, 4] y)", HEADS, **CONSTANTS)
    fix_sizes(model, {}, {"x": (3, 5, 8)})
    result = Fold(static=True).run(model, context())
    assert operators(model) == {"Reshape"}
    assert "all sizes are fixed" in result.notes


def test_what_the_inputs_leave_open_is_told():
    model = graph("(float[batch, time, 8] x) => (float[batch, time, 2, 4] y)", HEADS, **CONSTANTS)
    fix_sizes(model, {"time": 5}, {})
    Fold(static=True).run(model, context())
    reasons = [skip.reason for skip in computed_sizes(model)]
    assert all("input x leaves [batch,5,8] open (--dim or --input-shape fixes it)" in reason for reason in reasons)


def test_sizes_that_depend_on_data_are_told_with_their_cause():
    model = graph(
        "(float[4, 4] x) => (float[n, m] y)",
        "found = NonZero (x)  s = Shape (found)  y = ConstantOfShape (s)",
    )
    result = Fold(static=True).run(model, context())
    reasons = [skip.reason for skip in result.skipped]
    assert any("depends on the data" in reason and "NonZero" in reason for reason in reasons)
    assert "warning: 2 nodes still compute or read sizes at run time" in result.notes


CAUSAL = """
r = Range (zero, n, one)
row = Reshape (r, wide)
column = Reshape (r, tall)
a = Expand (row, square)
b = Expand (column, square)
seen = LessOrEqual (a, b)
y = Where (seen, x, low)
"""
MASK = {
    "zero": np.array(0),
    "n": np.array(64),
    "one": np.array(1),
    "wide": np.array([1, 64]),
    "tall": np.array([64, 1]),
    "square": np.array([64, 64]),
    "low": np.array(-1e9, np.float32),
}


def test_sizes_that_a_condition_decides_are_told():
    """Every operand of the If is fixed; which of two sizes its result has shows at run time only."""
    model = graph(
        "(bool c, float[2, 3] x) => (int64[2] n)",
        """y = If (c) <then_branch = twice () => (float[4, 3] p) { p = Concat <axis = 0> (x, x) },
                    else_branch = once () => (float[2, 3] q) { q = Neg (x) }>
        n = Shape (y)""",
    )
    result = Fold(static=True).run(model, context())
    assert any("is not known from the inputs of" in skip.reason for skip in result.skipped)


def test_a_mask_is_written_out_only_where_sizes_must_be_fixed():
    original = graph("(float[64, 64] x) => (float[64, 64] y)", CAUSAL, **MASK)
    plain, static, small = (original.clone() for _ in range(3))
    Fold().run(plain, context())
    assert "Range" in operators(plain)
    assert size(plain).bytes <= size(original).bytes
    Fold(static=True).run(static, context())
    assert operators(static) == {"Where"}
    Fold(static=True, max_bytes=1024).run(small, context())
    assert max(v.const_value.nbytes for v in small.graph.initializers.values()) <= 1024
    for model in (plain, static, small):
        assert compare(original, model, random_feeds(original, 0, samples=1)).equal


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("minilm_l6", {"input_ids": (1, 16)}),
        ("yunet_n_dynamic", {"input": (1, 3, 320, 320)}),
        ("stories260k", {"input_ids": (1, 12)}),
        ("magika_v3_3", {"bytes": (1, 2048)}),
    ],
)
def test_real_models_with_fixed_sizes(data_dir, name, shapes):
    model = load(data_dir / "models" / f"{name}.onnx")
    fix_sizes(model, {}, shapes)
    folded = model.clone()
    Fold(static=True).run(folded, context())
    assert not {"Shape", "Size", "ConstantOfShape", "Range"} & operators(folded)
    assert computed_sizes(folded) == []
    assert compare(model, folded, random_feeds(model, 0, samples=1)).equal


def test_a_branch_that_the_sizes_do_not_fit_goes(data_dir):
    """576 samples are for 16 kHz: in the branch for 8 kHz an LSTM gets a sequence that it cannot take."""
    model = load(data_dir / "models" / "silero_vad_v5_if.onnx")
    fix_sizes(model, {}, {"input": (1, 576), "state": (2, 1, 128)})
    result = Fold(static=True).run(model, context())
    assert not [skip for skip in result.skipped if "at run time" in skip.reason]
    assert not any(node.op_type in ("If", "Shape") for node in model.graph.all_nodes())
    assert sum(node.op_type == "LSTM" for node in model.graph) == 1
    Session(model).close()
