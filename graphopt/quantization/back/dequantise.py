"""A quantised model in float32 again: integer operators as float ones, weights as constants, rounding kept or dropped.

First every integer operator is written as a float one between DequantizeLinear and QuantizeLinear, and constants behind
DequantizeLinear as the numbers that they stand for. That is what the model computed. Then, unless it is to be kept, the
rounding of activations goes: a DequantizeLinear of what a QuantizeLinear wrote, directly or through data movement, is
the tensor before. Saturation that stood for a Relu or a Clip(0, 6) is written as one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.base import Skip
from graphopt.quantization.back.chains import PRODUCTS, write_chain
from graphopt.quantization.back.float_builder import FloatBuilder, Refused, hand_over, standard
from graphopt.quantization.back.numbers import dequantised, fake_quantised
from graphopt.quantization.back.operators import WRITERS
from graphopt.quantization.back.recognised import holds_quantised, is_quantised
from graphopt.quantization.back.tensors import MOVING_ONE, IntegerTensors
from graphopt.rewriting.constants import array
from graphopt.rewriting.dead_code import remove_dead
from graphopt.rewriting.edit import remove_node
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs


@dataclass
class Dequantised:
    """What was done.

    Attributes:
        operators: integer operators written in float, by type.
        weights: constants that are float now.
        dropped: pairs around activations that went.
        kept: pairs that stay.
        clips: activations written for a saturation that stood for them.
        skipped: operators that stay, and why.
    """

    operators: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    dropped: int = 0
    kept: int = 0
    clips: int = 0
    skipped: list[Skip] = field(default_factory=list)


def dequantise(model: ir.Model, *, keep: bool) -> Dequantised:
    """Bring a quantised model back to float32, in place: main graph and bodies.

    Args:
        model: with inferred types.
        keep: leave the rounding of activations in the model, as QuantizeLinear and DequantizeLinear.
    """
    done, build = Dequantised(), FloatBuilder(model, keep=keep)
    nodes = [node for graph in graphs(model) for node in graph if is_quantised(node)]
    for node in nodes:
        _write(node, build, done)
    constants = Constants(build)
    for graph in graphs(model):
        for node in list(graph):
            if standard(node, "DequantizeLinear"):
                constants.replace(node)
    done.weights = build.weights
    if not keep:
        tensors = IntegerTensors(model, build)
        tensors.run()
        done.dropped = tensors.dropped
    remove_dead(model)
    if not keep:
        done.clips = sum(node.graph is not None for node in tensors.clips)
    _forget_domains(model)
    left = holds_quantised(model)
    done.kept = left.get("DequantizeLinear", 0)
    if not keep:
        for graph in graphs(model):
            for node in graph:
                if standard(node, "DequantizeLinear"):
                    done.skipped.append(
                        Skip(label(node), "the integers that it reads were not quantised in this graph")
                    )
    return done


def _write(node: ir.Node, build: FloatBuilder, done: Dequantised) -> None:
    """Write one integer operator in float, or say why it stays."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return
    build.at(node)
    writer = write_chain if is_onnx(node, *PRODUCTS) else WRITERS.get(node.op_type)
    if writer is None:
        done.skipped.append(Skip(label(node), f"no standard operators are known for {node.op_type}"))
        return
    try:
        new = writer(build)
        if new:
            build.replace(new)
        done.operators[node.op_type] += 1
    except Refused as refusal:
        build.undo()
        done.skipped.append(Skip(label(node), f"{node.op_type}: {refusal}"))


class Constants:
    """DequantizeLinear of constants replaced by what they give; a constant that several read is stored once."""

    def __init__(self, build: FloatBuilder) -> None:
        self._build = build
        self._known: dict[tuple[object, ...], ir.Value] = {}

    def replace(self, node: ir.Node) -> None:
        """Replace a DequantizeLinear if what it reads is constant, or constants that were only moved.

        A constant may also be floats that a QuantizeLinear reads: then it is what is left of them.
        """
        origin, moves = _origin(node.inputs[0])
        before = origin.producer() if origin is not None else None
        rounded = before is not None and standard(before, "QuantizeLinear") and array(before.inputs[0]) is not None
        if rounded and before is not None:
            origin = before.inputs[0]
        scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        q, s, z = array(origin), array(scale), array(zero)
        if origin is None or q is None or s is None or (zero is not None and z is None) or (rounded and z is None):
            return
        axis, block = int(node.attributes.get_int("axis", 1) or 0), int(node.attributes.get_int("block_size", 0) or 0)
        if moves and s.size > 1:
            return
        self._build.at(node)
        key = (origin, scale, zero, axis, block, node.graph)
        if key not in self._known:
            data = (
                fake_quantised(q, s, z, axis, block) if rounded and z is not None else dequantised(q, s, z, axis, block)
            )
            kind = node.outputs[0].dtype or ir.DataType.from_numpy(s.dtype)
            self._known[key] = self._build.stored(origin, data, kind)
        value = self._known[key]
        for move in reversed(moves):
            value = self._build.op(
                move.op_type, [value, *move.inputs[1:]], value.dtype, attributes=list(move.attributes.values()),
                stem=f"{move.outputs[0].name}_float",
            )  # fmt: skip
        hand_over(node.outputs[0], value, node, self._build)
        remove_node(node)


def _origin(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Back through data movement to a constant: the constant and the movements, the last one first."""
    moves: list[ir.Node] = []
    at = value
    while at is not None and array(at) is None:
        node = at.producer()
        if node is None or not is_onnx(node, *MOVING_ONE) or len(node.outputs) > 1:
            return value, []
        moves.append(node)
        at = node.inputs[0]
    return (at, moves) if at is not None else (value, [])


def _forget_domains(model: ir.Model) -> None:
    """Drop the import of ONNX Runtime's operators where none is left."""
    if not any(node.domain == "com.microsoft" for node in model.graph.all_nodes()) and not model.functions:
        model.graph.opset_imports.pop("com.microsoft", None)
