"""Does a QDQ model obey the rules of a target? Read off the graph alone, whoever wrote it.

The rules are `graphopt.target.QuantScheme` and the placement table (`rules`). A kernel here is a node of the main graph
whose operator the target executes on integers, that reads an activation through DequantizeLinear and, where it only
connects layers, writes one through QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.numerics.rounding import Grid
from graphopt.quantization.back.recognised import is_quantised
from graphopt.quantization.static.fused_sums import fused_operands
from graphopt.quantization.static.rules import ABSORBED, CPU_OPS, RULES, Kind, Rule
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.target import QuantScheme

LINEAR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Violation:
    """One rule broken: at which node, which rule, and how."""

    node: str
    rule: str
    text: str


def violations(model: ir.Model, scheme: QuantScheme) -> list[Violation]:
    """Every place of the main graph where a quantised model breaks a rule of the scheme.

    Args:
        model: with inferred types; a float model breaks none.
        scheme: of the target.
    """
    found: list[Violation] = []
    kernels = _kernels(model.graph, scheme)
    fused = _fused(model.graph, scheme)
    for node in model.graph:
        if is_quantised(node) and not is_onnx(node, *LINEAR):
            found.append(Violation(label(node), "operators", f"{node.op_type} is no Q/DQ form"))
        elif is_onnx(node, "QuantizeLinear"):
            found += _activation(node, scheme)
            found += _absorbed(node, kernels)
        elif node in kernels:
            found += _inputs(node, scheme, fused)
            found += _parameters(node, scheme)
            found += _output(node, scheme)
            found += _one_scale(node)
    return found


def _kernels(graph: ir.Graph, scheme: QuantScheme) -> set[ir.Node]:
    ops = scheme.ops or CPU_OPS
    return {
        n
        for n in graph
        if is_onnx(n, *ops) and n.op_type in RULES and any(_pair(v) for v in _activations(n))
        and (RULES[n.op_type].kind is Kind.COMPUTE or any(is_onnx(r, "QuantizeLinear") for r in _readers(n)))
    }  # fmt: skip


def _readers(node: ir.Node) -> list[ir.Node]:
    """What reads the results of a node, or of the activation that its quantised output makes superfluous."""
    use = sole_use(node.outputs[0])
    behind = use.node if use is not None and is_onnx(use.node, *ABSORBED) else node
    return [use.node for value in behind.outputs for use in value.uses()]


def _activations(node: ir.Node) -> list[ir.Value]:
    """Inputs that may be activations and are no constants, plain or behind DequantizeLinear."""
    rule = RULES[node.op_type]
    values = [v for i, v in enumerate(node.inputs) if rule.data is None or i in rule.data]
    return [v for v in values if v is not None and array(v) is None and _stored(v) is None]


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and is_onnx(node, "DequantizeLinear") else None


def _stored(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a constant behind a value."""
    node = _dequantize(value)
    return node if node is not None and array(node.inputs[0]) is not None else None


def _pair(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of an activation behind a value."""
    node = _dequantize(value)
    return node if node is not None and array(node.inputs[0]) is None else None


def _type(node: ir.Node) -> np.dtype[np.generic]:
    """The integer type that a QuantizeLinear writes or a DequantizeLinear reads."""
    zero = array(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        return zero.dtype
    stored = array(node.inputs[0]) if is_onnx(node, "DequantizeLinear") else None
    return np.dtype(np.uint8) if stored is None else stored.dtype


def _zero(node: ir.Node) -> int | None:
    """The one zero point of a node; None where there are several."""
    zero = array(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is None:
        return 0
    return int(zero.reshape(-1)[0]) if (zero == zero.reshape(-1)[0]).all() else None


def _activation(node: ir.Node, scheme: QuantScheme) -> Iterator[Violation]:
    """Type, zero point and scale of a quantised activation."""
    if array(node.inputs[0]) is not None:
        return
    kind, scale = _type(node), array(node.inputs[1])
    if kind != np.dtype(scheme.activation):
        yield Violation(label(node), "activation type", f"{kind}, not {scheme.activation}")
    middle = Grid.of(scheme.activation, symmetric=True).middle
    if scheme.symmetric_activation and _zero(node) != middle:
        yield Violation(label(node), "symmetric activations", f"zero point {_zero(node)}, not {middle}")
    if scale is None or scale.size != 1:
        yield Violation(label(node), "one scale a tensor", "its activation has none or several that are constant")


def _absorbed(node: ir.Node, kernels: set[ir.Node]) -> Iterator[Violation]:
    """A pair must belong to a kernel: to one that writes it, or one that reads it."""
    source = node.inputs[0]
    before = source.producer() if source is not None else None
    if before is not None and is_onnx(before, *ABSORBED) and before.inputs[0] is not None:
        before = before if before in kernels else before.inputs[0].producer()
    if before is not None and is_onnx(before, "Add"):
        # of a MatMul: the bias
        products = {v.producer() for v in before.inputs if v is not None} & kernels
        before = next(iter(products), before) if before not in kernels else before
    after = {use.node for value in node.outputs for use in value.uses()}
    readers = {use.node for n in after for value in n.outputs for use in value.uses()}
    if before not in kernels and not (readers | after) & kernels and not any(not is_onnx(n, *LINEAR) for n in after):
        yield Violation(
            label(node), "no idle pairs", "neither what is before the pair nor what is behind it is a kernel"
        )


def _inputs(node: ir.Node, scheme: QuantScheme, fused: dict[str, int]) -> Iterator[Violation]:
    """All activations of a kernel are integers, but for the operand of a fused sum."""
    spared = fused.get(node.outputs[0].name or "")
    activations = _activations(node)
    for index, value in enumerate(node.inputs):
        if value is not None and index != spared and any(value is v for v in activations) and _pair(value) is None:
            yield Violation(label(node), "integer inputs", f"reads {value.name!r} in float")
    if scheme.fused_sums and is_onnx(node, "Add") and spared is None and any(_hides_layer(v) for v in activations):
        yield Violation(
            label(node), "fused sums", "the result of the layer that could compute it is quantised before it"
        )


def _hides_layer(value: ir.Value) -> bool:
    """Whether a pair stands between a layer and the only reader of its result."""
    pair = _pair(value)
    quantize = pair.inputs[0].producer() if pair is not None and pair.inputs[0] is not None else None
    source = quantize.inputs[0] if quantize is not None and is_onnx(quantize, "QuantizeLinear") else None
    layer = source.producer() if source is not None else None
    if quantize is None or source is None or layer is None or layer.op_type not in RULES:
        return False
    alone = all(sole_use(v) is not None for v in (source, quantize.outputs[0], value))
    return alone and RULES[layer.op_type].kind is Kind.COMPUTE and any(_pair(v) for v in _activations(layer))


def _parameters(node: ir.Node, scheme: QuantScheme) -> Iterator[Violation]:
    """Weight and bias of a layer."""
    rule = RULES[node.op_type]
    if rule.kind is not Kind.COMPUTE:
        return
    weight = _weight(node, rule)
    stored = _stored(weight)
    if weight is not None and stored is None and array(weight) is not None:
        yield Violation(label(node), "integer weights", "its weight is a float constant")
    if stored is not None:
        yield from _weight_rules(node, stored, scheme, rule)
    bias = node.inputs[rule.bias] if rule.bias is not None and rule.bias < len(node.inputs) else None
    if bias is None:
        return
    units = _stored(bias)
    if scheme.bias == "float" and units is not None:
        yield Violation(label(node), "float bias", "its bias is quantised")
    if scheme.bias == "int32":
        if units is None or _type(units) != np.int32:
            yield Violation(label(node), "int32 bias", "its bias is float or of another type")
        elif stored is not None and not _fits(node, stored, units):
            yield Violation(label(node), "int32 bias", "its scale is not that of the input times that of the weight")


def _weight(node: ir.Node, rule: Rule) -> ir.Value | None:
    if rule.weight is None:
        return None
    if is_onnx(node, "MatMul"):
        return next((v for v in reversed(node.inputs) if _stored(v) is not None or array(v) is not None), None)
    return node.inputs[rule.weight]


def _weight_rules(node: ir.Node, stored: ir.Node, scheme: QuantScheme, rule: Rule) -> Iterator[Violation]:
    kind, scale = _type(stored), array(stored.inputs[1])
    if kind != np.dtype(scheme.weight):
        yield Violation(label(node), "weight type", f"{kind}, not {scheme.weight}")
    if _zero(stored) != Grid.of(scheme.weight, symmetric=True).middle:
        yield Violation(label(node), "symmetric weights", f"zero point {_zero(stored)}")
    if scale is None or scale.size == 1:
        return
    if not scheme.per_channel or (scheme.per_channel_ops and node.op_type not in scheme.per_channel_ops):
        yield Violation(label(node), "one scale a weight", f"{scale.size} scales for a {node.op_type}")
    channel = (0 if node.attributes.get_int("transB", 0) else 1) if is_onnx(node, "Gemm") else rule.channel_axis
    rank = len(stored.outputs[0].shape or array(stored.inputs[0]).shape)  # type: ignore[union-attr]
    if int(stored.attributes.get_int("axis", 1) or 0) % rank != channel:
        yield Violation(label(node), "scales by output channel", "they stand along another axis")


def _fits(node: ir.Node, weight: ir.Node, bias: ir.Node) -> bool:
    pair = _pair(node.inputs[0])
    x, w, b = (array(n.inputs[1]) if n is not None else None for n in (pair, weight, bias))
    return x is not None and w is not None and b is not None and bool(np.allclose(b, x * w, rtol=1e-4))


def _output(node: ir.Node, scheme: QuantScheme) -> Iterator[Violation]:
    """Kernels that only write integers must find a QuantizeLinear behind them."""
    rule = RULES[node.op_type]
    if not rule.needs_output or (scheme.float_outputs and rule.kind is Kind.COMPUTE):
        return
    readers = _readers(node)
    if not readers or node.outputs[0].is_graph_output() or not all(is_onnx(n, "QuantizeLinear") for n in readers):
        yield Violation(label(node), "integer outputs", "its result is read in float")


def _one_scale(node: ir.Node) -> Iterator[Violation]:
    """What moves integers gives those that it read."""
    if RULES[node.op_type].kind is not Kind.MOVE:
        return
    before = _pair(node.inputs[0])
    for value in node.outputs:
        for use in value.uses():
            if before is not None and is_onnx(use.node, "QuantizeLinear"):
                pairs = zip(before.inputs[1:], use.node.inputs[1:], strict=False)
                if any(not np.array_equal(array(a), array(b)) for a, b in pairs):  # type: ignore[arg-type]
                    yield Violation(label(node), "one scale through data movement", "it is quantised anew")


def _fused(graph: ir.Graph, scheme: QuantScheme) -> dict[str, int]:
    """For each sum that a layer computes by itself: the input that stays as it is."""
    if not scheme.fused_sums:
        return {}
    sums = {}
    for node in graph:
        if is_onnx(node, "Add") and node.outputs:
            sums[node.outputs[0].name or ""] = tuple(i for i, v in enumerate(node.inputs) if v in _activations(node))
    return fused_operands(graph, sums)
