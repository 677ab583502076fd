"""Tables of delegates are data: what they name must exist."""

from __future__ import annotations

from datetime import date

import onnx
import pytest

from graphopt import registry
from graphopt.delegates import delegate, delegates
from graphopt.delegates.table import parse_delegate
from graphopt.errors import UsageError

WITHDRAWN = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "GroupNorm"}
"""Operators that parsers still read and the standard has no more."""

# Operators of ONNX Runtime's contrib domain and of TensorRT's plugins have no schema here.
TYPES = {
    "float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
    "uint64", "bool", "int4", "uint4", "string", "float8e4m3fn", "float8e5m2", "float4e2m1", "float8e8m0",
}  # fmt: skip


def versions(op: str) -> list[onnx.defs.OpSchema]:
    return [s for s in onnx.defs.get_all_schemas_with_history() if s.name == op and s.domain == ""]


def test_there_is_a_table_for_every_accelerator() -> None:
    assert {"coreml_mlprogram", "coreml_neuralnetwork", "nnapi", "qnn_htp", "xnnpack"} <= set(delegates())


@pytest.mark.parametrize("name", delegates())
def test_what_a_table_names_exists(name: str) -> None:
    chosen = delegate(name)
    assert chosen.sources and date.fromisoformat(chosen.date) and chosen.rules
    assert not chosen.int8 or registry.target(chosen.int8).quant is not None
    assert set(chosen.types) <= TYPES
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    for rule in chosen.rules:
        for op in rule.ops:
            assert ":" in op or op in known | WITHDRAWN, f"{op} is no operator"
        assert {t for types in rule.types.values() for t in types} <= TYPES
        schemas = [schema for op in rule.ops for schema in versions(op)]
        operands = {entry.name for s in schemas for entry in (*s.inputs, *s.outputs)}
        attributes = {entry for s in schemas for entry in s.attributes}
        named = {*rule.types, *rule.ranks, *rule.constant, *rule.absent, *rule.known}
        assert {n for n in named if not n.isdigit()} <= operands, f"{rule.ops}: {named - operands}"
        assert set(rule.attributes) <= attributes, f"{rule.ops}: {set(rule.attributes) - attributes}"
    assert {op for op in chosen.instead if ":" not in op} <= known


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"titel": "x"}, "unknown key 'titel'"),
        ({"title": "x"}, "date"),
        ({"title": "x", "date": "", "sources": [], "rules": [{"ops": ["Add"], "rank": {}}]}, r"rule 1 \(Add\).*'rank'"),
        (
            {"title": "x", "date": "", "sources": [], "rules": [{"ops": ["Add"], "checks": ["no"]}]},
            "unknown check 'no'",
        ),
    ],
)
def test_wrong_tables_are_refused(table: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse_delegate("x", table, "x.toml")


def test_unknown_delegates_are_refused() -> None:
    with pytest.raises(UsageError, match="the delegates are coreml_mlprogram"):
        delegate("npu")
