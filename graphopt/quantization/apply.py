"""Any mixture of number formats, written into a model.

Layers whose weights alone are quantised and layers with dynamic scales come first: they are rewritten node by node. The
static layers are planned on what is then there, as if all the others were in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.quantization.dynamic import write_dynamic
from graphopt.quantization.formats import Format
from graphopt.quantization.inserted_scales import insert_scales, told
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.rules import Kind
from graphopt.quantization.static_report import layer_rows, summary


@dataclass
class Applied:
    """What came of an assignment.

    Attributes:
        skipped: nodes that stay in float though they were given another format, with the reason.
        rows: a row for every node that has a static scale or could have one (`layer_rows`).
        notes: sentences for the report.
    """

    skipped: list[Skip] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def apply(model: ir.Model, assignment: Mapping[str, Format], prepared: Prepared) -> Applied:
    """Write a mixture of formats into a model, in place.

    Args:
        model: a clone of `prepared.model`, or that itself once no other variant is needed.
        assignment: the format of nodes by key (`graphopt.quantization.formats.candidates`). Weighted nodes that it
            leaves out stay in float; operators between int8 layers that it leaves out are int8 wherever that saves a
            pair of conversions.
        prepared: what was measured on `prepared.model`.

    Returns:
        what could not be done, and rows for the report. The same assignment gives the same bytes.

    Raises:
        ModelError: the opset cannot be raised.
    """
    possible = prepared.everything.units  # of the model before anything is written
    done = Applied()
    dynamic = _keys(assignment, "int8-dynamic")
    if dynamic and insert_scales(model, dynamic, prepared.ahead):
        done.notes.append(told(prepared.ahead.values()))
    done.skipped += write_dynamic(model, dynamic, prepared.rounding, prepared.scheme, per_channel=prepared.per_channel)
    static = _keys(assignment, "int8")
    barred = prepared.unfit_units()
    done.skipped += [Skip(possible[key].label, reason) for key, reason in barred.items() if key in static]
    done.skipped += [Skip(key, "it has no int8 form on the target") for key in sorted(static - possible.keys())]
    layers = {key for key, unit in possible.items() if unit.rule.kind is Kind.COMPUTE}
    if (static & layers) - barred.keys():
        _write_static(model, assignment, prepared, done)
    return done


def _keys(assignment: Mapping[str, Format], wanted: Format) -> set[str]:
    return {key for key, given in assignment.items() if given == wanted}


def _write_static(model: ir.Model, assignment: Mapping[str, Format], prepared: Prepared, done: Applied) -> None:
    """Plan what works on integers with static scales in a model whose other layers are written, and write it."""
    possible = prepared.everything
    in_float = set(prepared.unfit_units())
    for key, unit in possible.units.items():
        default: Format = "float" if unit.rule.kind is Kind.COMPUTE else "int8"
        if assignment.get(key, default) != "int8":
            in_float.add(key)
    chosen = prepared.planned(in_float, prepared.outputs, model)
    emitter = prepared.write(model, chosen)
    done.rows += layer_rows(possible, chosen, prepared.activations, emitter.weight_sqnr, {})
    done.notes.append(summary(chosen, prepared.scheme, prepared.rule, per_channel=prepared.per_channel))
