"""Layers whose weights can become sparse, as matrices whose groups run along the input channels.

Kernels that skip zeros want the N of M along the input channels, the kernel position fixed: the columns of a
convolution are ordered tap by tap here, not channel by channel as in `graphopt.rewriting.layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.base import Skip
from graphopt.numerics.patches import Window
from graphopt.numerics.sparsity.patterns import Pattern
from graphopt.rewriting.constants import allow_private_initializers, constant, freeze_note, freeze_overridable
from graphopt.rewriting.layers import Layer, layers_of
from graphopt.rewriting.linear import LINEAR_OPS
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.sparsity.marks import role_of
from graphopt.sparsity.shapes import Shape, not_taken, too_small
from graphopt.target import SparseKernels

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SparseLayer:
    """A linear node that may become sparse.

    Attributes:
        layer: the node and its weights.
        channels: input channels of one group.
    """

    layer: Layer
    channels: int

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.layer.kernel

    @property
    def reads(self) -> tuple[str, Window | None, bool]:
        """Equal for layers of the same metric: the tensor, the columns made of it, whether a bias takes up the mean."""
        return self.layer.source, self.layer.window, self.layer.has_bias

    def by_tap(self, array: Floats) -> Floats:
        """The last axis from channel-major to tap-major columns."""
        shape = array.shape
        return array.reshape(*shape[:-1], self.channels, self.taps).swapaxes(-1, -2).reshape(shape)

    def by_channel(self, array: Floats) -> Floats:
        """The inverse of `by_tap`."""
        shape = array.shape
        return array.reshape(*shape[:-1], self.taps, self.channels).swapaxes(-1, -2).reshape(shape)

    def weight(self) -> Floats:
        """(groups, outputs per group, taps * channels)."""
        return self.by_tap(self.layer.weight())

    def store(self, weight: Floats, bias: Floats) -> None:
        """Write weights and (outputs,) biases back; `fits` of both."""
        self.layer.store(self.by_channel(weight), bias)


def prepare(model: ir.Model) -> list[str]:
    """Make weights initializers of their own, whatever form they came in; returns notes for the report."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    frozen, note = freeze_overridable(model), allow_private_initializers(model)
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
    return [text for text in (freeze_note(frozen) if frozen else "", note) if text]


def sparse_layers(
    model: ir.Model, pattern: Pattern, exclude: Sequence[str], kernels: SparseKernels
) -> tuple[list[SparseLayer], list[Skip]]:
    """Linear nodes of the main graph that can take a pattern, and the others with the reason.

    Args:
        model: any model.
        pattern: what stays of a weight.
        exclude: globs over names of nodes and weights.
        kernels: what the layers are made for.
    """
    layers, refused = layers_of(model)
    found, skipped = [], [Skip(key, reason) for key, reason in refused.items()]
    for layer in layers.values():
        names = [n for n in (layer.label, layer.key, layer.linear.node.inputs[1].name) if n]  # type: ignore[union-attr]
        if any(fnmatchcase(name, glob) for name in names for glob in exclude):
            reason: str | None = "excluded"
        elif role_of(layer.linear.node) is not None:
            reason = "part of a factorised layer (merge-factors multiplies it out)"
        else:
            reason = _unsuited(layer, pattern, kernels)
        if reason:
            skipped.append(Skip(layer.label, reason))
        else:
            found.append(SparseLayer(layer, layer.linear.inputs // layer.groups))
    return found, skipped + _in_bodies(model)


def _unsuited(layer: Layer, pattern: Pattern, kernels: SparseKernels) -> str | None:
    """Why kernels would not run a layer, or not faster; None where they would."""
    shape = Shape(
        layer.linear.inputs // layer.groups,
        layer.linear.outputs // layer.groups,
        layer.kernel,
        layer.groups,
        convolution=layer.window is not None,
        transposed=bool(layer.stuffing),
    )
    found = too_small(shape, kernels, pattern.of) or not_taken(shape, kernels)
    return None if found is None else found.reason


def _in_bodies(model: ir.Model) -> list[Skip]:
    """Linear nodes that only the main graph's view leaves out."""
    return [
        Skip(label(node), "it stands in the body of an If, Loop or Scan; only layers of the main graph are reached")
        for graph in model.graph.subgraphs()
        for node in graph
        if is_onnx(node, *LINEAR_OPS) and constant(node.inputs[1]) is not None
    ]
