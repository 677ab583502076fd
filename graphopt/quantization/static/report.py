"""What the report tells of a static quantisation: a row a layer, and how much work each does."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import onnx_ir as ir

from graphopt.numerics.histogram import Histogram
from graphopt.numerics.rounding import Affine
from graphopt.quantization.formats import Format
from graphopt.quantization.search.sensitivity import decibel
from graphopt.quantization.static.plan import Plan, Unit, name_of
from graphopt.quantization.static.rules import Kind
from graphopt.rewriting.constants import array
from graphopt.target import QuantScheme


def layer_rows(
    possible: Plan,
    chosen: Plan,
    activations: Mapping[str, Affine],
    weight_sqnr: Mapping[str, float],
    noise: Mapping[str, float],
    recovered: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """A row for every unit that could be quantised.

    Args:
        possible: the plan of everything.
        chosen: what was carried out.
        activations: scales by tensor.
        weight_sqnr: of every quantised weight, dB.
        noise: what each unit alone adds at the outputs, as power; those that were not measured are left out.
        recovered: by how much the noise of the whole falls without it; the same.
    """
    rows: list[dict[str, Any]] = []
    for key, unit in possible.units.items():
        kept = key in chosen.units
        row: dict[str, Any] = {"layer": unit.label, "op": unit.op_type, "type": "int8" if kept else "float32"}
        root = chosen.roots.get(unit.carriers[0]) if kept and unit.quantise_output else None
        params = activations.get(root) if root else None
        row["output scale"] = float(params.scale) if params else None
        row["output zero point"] = int(params.zero_point) if params else None
        row["weight SQNR dB"] = _rounded(weight_sqnr.get(key))
        row["output SQNR dB, alone"] = _rounded(decibel(noise[key])) if key in noise else None
        row["noise recovered in float"] = _exponent((recovered or {}).get(key))
        rows.append(row)
    return rows


def add_costs(
    rows: list[dict[str, Any]],
    keys: Iterable[str],
    times: tuple[Mapping[str, float], Mapping[str, float]],
    sizes: Mapping[str, Mapping[Format, float]],
) -> None:
    """Say in each row what the layer takes and weighs, as it is and in float.

    Args:
        rows: of `layer_rows`.
        keys: of the units, in the same order.
        times: seconds in the model before and after, by key; empty where nothing was timed.
        sizes: bytes of weights, by key and format.
    """
    before, after = times
    for key, row in zip(keys, rows, strict=True):
        format: Format = "int8" if row["type"] == "int8" else "float"
        row["time us"] = _exponent(1e6 * after[key]) if key in after else None
        row["time us in float"] = _exponent(1e6 * before[key]) if key in before else None
        row["bytes"] = round(sizes[key][format]) if key in sizes else None
        row["bytes in float"] = round(sizes[key]["float"]) if key in sizes else None


def summary(chosen: Plan, scheme: QuantScheme, rule: str, *, per_channel: bool) -> str:
    """How much works on integers, and on which."""
    compute = sum(u.rule.kind is Kind.COMPUTE for u in chosen.units.values())
    return (
        f"{compute} weighted layers and {len(chosen.units) - compute} operators between them work on integers "
        f"({scheme.activation} activations, {scheme.weight} weights, "
        f"{'per channel' if per_channel else 'per tensor'}, ranges {rule})"
    )


def multiply_accumulates(model: ir.Model, possible: Plan, histograms: Mapping[str, Histogram]) -> dict[str, float]:
    """Multiply-accumulates of every unit on the calibration data, from the sizes of the tensors seen there.

    A product of two activations counts the last axis of the second as recorded, and as 1 where that is symbolic.
    """
    nodes = {name_of(node.outputs[0]): node for node in model.graph if node.outputs}

    def seen(tensor: str) -> float:
        return histograms[possible.roots[tensor]].total

    return {
        key: _work(nodes[key], unit, seen, possible.roots) if unit.rule.kind is Kind.COMPUTE else 0.0
        for key, unit in possible.units.items()
    }


def _work(node: ir.Node, unit: Unit, seen: Callable[[str], float], recorded: Container[str]) -> float:
    read = seen(name_of(node.inputs[unit.data[0]]))
    weight = array(node.inputs[unit.weight]) if unit.weight is not None else None
    if weight is None:
        second = node.inputs[1].shape if node.inputs[1] is not None else None
        columns = second[-1] if second else 1
        return read * (columns if isinstance(columns, int) else 1)
    if unit.op_type == "Conv" and unit.carriers[0] not in recorded:
        # Its result is float on this target and was not looked at: as if padding kept the size.
        strides = math.prod(int(stride) for stride in node.attributes.get_ints("strides", ()) or ())
        channels = weight.shape[1] * (node.attributes.get_int("group", 1) or 1)
        return read * float(weight.size / max(1, strides * channels))
    if unit.op_type == "Conv":
        return seen(unit.carriers[0]) * float(weight.size / max(1, weight.shape[0]))
    if unit.op_type == "ConvTranspose":
        return read * float(weight.size / max(1, weight.shape[0]))
    return read * _products(node, unit, weight.shape)


def _products(node: ir.Node, unit: Unit, weight: tuple[int, ...]) -> int:
    """How often a matrix product takes each number of its activation; a vector counts as one row or column."""
    if len(weight) < 2:
        return 1
    transposed = unit.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return weight[-2] if transposed or unit.weight == 0 else weight[-1]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 1)


def _exponent(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")
