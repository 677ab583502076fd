"""Bytes of a layer's weights in each number format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt.quantization.formats import Format
from graphopt.quantization.prepared import Prepared
from graphopt.rewriting.constants import constant
from graphopt.rewriting.scopes import graphs

SCALE = 5
"""Bytes of a scale and its zero point."""

BLOCK = 32
"""Columns that share a scale where nothing else is said."""


def bytes_of(prepared: Prepared, formats: Mapping[str, Sequence[Format]]) -> dict[str, dict[Format, float]]:
    """Bytes by layer and format; a tensor that several layers read counts for the first.

    Args:
        prepared: the model in float, and how its weights are cut into blocks.
        formats: of each layer, by the name of its node's first output.
    """
    counted: set[ir.Value] = set()
    found: dict[str, dict[Format, float]] = {}
    for graph in graphs(prepared.model):
        for node in graph:
            key = next((v.name for v in node.outputs if v.name in formats), None)
            if key is None:
                continue
            weights = [
                tensor for value in node.inputs
                if value is not None and value not in counted and (tensor := constant(value)) is not None
                and tensor.dtype.is_floating_point()
            ]  # fmt: skip
            counted.update(value for value in node.inputs if value is not None)
            found[key] = {f: sum(_bytes(w, f, prepared) for w in weights) for f in formats[key]}
    return found


def _bytes(weight: ir.TensorProtocol, format: Format, prepared: Prepared) -> float:
    if format == "float" or len(weight.shape.numpy()) < 2:
        return float(weight.nbytes)
    elements = float(weight.size)
    if format in ("int8", "int8-dynamic"):
        return elements + SCALE * (max(weight.shape.numpy()) if prepared.per_channel else 1)
    bits = 4 if format == "int4-weights" else 8
    return elements * bits / 8 + 4 * elements / (prepared.block or BLOCK)
