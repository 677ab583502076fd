"""Which layers can be computed in which number format on a target, and what stands against the other formats.

    float           as it is
    int8            weights and activations, scales from calibration (`plan`, `emit`)
    int8-dynamic    weights and activations, scales found as the activations arrive (`dynamic`)
    int8-weights    weights alone, in blocks (`weights`)
    int4-weights    the same with 4 bits

Which operators a target's kernels take in a format is data of the target (`graphopt.target.QuantScheme`); what stands
against one node is told by the writer of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt.quantization.dynamic.scheme import dynamic_reason
from graphopt.quantization.static.plan import IN_A_BODY, excluded, plan, refusal
from graphopt.quantization.static.rules import RULES, Kind
from graphopt.quantization.weights.scheme import weight_layers
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs
from graphopt.target import QuantScheme, Target

Format = Literal["float", "int8", "int8-dynamic", "int8-weights", "int4-weights"]
WeightFormat = Literal["int8-weights", "int4-weights"]
Kinds = Literal["layer", "product", "table", "recurrent", "between"]

FORMATS: tuple[Format, ...] = ("float", "int8", "int8-dynamic", "int8-weights", "int4-weights")

BITS: Mapping[WeightFormat, int] = {"int8-weights": 8, "int4-weights": 4}

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Candidate:
    """A node whose format can be chosen.

    Attributes:
        key: name of its first output, which identifies it in every clone.
        label: how reports name it.
        op_type: operator type.
        kind: "layer"; "product" of two activations; "table" that a Gather reads; "recurrent"; "between": an operator
            that connects int8 layers, and has no other format.
        body: whether it stands in a branch or loop body.
        formats: what it can be, "float" first.
        reasons: what stands against each of the other formats.
    """

    key: str
    label: str
    op_type: str
    kind: Kinds
    body: bool
    formats: tuple[Format, ...]
    reasons: Mapping[Format, str]


def candidates(
    model: ir.Model,
    target: Target,
    exclude: tuple[str, ...] = (),
    *,
    block: int | None = None,
    symmetric: bool | None = None,
) -> dict[str, Candidate]:
    """Every node whose format can be chosen, in graph order, bodies in the place of their operator.

    Args:
        model: with inferred types; not changed.
        target: whose kernels count.
        exclude: globs over names of nodes that stay in float; they are listed, with that as the reason.
        block: columns that share a scale where weights alone are quantised; None: what is best for their form.
        symmetric: whether those have no zero points; None: with 8 bits they have none.
    """
    between = _between(model, target.quant, exclude)
    weights = [_WeightReasons(model, target, name, block, symmetric) for name in BITS]
    found: dict[str, Candidate] = {}
    for graph in graphs(model):
        body = graph is not model.graph
        for node in graph:
            key = next((v.name for v in node.outputs if v.name), "")
            kind = _kind(node) or ("between" if key in between and not body else None)
            if kind is None:
                continue
            barred = excluded(node, exclude)
            reasons: dict[Format, str] = {}
            if barred:
                reasons = dict.fromkeys(FORMATS[1:], barred)
            elif kind == "between":
                reasons = dict.fromkeys(FORMATS[2:], "it has no weight, and works on integers between int8 layers only")
            else:
                reasons = _reasons(node, target.quant, body=body)
                reasons |= {w.format: reason for w in weights if (reason := w.against(key, node))}
            formats = tuple(name for name in FORMATS if name not in reasons)
            found[key] = Candidate(key, label(node), node.op_type, kind, body, formats, reasons)
    return found


def _between(model: ir.Model, scheme: QuantScheme | None, exclude: tuple[str, ...]) -> set[str]:
    """Keys of operators with a scale of their own that connect int8 layers; others follow what they read."""
    if scheme is None:
        return set()
    units = plan(model, scheme, exclude=exclude).units
    return {key for key, unit in units.items() if unit.rule.kind is Kind.RESCALE}


def _kind(node: ir.Node) -> Kinds | None:
    if is_onnx(node, *RECURRENT):
        return "recurrent"
    if is_onnx(node, "Gather") and _is_table(node.inputs[0]):
        return "table"
    if not is_onnx(node, *LINEAR) or len(node.inputs) < 2:
        return None
    return "layer" if any(constant(value) is not None for value in node.inputs[:2]) else "product"


def _is_table(value: ir.Value | None) -> bool:
    """Whether a constant holds floating-point numbers in rows, which a Gather may read."""
    tensor = constant(value)
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) >= 2


def _reasons(node: ir.Node, scheme: QuantScheme | None, *, body: bool) -> dict[Format, str]:
    """What stands against integer activations, where something does."""
    if scheme is None:
        return dict.fromkeys(FORMATS[1:3], "the target computes in floating point only")
    found: dict[Format, str | None] = {
        "int8": IN_A_BODY if body else _static_reason(node, scheme),
        "int8-dynamic": dynamic_reason(node, scheme.dynamic, products=True),
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _static_reason(node: ir.Node, scheme: QuantScheme) -> str | None:
    rule = RULES.get(node.op_type)
    if rule is None or rule.kind is not Kind.COMPUTE:
        return f"no runtime has an int8 kernel with static scales for {node.op_type} that reads constants"
    return refusal(node, scheme)


class _WeightReasons:
    """What stands against storing weights of nodes in one format."""

    def __init__(
        self, model: ir.Model, target: Target, format_: WeightFormat, block: int | None, symmetric: bool | None
    ) -> None:
        self.format = format_
        self._able, skipped = weight_layers(
            model, bits=BITS[format_], block=block, symmetric=symmetric, kernels=target.weights
        )
        self._skipped = {skip.node: skip.reason for skip in skipped}

    def against(self, key: str, node: ir.Node) -> str | None:
        """The reason; None where nothing stands against it."""
        return None if key in self._able else self._skipped.get(label(node), "it has no weight")
