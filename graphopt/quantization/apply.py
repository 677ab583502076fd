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
from graphopt.files.opset import raise_opset
from graphopt.quantization.dynamic.scheme import MIN_OPSET, write_dynamic
from graphopt.quantization.formats import BITS, Format
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.scales.inserted import insert_scales, told
from graphopt.quantization.static.report import layer_rows, summary
from graphopt.quantization.static.rules import Kind
from graphopt.quantization.weights.scheme import write_weights


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
    done = Applied()
    static = _keys(assignment, "int8")
    # Of the model as it is before anything is written.
    possible = prepared.everything.units if static else {}
    barred = prepared.unfit_units() if static else {}
    for name, bits in BITS.items():
        written = write_weights(
            model, _keys(assignment, name), bits=bits, block=prepared.block, symmetric=prepared.symmetric,
            rounding=prepared.rounding, kernels=prepared.weights,
        )  # fmt: skip
        done.skipped += written.skipped
        done.notes += written.notes
    dynamic = _keys(assignment, "int8-dynamic")
    if dynamic and insert_scales(model, dynamic, prepared.ahead):
        done.notes.append(told(prepared.ahead.values()))
    raised = raise_opset(model, MIN_OPSET, "DynamicQuantizeLinear") if dynamic else None
    done.notes += [raised] if raised else []
    done.skipped += write_dynamic(model, dynamic, prepared.rounding, prepared.scheme, per_channel=prepared.per_channel)
    done.skipped += [Skip(possible[key].label, reason) for key, reason in barred.items() if key in static]
    done.skipped += [Skip(key, "it has no int8 form on the target") for key in sorted(static - possible.keys())]
    if any(possible[key].rule.kind is Kind.COMPUTE for key in (static & possible.keys()) - barred.keys()):
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
