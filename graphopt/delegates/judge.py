"""Whether a delegate takes a unit, by its rules; where it does not, every reason with the change that would lift it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.delegates.checks import CHECKS
from graphopt.delegates.table import Delegate, Rule
from graphopt.delegates.units import Unit
from graphopt.rewriting.nodes import is_onnx

_QUANTISED = ("uint8", "int8")

FLOAT = "lower the float model, or take it back with graphopt optimize --passes dequantize"
"""What to do for a delegate that takes no integers."""


@dataclass(frozen=True)
class Refusal:
    """One thing that stands against a unit.

    Attributes:
        kind: "operator", "quantised", "opset", "shape", "rank", "type", "constant", "absent", "attribute", "check",
            "body".
        reason: what is wrong with it, a sentence about the node.
        change: what would lift it, an imperative that is the same for all nodes that the same change helps; "" where
            none is known.
    """

    kind: str
    reason: str
    change: str


def refusals(unit: Unit, delegate: Delegate, fix: str) -> tuple[Refusal, ...]:
    """Everything that stands against a unit by the rule that is nearest to taking it; () where it is taken.

    Args:
        unit: an operator.
        delegate: whose rules.
        fix: how the free sizes of the model are fixed, for the change that lifts unknown shapes.
    """
    if computes_shapes(unit.node) and not delegate.shapes:
        return (Refusal("shape", "it computes the shape of something", fix),)
    rules = delegate.rules_for(unit.op, quantised=unit.quantised)
    if not rules:
        return (_no_rule(unit, delegate),)
    found = [tuple(_against(unit, rule, delegate, fix)) for rule in rules]
    return min(found, key=len)


def computes_shapes(node: ir.Node) -> bool:
    """Whether a node makes integers of nothing but shapes: with fixed sizes it is a constant."""
    seen: set[ir.Node] = set()
    found, pending = False, [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op_type in ("Shape", "Size") and current.domain in ("", "ai.onnx"):
            found = True
            continue
        for value in current.inputs:
            if value is None or _constant(value):
                continue
            made = value.producer()
            if made is None:
                return False
            pending.append(made)
    return found


def _no_rule(unit: Unit, delegate: Delegate) -> Refusal:
    op = unit.op
    if is_onnx(unit.node, "QuantizeLinear", "DequantizeLinear") and not delegate.int8:
        return Refusal("quantised", "no Q/DQ is taken", FLOAT)
    if unit.quantised and delegate.rules_for(op):
        return Refusal(
            "quantised",
            f"{op} is taken in float, not between Q and DQ",
            f"leave {op} in float",
        )
    instead = delegate.instead.get(op)
    return Refusal("operator", f"{op} has no kernel there", f"replace {op}: {instead}" if instead else "")


def _against(unit: Unit, rule: Rule, delegate: Delegate, fix: str) -> Iterator[Refusal]:
    node, op = unit.node, unit.op
    version = _since(node)
    if version < rule.since or (rule.until is not None and version > rule.until):
        limits = f"from version {rule.since}" + (f" to {rule.until}" if rule.until is not None else "")
        yield Refusal(
            "opset", f"{op} of version {version} is taken {limits}", f"convert the operator set: {op} {limits}"
        )
    yield from _shapes(unit, rule, delegate, fix)
    yield from _types(unit, rule, delegate)
    for name in rule.constant:
        value = unit.operand(name)
        if value is not None and not _constant(value):
            made = value.producer()
            change = f"make {name} of {op} a constant"
            if made is not None and computes_shapes(made):
                change = fix
            elif made is not None and is_onnx(made, "DequantizeLinear") and not delegate.int8:
                change = FLOAT
            yield Refusal("constant", f"{name} is computed", change)
    for name in rule.absent:
        if unit.operand(name) is not None:
            yield Refusal("absent", f"{name} is given", f"leave out {name} of {op}")
    for name, allowed in rule.attributes.items():
        given = _attribute(node, name)
        if given is not None and given not in allowed:
            listed = " or ".join(str(v) for v in allowed)
            yield Refusal("attribute", f"{name} is {_text(given)}, not {listed}", f"change {name} of {op} to {listed}")
    if unit.quantised:
        yield from _scales(unit, rule)
    for name in rule.checks:
        wrong = CHECKS[name](unit)
        if wrong is not None:
            wanted = (CHECKS[name].__doc__ or name).splitlines()[0].rstrip(".")
            yield Refusal("check", wrong, f"rewrite {op}: {wanted[0].lower()}{wanted[1:]}")


def _shapes(unit: Unit, rule: Rule, delegate: Delegate, fix: str) -> Iterator[Refusal]:
    needed = (
        {index: None for index, v in enumerate(unit.node.inputs) if v is not None} if delegate.static_shapes else {}
    )
    for index in needed:
        value = unit.operand(str(index))
        if value is not None and not _is_static(value):
            yield Refusal("shape", f"the shape of {value.name} is {_shape_text(value)}", fix)
            break
    for index in range(len(unit.node.inputs) if delegate.largest else 0):
        value = unit.operand(str(index))
        longest = max((d for d in shapes.dims(value) or () if isinstance(d, int)), default=0) if value else 0
        if delegate.largest is not None and value is not None and longest > delegate.largest:
            reason = f"{value.name} has {longest} entries along an axis, of {delegate.largest} at most"
            yield Refusal("shape", reason, f"cut axes longer than {delegate.largest}")
    for name, axes in rule.known.items():
        value = unit.operand(name)
        known = shapes.dims(value) if value is not None else None
        if value is not None and (
            known is None or any(-len(known) <= a < len(known) and not isinstance(known[a], int) for a in axes)
        ):
            yield Refusal("shape", f"the shape of {value.name} is {_shape_text(value)}", fix)
    first = unit.operand("0")
    checked = {"0": tuple(range(delegate.ranks[0], delegate.ranks[1] + 1)), **rule.ranks}
    for name, ranks in checked.items():
        value = first if name == "0" else unit.operand(name)
        known = shapes.dims(value) if value is not None else None
        if known is not None and len(known) not in ranks:
            text = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 2 else " or ".join(map(str, ranks))
            yield Refusal(
                "rank",
                f"{_called(name, value)} has {len(known)} axes, not {text}",
                f"reshape around {unit.op} to {text} axes",
            )


def _types(unit: Unit, rule: Rule, delegate: Delegate) -> Iterator[Refusal]:
    first = _QUANTISED if unit.quantised else delegate.types
    listed = rule.types if rule.types and "0" in rule.types else {"0": first, **rule.types}
    named_first = any(unit.operand(name) is unit.operand("0") for name in rule.types if name != "0")
    for name, allowed in listed.items():
        if name == "0" and named_first:
            continue
        value = unit.operand(name)
        kind = None if value is None or value.dtype is None else value.dtype.name.lower()
        kind = {"float": "float32", "double": "float64"}.get(kind or "", kind)
        if kind is not None and kind not in allowed:
            wanted = " or ".join(allowed)
            change = f"make {unit.op} {wanted}"
            if unit.quantised and delegate.int8:
                change = f"quantise for --target {delegate.int8}"
            yield Refusal("type", f"{_called(name, value)} is {kind}, not {wanted}", change)


def _scales(unit: Unit, rule: Rule) -> Iterator[Refusal]:
    """Per-channel scales where the rule takes one a tensor; scales that are computed."""
    names = [str(i) for i, v in enumerate(unit.node.inputs) if v is not None]
    for place, name in enumerate(names):
        found = unit.parameters(name)
        if found is None:
            continue
        if found[0] is None:
            yield Refusal("constant", f"the scale of input {name} is computed", "make scales constant (quantize)")
        elif found[0].size > 1 and not (rule.scales == "channel" and place > 0):
            yield Refusal(
                "quantised",
                f"input {name} has {found[0].size} scales, not 1",
                f"quantise {unit.op} with one scale a tensor",
            )


def _constant(value: ir.Value) -> bool:
    return shapes.constant_tensor(value) is not None


def _is_static(value: ir.Value) -> bool:
    known = shapes.dims(value)
    return known is not None and all(isinstance(d, int) for d in known)


def _shape_text(value: ir.Value) -> str:
    known = shapes.dims(value)
    return "unknown" if known is None else "[" + ", ".join("?" if d is None else str(d) for d in known) + "]"


def _called(name: str, value: ir.Value | None) -> str:
    return f"input {value.name if value is not None else ''}" if name.isdigit() else name


def _attribute(node: ir.Node, name: str) -> Any:
    """Value of an attribute, else the standard's default; None where there is neither."""
    import onnx

    found = node.attributes.get(name)
    if found is not None:
        value = found.value
        return tuple(value) if isinstance(value, (list, tuple)) else value
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        entry = onnx.defs.get_schema(node.op_type, shapes.opset(node), domain).attributes.get(name)
    except onnx.defs.SchemaError:
        return None
    if entry is None or not entry.default_value.ByteSize():
        return None
    value = onnx.helper.get_attribute_value(entry.default_value)
    return value.decode() if isinstance(value, bytes) else value


def _since(node: ir.Node) -> int:
    """Version in which the operator got the form it has in the model's operator set."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, shapes.opset(node), "" if node.domain == "ai.onnx" else node.domain)
    except onnx.defs.SchemaError:
        return 1
    return int(schema.since_version)


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
