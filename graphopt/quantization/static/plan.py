"""Decide which nodes of a model work on integers, and which tensors carry a scale: the plan of a QDQ quantisation.

The plan is made of names only, so one plan serves the model and every clone of it (sensitivity measures many).

A tensor is worth quantising when an integer kernel reads it. So the plan starts from all nodes that have a rule, and
takes away connecting nodes (rescale, move) as long as one of them lacks an integer input or an integer reader; what is
left are islands around the compute nodes, and every Q/DQ pair inside an island is absorbed by a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.quantization.back.recognised import quantised_already
from graphopt.quantization.static.fused_sums import fused_operands
from graphopt.quantization.static.rules import ABSORBED, CPU_OPS, RULES, Kind, Rule
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.sparsity.found import holds_any_pattern
from graphopt.sparsity.marks import is_wrapper
from graphopt.target import QuantScheme

IN_A_BODY = "inside a branch or loop body, where calibration sees no values"


@dataclass(frozen=True)
class Unit:
    """One node that works on integers.

    Attributes:
        key: name of its first output, which identifies it in every clone.
        label: its name in reports.
        op_type: operator type.
        rule: placement rule.
        data: input indices that are activations.
        constants: input indices that are constant operands quantised like activations (Add, Mul, Concat).
        weight, bias: input indices of constant parameters; None where there is none.
        bias_add: key of the Add behind a MatMul that adds a constant bias.
        carriers: names of the outputs that get a scale: those of the node, or of the activation absorbed into it.
        quantise_output: whether the outputs are quantised at all (a MatMul may leave in float).
    """

    key: str
    label: str
    op_type: str
    rule: Rule
    data: tuple[int, ...]
    constants: tuple[int, ...]
    weight: int | None
    bias: int | None
    bias_add: str | None
    carriers: tuple[str, ...]
    quantise_output: bool = True


@dataclass(frozen=True)
class Plan:
    """What is quantised.

    Attributes:
        units: nodes that work on integers, in graph order, by key.
        roots: for each quantised tensor, the tensor whose range it shares (itself, but behind data movement).
        skipped: nodes that could have been quantised and why they are not.
    """

    units: dict[str, Unit]
    roots: dict[str, str]
    skipped: list[Skip]

    def only(self, keys: Collection[str]) -> Plan:
        """The same plan with these units alone; ranges and output decisions stay."""
        return replace(self, units={k: u for k, u in self.units.items() if k in keys})

    @property
    def ranged(self) -> list[str]:
        """Tensors whose ranges calibration must measure, sorted by first appearance."""
        return list(dict.fromkeys(self.roots.values()))


def name_of(value: ir.Value | None) -> str:
    """The name of a value that is known to have one."""
    if value is None or value.name is None:
        raise ValueError("a graph value without a name")
    return value.name


def plan(
    model: ir.Model,
    scheme: QuantScheme,
    *,
    exclude: tuple[str, ...] = (),
    in_float: Collection[str] = (),
    outputs: Collection[str] | None = (),
    known: Collection[str] | None = None,
) -> Plan:
    """Plan a static QDQ quantisation of the main graph.

    Args:
        model: with inferred types where possible; not changed.
        scheme: the target's.
        exclude: globs over node names; matching nodes stay in float.
        in_float: keys of units that stay in float.
        outputs: keys of units whose output is quantised though no integer kernel reads it; None: all with sparse
            weights, but for outputs of the graph.
        known: keys of the units of a plan that was made before other nodes of the model were quantised otherwise: these
            and no others can be units, whatever stands beside them now.
    """
    skipped: list[Skip] = []
    units = _candidates(model, scheme, exclude, in_float, known, skipped)
    if scheme.fused_sums:
        _fuse_sums(model.graph, units)
    _shrink_to_islands(model.graph, units)
    _decide_outputs(model.graph, units, outputs, scheme.float_outputs)
    return Plan(units, _roots(model.graph, units), skipped)


def refusal(node: ir.Node, scheme: QuantScheme, exclude: tuple[str, ...] = ()) -> str | None:
    """Why a node of the main graph that has a rule cannot work on integers, whatever its neighbours; None where it can.

    Args:
        node: its operator type is in `RULES`.
        scheme: the target's.
        exclude: globs over node names.
    """
    reason = excluded(node, exclude) or _wrapper(node) or _unfit(node, scheme.ops or CPU_OPS)
    if reason is None and _unit(node, RULES[node.op_type], name_of(node.outputs[0])) is None:
        return "neither input is an activation"
    return reason


def _candidates(
    model: ir.Model,
    scheme: QuantScheme,
    exclude: tuple[str, ...],
    in_float: Collection[str],
    known: Collection[str] | None,
    skipped: list[Skip],
) -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    claimed: set[str] = set()
    for node in model.graph:
        rule = RULES.get(node.op_type) if is_onnx(node, node.op_type) else None
        if rule is None or not node.outputs or name_of(node.outputs[0]) in claimed:
            continue
        key = name_of(node.outputs[0])
        if key in in_float or (known is not None and key not in known):
            continue
        reason = refusal(node, scheme, exclude) if known is None else None
        unit = None if reason else _unit(node, rule, key)
        if unit is None:
            # A connecting node in float is no news; a compute node is.
            if rule.kind is Kind.COMPUTE and reason:
                skipped.append(Skip(label(node), reason))
            continue
        units[key] = unit
        if unit.bias_add:
            claimed.add(unit.bias_add)
    for graph in model.graph.subgraphs():
        skipped.extend(
            Skip(label(node), IN_A_BODY)
            for node in graph
            if is_onnx(node, *RULES) and RULES[node.op_type].kind is Kind.COMPUTE
        )
    return units


def excluded(node: ir.Node, exclude: tuple[str, ...]) -> str | None:
    """The glob that keeps a node in float, as a reason; None where none does."""
    for pattern in exclude:
        if fnmatchcase(label(node), pattern):
            return f"excluded by {pattern!r}"
    return None


def _wrapper(node: ir.Node) -> str | None:
    """Wrappers are a few per cent of a layer; in integers they would lose what they were fitted to make up for."""
    return "the wrapper of a sparse core: it stays in float" if is_wrapper(node) else None


def _unfit(node: ir.Node, ops: Collection[str]) -> str | None:
    """Why the node has no integer kernel, whatever its neighbours; None where it has."""
    if node.op_type not in ops:
        return f"the target has no integer kernel for {node.op_type}"
    quantised = quantised_already(node)
    if quantised:
        return quantised
    dtype = node.outputs[0].dtype or next((v.dtype for v in node.inputs if v is not None and v.dtype), None)
    if dtype not in (ir.DataType.FLOAT, None):
        return f"computes in {dtype.name.lower()}, not float32" if dtype else None
    check = _CHECKS.get(node.op_type)
    return check(node) if check else None


def _parameters(node: ir.Node, rule: Rule) -> str | None:
    """Weights and bias must be constants."""
    for index, what in ((rule.weight, "weight"), (rule.bias, "bias")):
        if index is not None and index < len(node.inputs) and node.inputs[index] is not None:
            tensor = constant(node.inputs[index])
            if tensor is None:
                value = node.inputs[index]
                if value is not None and value.is_graph_input() and value.is_initializer():
                    return f"its {what} can be overridden by the caller (fold makes it a constant)"
                return f"its {what} is not a constant"
            if tensor.dtype != ir.DataType.FLOAT:
                return f"its {what} is {tensor.dtype.name.lower()}, not float32"
    return None


def _check_conv(node: ir.Node) -> str | None:
    return _parameters(node, RULES[node.op_type])


def _check_gemm(node: ir.Node) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "integer kernels take no transposed first input"
    reason = _parameters(node, RULES["Gemm"])
    bias, weight = array(node.inputs[2] if len(node.inputs) > 2 else None), array(node.inputs[1])
    if reason or bias is None or weight is None:
        return reason
    channels = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    if bias.size not in (1, channels) or (bias.ndim > 1 and any(d != 1 for d in bias.shape[:-1])):
        return "its bias is not one value per output channel"
    return None


def _check_pad(node: ir.Node) -> str | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or node.attributes.get_string("mode", "constant") != "constant":
        return None
    fill = array(value)
    # Another value may lie outside the range of the tensor, whose scale the result shares.
    return "it pads with another value than zero" if fill is None or fill.any() else None


def _check_resize(node: ir.Node) -> str | None:
    return None if node.attributes.get_string("mode", "nearest") == "nearest" else "interpolates"


def _check_maxpool(node: ir.Node) -> str | None:
    return "its indices are in use" if len(node.outputs) > 1 and node.outputs[1].uses() else None


_CHECKS: dict[str, Callable[[ir.Node], str | None]] = {
    "Conv": _check_conv,
    "ConvTranspose": _check_conv,
    "Gemm": _check_gemm,
    "Pad": _check_pad,
    "Resize": _check_resize,
    "MaxPool": _check_maxpool,
}


def _unit(node: ir.Node, rule: Rule, key: str) -> Unit | None:
    """The unit that the node makes; None where no input of it is an activation."""
    present = [i for i, v in enumerate(node.inputs) if v is not None]
    data = [i for i in present if (rule.data is None or i in rule.data) and constant(node.inputs[i]) is None]
    if rule.weight in data:
        weight = None
    elif node.op_type == "MatMul":
        # The weight may stand on either side.
        weight = next((i for i in (1, 0) if i not in data), None)
    else:
        weight = rule.weight
    if not data:
        return None
    bias = rule.bias if rule.bias in present else None
    constants = tuple(i for i in present if i not in data) if rule.data is None else ()
    if any((tensor := constant(node.inputs[i])) is None or tensor.dtype != ir.DataType.FLOAT for i in constants):
        return None
    last, bias_add = node, None
    if node.op_type == "MatMul" and weight == 1:
        adder = _bias_add(node)
        if adder is not None:
            last, bias_add = adder, name_of(adder.outputs[0])
    activation = _absorbable(last) if rule.kind is not Kind.MOVE else None
    carriers = tuple(name_of(v) for v in (activation or last).outputs if v.name)
    return Unit(
        key, label(node), node.op_type, rule, tuple(data), constants, weight, bias, bias_add,
        carriers if rule.kind is Kind.MOVE else carriers[:1],
    )  # fmt: skip


def _bias_add(node: ir.Node) -> ir.Node | None:
    """The Add of one constant per channel behind a MatMul, if nothing else reads the product."""
    use = sole_use(node.outputs[0])
    if use is None or not is_onnx(use.node, "Add"):
        return None
    bias, weight = constant(use.node.inputs[1 - use.idx]), constant(node.inputs[1])
    if bias is None or weight is None or bias.dtype != ir.DataType.FLOAT or len(weight.shape) != 2:
        return None
    adder: ir.Node = use.node
    return adder if tuple(bias.shape) == (weight.shape[1],) else None


def _absorbable(node: ir.Node) -> ir.Node | None:
    """The ReLU-like activation behind `node` that a quantised output makes superfluous."""
    use = sole_use(node.outputs[0])
    if use is None or not is_onnx(use.node, *ABSORBED):
        return None
    if use.node.op_type == "Relu":
        return use.node
    low = array(use.node.inputs[1]) if len(use.node.inputs) > 1 else None
    # Other floors would need a zero point that lands on them exactly.
    clip: ir.Node = use.node
    return clip if use.idx == 0 and low is not None and low.size == 1 and float(low.reshape(())) == 0 else None


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    found = {name_of(v): v for v in graph.inputs}
    for node in graph:
        found.update((v.name, v) for v in node.outputs if v.name)
    return found


def _readers(values: dict[str, ir.Value], unit: Unit, units: dict[str, Unit]) -> Iterable[Unit]:
    """Units that read an output of `unit` as an activation."""
    for name in unit.carriers:
        for use in values[name].uses():
            reader = units.get(use.node.outputs[0].name or "") if use.node.outputs else None
            if reader is not None and use.idx in reader.data:
                yield reader


def _fuse_sums(graph: ir.Graph, units: dict[str, Unit]) -> None:
    """Let each sum take the result of one layer as it is."""
    sums = {key: unit.data for key, unit in units.items() if unit.op_type == "Add"}
    for key, fused in fused_operands(graph, sums).items():
        units[key] = replace(units[key], data=tuple(index for index in units[key].data if index != fused))


def _shrink_to_islands(graph: ir.Graph, units: dict[str, Unit]) -> None:
    """Take away connecting units that no integer tensor enters or that no integer kernel reads, to the fixpoint."""
    values = _values(graph)
    nodes = {key: values[key].producer() for key in units}
    while True:
        written = {name for unit in units.values() for name in unit.carriers}
        read = {
            name_of(node.inputs[i])
            for key, unit in units.items()
            if unit.rule.kind is Kind.COMPUTE and (node := nodes[key]) is not None
            for i in unit.data
        }
        gone = []
        for key, unit in units.items():
            node = nodes[key]
            if unit.rule.kind is Kind.COMPUTE or node is None:
                continue
            enters = written if unit.rule.kind is Kind.MOVE else written | read
            fed = any(name_of(node.inputs[i]) in enters for i in unit.data)
            if not fed or not any(True for _ in _readers(values, unit, units)):
                gone.append(key)
        if not gone:
            return
        for key in gone:
            del units[key]


def _decide_outputs(graph: ir.Graph, units: dict[str, Unit], wanted: Collection[str] | None, floats: bool) -> None:
    """A layer whose output no integer kernel reads gives float, unless it is wanted: one rounding fewer.

    Matrix products can do so everywhere, others where the target's kernels do (`floats`).
    """
    values = _values(graph)
    for key, unit in units.items():
        bound = unit.rule.needs_output and not (floats and unit.rule.kind is Kind.COMPUTE)
        if bound or any(True for _ in _readers(values, unit, units)):
            continue
        if not (_sparse_inside(values, unit) if wanted is None else key in wanted):
            units[key] = replace(unit, quantise_output=False)


def _sparse_inside(values: dict[str, ir.Value], unit: Unit) -> bool:
    """Whether a product has a sparse weight and its output is none of the graph."""
    node = values[unit.key].producer()
    given_out = any(values[name].is_graph_output() for name in unit.carriers)
    return node is not None and unit.weight == 1 and not given_out and holds_any_pattern(node)


def _roots(graph: ir.Graph, units: dict[str, Unit]) -> dict[str, str]:
    roots: dict[str, str] = {}
    for node in graph:
        unit = units.get(node.outputs[0].name or "") if node.outputs else None
        if unit is None:
            continue
        for index in unit.data:
            name = name_of(node.inputs[index])
            roots.setdefault(name, name)
        if unit.quantise_output:
            for name in unit.carriers:
                moved = unit.rule.kind is Kind.MOVE
                roots[name] = roots[name_of(node.inputs[unit.data[0]])] if moved else name
    return roots
