from __future__ import annotations

import onnx_ir as ir

from graphopt.rewriting.nodes import FOLDED_FROM, mark_origin


def test_origins_are_kept_in_order_and_once() -> None:
    value = ir.Value(name="v")
    mark_origin(value, ["b", "a"])
    mark_origin(value, ["a", "c"])
    assert value.metadata_props[FOLDED_FROM] == "b,a,c"
