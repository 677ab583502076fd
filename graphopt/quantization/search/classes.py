"""Layers that a runtime computes with the same kernels: what one measurement can decide for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.quantization.formats import Format
from graphopt.quantization.search.choice import FLOAT, Mixture
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs

MOST = 8
"""Classes at most; with more, they are told apart less finely. Each is timed in each of its formats."""

SIZES = {1 << 12: "up to 4k weights", 1 << 16: "4k to 64k weights", 1 << 20: "64k to 1M weights"}
"""Upper bounds of weight elements; caches and the cost of quantising the input decide differently between them."""

BETWEEN = "operators between layers"


@dataclass(frozen=True)
class LayerClass:
    """Nodes that get the same format.

    Attributes:
        name: what they have in common: `Conv 3x3 depthwise`, `MatMul 64k to 1M weights`.
        keys: names of the first outputs of the nodes, in graph order.
        formats: what at least one of them may be; `float` is the first.
    """

    name: str
    keys: tuple[str, ...]
    formats: tuple[Format, ...]


def classes(model: ir.Model, formats: Mapping[str, Collection[Format]], most: int = MOST) -> list[LayerClass]:
    """The classes of nodes, as fine as `most` allows.

    Args:
        model: the model.
        formats: what each node may be besides float, by the name of its first output; others are in no class.
        most: how many classes at most; the coarsest division is taken where it has more.
    """
    nodes = [node for graph in graphs(model) for node in graph if node.outputs and node.outputs[0].name in formats]
    named = {str(node.outputs[0].name): list(_names(node)) for node in nodes}
    levels = max((len(names) for names in named.values()), default=0)
    found: list[LayerClass] = []
    for level in range(levels):
        members: dict[str, list[str]] = {}
        for key, names in named.items():
            members.setdefault(names[min(level, len(names) - 1)], []).append(key)
        found = [LayerClass(name, tuple(keys), _formats(keys, formats)) for name, keys in members.items()]
        if len(found) <= most:
            break
    return found


def assignment(
    found: Collection[LayerClass], mixture: Mixture, formats: Mapping[str, Collection[Format]]
) -> dict[str, Format]:
    """The format of each node: that of its class, or float where it cannot be that."""
    return {
        key: mixture[group.name] if mixture[group.name] in formats[key] else FLOAT
        for group in found
        for key in group.keys
    }


def _formats(keys: Collection[str], formats: Mapping[str, Collection[Format]]) -> tuple[Format, ...]:
    return tuple(dict.fromkeys((FLOAT, *(f for key in keys for f in formats[key]))))


def _names(node: ir.Node) -> Iterator[str]:
    """What to call the class of a node, from the finest to the coarsest."""
    if is_onnx(node, "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Gather"):
        kind = _kind(node)
        yield f"{kind}{_size(node)}"
        yield kind
        yield node.op_type
    else:
        yield node.op_type
        yield BETWEEN


def _kind(node: ir.Node) -> str:
    weight = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if is_onnx(node, "MatMul") and weight is None and constant(node.inputs[0]) is None:
        return "MatMul of activations"
    if not is_onnx(node, "Conv", "ConvTranspose") or weight is None:
        return node.op_type
    shape = weight.shape.numpy()
    kernel = "x".join(map(str, shape[2:]))
    groups = node.attributes.get_int("group", 1) or 1
    channels = shape[1] * groups if node.op_type == "Conv" else shape[0]
    grouped = "" if groups == 1 else " depthwise" if groups == channels else " in groups"
    return f"{node.op_type} {kernel}{grouped}"


def _size(node: ir.Node) -> str:
    weights = [tensor for value in node.inputs if (tensor := constant(value)) is not None]
    elements = max((int(tensor.size) for tensor in weights), default=0)
    if not elements:
        return ""
    return ", " + next((text for bound, text in SIZES.items() if elements <= bound), "more than 1M weights")
