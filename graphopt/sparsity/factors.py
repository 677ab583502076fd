"""Writing W ~ A S B into a graph: block-diagonal wrappers as standard operators around a sparse core.

The core stays the layer's weight, under its name, with the zeros in place: what skips zeros finds them in a constant
operand. A bias that stood with the core of a layer with an outer wrapper A moves behind A. Every node is marked with
its role (`graphopt.sparsity.marks`), so that later passes leave it as it is; how wrappers look: `wrappers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.numerics.sparsity.armor import Factors
from graphopt.rewriting.edit import replace_value
from graphopt.rewriting.names import Names
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.marks import mark
from graphopt.sparsity.wrappers import Site


def factors_blocked(layer: SparseLayer) -> str | None:
    """Why a layer cannot be written as factors; None where it can."""
    shape = layer.layer.linear.input.shape
    if layer.layer.groups > 1:
        return "wrappers of a grouped convolution have no operator"
    if layer.layer.window is None and (shape is None or len(shape) < 2):
        return "the number of dimensions of its input is not known"
    return None


def write_factors(model: ir.Model, layer: SparseLayer, factors: Factors, bias: Floats) -> None:
    """`write_shared` for one layer."""
    write_shared(model, [layer], [factors], [bias])


def write_shared(
    model: ir.Model, layers: Sequence[SparseLayer], factors: Sequence[Factors], biases: Sequence[Floats]
) -> None:
    """Put the wrappers around layers that read the same tensor, one for all before them, and the cores in their place.

    Args:
        model: to which the layers belong.
        layers: in the graph's order; `factors_blocked` found nothing against any.
        factors: of each; blocks that divide its channels, the same `right` for all.
        biases: (outputs,) of each.
    """
    names, keys = Names(model), [layer.layer.key for layer in layers]
    sites = [_site(layer, names) for layer in layers]
    right = factors[0].right
    if right is not None:
        nodes = sites[0].nodes(layers[0].layer.linear.input, np.asarray(right), "in")
        sites[0].graph.insert_before(layers[0].layer.linear.node, nodes)
        for node in nodes:
            mark(node, "in", keys)
        for layer in layers:
            layer.layer.linear.node.replace_input_with(0, nodes[-1].outputs[0])
    for layer, site, own, bias in zip(layers, sites, factors, biases, strict=True):
        _write_core(layer, site, own, bias)


def _write_core(layer: SparseLayer, site: Site, factors: Factors, bias: Floats) -> None:
    """The core and what is behind it."""
    node = layer.layer.linear.node
    mark(node, "core", [layer.layer.key])
    outside = layer.layer.linear.add is not None  # the bias of a MatMul stands behind whatever follows it
    inside = bias if factors.left is None or outside else np.zeros_like(bias)
    layer.store(np.asarray(factors.core, dtype=np.float64)[None], inside)
    if factors.left is not None:
        y = node.outputs[0]
        moved = bias if not outside and bias.any() else None
        nodes = site.nodes(y, np.asarray(factors.left), "out", moved)
        site.graph.insert_after(node, nodes)
        replace_value(y, nodes[-1].outputs[0])
        nodes[0].replace_input_with(0, y)


def _site(layer: SparseLayer, names: Names) -> Site:
    node, window = layer.layer.linear.node, layer.layer.window
    weight = node.inputs[1]
    assert isinstance(node.graph, ir.Graph)
    assert weight is not None
    assert weight.const_value is not None
    rank = len(layer.layer.linear.input.shape or ())
    spatial = None if window is None else len(window.kernel)
    return Site(node.graph, names, layer.layer.label, layer.layer.key, weight.const_value.dtype, rank, spatial)
