"""Constants inside model-local functions are computed where they are, and stay Constant nodes."""

from __future__ import annotations

import onnx_ir as ir
from fold_checks import context, problem

from graphopt.model import infer_shapes
from graphopt.passes.fold import Fold
from graphopt.passes.fold_constants import FoldConstants

TEXT = """
<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
agraph (float[N, 4] x) => (float[N, 2, 2] y)
{
  h = local.shift (x)
  y = local.heads (h)
}
<domain: "local", opset_import: ["" : 18]>
shift (x) => (z)
{
  a = Constant <value: tensor = float[4] {1.0, 2.0, 3.0, 4.0}> ()
  b = Constant <value: tensor = float[4] {2.0, 2.0, 2.0, 2.0}> ()
  c = Mul (a, b)
  d = Sqrt (c)
  t = Neg (d)
  z = Add (x, t)
}
<domain: "local", opset_import: ["" : 18]>
heads (x) => (z)
{
  s = Shape (x)
  zero = Constant <value_ints: ints = [0]> ()
  b = Gather (s, zero)
  one = Constant <value_ints: ints = [1]> ()
  i = Add (one, one)
  k = Concat <axis = 0> (b, i, i)
  z = Reshape (x, k)
}
"""


def model() -> ir.Model:
    made = ir.from_onnx_text(TEXT)
    infer_shapes(made)
    return made


def test_constants_of_a_function_are_computed():
    folded = model()
    assert FoldConstants().run(folded, context()).changed
    shift, heads = folded.functions.values()
    assert [node.op_type for node in shift.graph] == ["Constant", "Add"]
    assert "Add" not in [node.op_type for node in heads.graph]


def test_fold_keeps_the_function():
    assert problem(model(), Fold(), 0) is None
