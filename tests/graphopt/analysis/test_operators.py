"""The table of operators covers what the installed onnx has, and tells the truth about it."""

from __future__ import annotations

import onnx.defs
import pytest
from text_graph import graph

from graphopt.analysis.operators import FROZEN, operators
from graphopt.analysis.units import analyse

OLDEST_OPSET = 7


def _standard() -> set[str]:
    """Operators of ONNX that are not gone before the oldest opset that is read."""
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]
    gone = {s.name for s in schemas if s.deprecated and s.since_version <= OLDEST_OPSET}
    return {s.name for s in schemas} - gone


def test_every_operator_of_onnx_is_in_the_table() -> None:
    assert _standard() - {operator.name for operator in operators() if not operator.domain} == set()


def test_every_operator_of_the_table_says_what_becomes_of_units() -> None:
    assert [operator.name for operator in operators() if len(operator.units) < 10] == []


@pytest.mark.parametrize(
    "name", ["Attention", "MultiHeadAttention", "SkipLayerNormalization", "QLinearAdd", "FusedMatMul"]
)
def test_operators_of_onnx_runtime_are_in_the_table(name: str) -> None:
    families = {o.name: o.family for o in operators() if o.domain == "com.microsoft"}
    assert families[name] != FROZEN


def test_a_frozen_operator_gives_the_reason_of_the_table() -> None:
    model = graph("(float[4,8] x) => (int64[] y)", "h = MatMul(x, w)  y = NonZero(h)", w=(8, 6))
    told = next(o.units for o in operators() if o.name == "NonZero")
    reasons = {f.axis: f.reason for f in analyse(model).frozen}
    assert reasons[1] == f"NonZero 'y': {told}"


def test_an_unknown_operator_is_named() -> None:
    model = graph(
        "(float[4,8] x) => (float[] y)", "h = MatMul(x, w)  y = com.acme.Mystery(h)", imports='"com.acme" : 1', w=(8, 6)
    )
    reasons = {f.axis: f.reason for f in analyse(model).frozen}
    assert reasons[1] == "com.acme.Mystery 'y': no rule for com.acme::Mystery"
