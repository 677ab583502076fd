"""Factorised layers multiplied out again: W = A S B, one dense weight under its old name, and no wrappers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.base import Skip
from graphopt.files.opset import opset_of
from graphopt.rewriting.edit import cannot_replace, sole_use
from graphopt.rewriting.layers import Layer, layer_of
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.sparsity.marks import role_of, unmark
from graphopt.sparsity.wrappers import Floats, Wrapper, read_wrappers


def merge_factors(model: ir.Model) -> tuple[list[str], list[Skip]]:
    """Multiply all factorised layers of a model out.

    Returns:
        Labels of the layers that are dense now, and the wrappers that stay, with the reason.
    """
    wrappers, refused = read_wrappers(model)
    skipped = [Skip(name, reason) for name, reason in refused.items()]
    done: dict[str, None] = {}
    for wrapper in wrappers:
        found = _inner(wrapper, model) if wrapper.role == "in" else _outer(wrapper, model)
        if isinstance(found, str):
            skipped.append(Skip(wrapper.label, found))
            continue
        for layer in found:
            done[layer.label] = None
            unmark(layer.linear.node)
            mark_origin(layer.linear.node, [wrapper.label])
        wrapper.remove(bias=_has_room(wrapper))
    return list(done), skipped


def _inner(w: Wrapper, model: ir.Model) -> list[Layer] | str:
    """S B in all cores that read B."""
    if w.bias is not None:
        return "it has a bias of its own"
    reason = cannot_replace(w.output, w.source)
    if reason or w.output.is_graph_output():
        return reason or "its result is a graph output"
    blocks, made = w.blocks, []
    for use in w.output.uses():
        layer = _core(use.node, model)
        if isinstance(layer, str):
            return layer
        weight = layer.weight()[0]
        cut = weight.reshape(len(weight), *blocks.shape[:2], -1)
        product = np.einsum("oibt,ibc->oict", cut, blocks).reshape(weight.shape)
        if not layer.fits(product):
            return f"the weight of {layer.label} would overflow"
        made.append((layer, product))
    for layer, product in made:
        layer.store(product[None], layer.bias())
    return [layer for layer, _ in made]


def _outer(w: Wrapper, model: ir.Model) -> list[Layer] | str:
    """A S in the core in front, and its bias behind A."""
    node = w.source.producer()
    if node is None or sole_use(w.source) is None:
        return "its core is read elsewhere too"
    layer = _core(node, model)
    reason = layer if isinstance(layer, str) else cannot_replace(w.output, w.source)
    if isinstance(layer, str) or reason:
        return reason or ""
    weight, bias = _applied(w, layer.weight()[0]), _applied(w, layer.bias()[:, None])[:, 0]
    if w.bias is not None and (w.adder is None or _has_room(w)):
        bias = bias + w.bias
    if not (layer.fits(weight) and layer.fits(bias)):
        return f"the weight of {layer.label} would overflow"
    layer.store(weight[None], bias)
    return [layer]


def _has_room(w: Wrapper) -> bool:
    """Whether the core takes the bias of an Add behind its outer wrapper: a MatMul leaves it there."""
    node = w.source.producer()
    return w.role == "out" and node is not None and not is_onnx(node, "MatMul")


def _applied(w: Wrapper, rows: Floats) -> Floats:
    blocks = w.blocks
    return np.asarray((blocks @ rows.reshape(*blocks.shape[:2], -1)).reshape(rows.shape))


def _core(node: ir.Node, model: ir.Model) -> Layer | str:
    if role_of(node) is not None and role_of(node) != "core":
        return f"{label(node)} reads it, another wrapper"
    layer = layer_of(node, opset_of(model))
    return f"{label(node)}: {layer}" if isinstance(layer, str) else layer
