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
from graphopt.numerics.sparsity.patterns import Pattern
from graphopt.rewriting.edit import allow_private_initializers, freeze_note, freeze_overridable
from graphopt.rewriting.layers import Layer, layers_of
from graphopt.sparsity.marks import role_of

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

    def store(self, weight: Floats, bias: Floats) -> str | None:
        """Write weights back; says why not where they do not fit the type of the old ones."""
        dtype = self.dtype
        if not (_fits(weight, dtype) and _fits(bias, dtype)):
            return f"its new weights overflow {dtype}"
        self.layer.store(self.by_channel(weight), bias)
        return None

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the weights."""
        value = self.layer.linear.node.inputs[1]
        assert value is not None
        assert value.const_value is not None
        return np.dtype(value.const_value.dtype.numpy())


def prepare(model: ir.Model) -> list[str]:
    """Make weights initializers of their own, whatever form they came in; returns notes for the report."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    frozen, note = freeze_overridable(model), allow_private_initializers(model)
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=1)(model)
    return [text for text in (freeze_note(frozen) if frozen else "", note) if text]


def sparse_layers(
    model: ir.Model, pattern: Pattern, exclude: Sequence[str], smallest: int
) -> tuple[list[SparseLayer], list[Skip]]:
    """Linear nodes of the main graph that can take a pattern, and the others with the reason.

    Args:
        model: any model.
        pattern: what stays of a weight.
        exclude: globs over names of nodes and weights.
        smallest: input channels (of one group) below which a layer stays dense.
    """
    layers, refused = layers_of(model)
    found, skipped = [], [Skip(key, reason) for key, reason in refused.items()]
    for layer in layers.values():
        channels = layer.linear.inputs // layer.groups
        names = [n for n in (layer.label, layer.key, layer.linear.node.inputs[1].name) if n]  # type: ignore[union-attr]
        if any(fnmatchcase(name, glob) for name in names for glob in exclude):
            skipped.append(Skip(layer.label, "excluded"))
        elif role_of(layer.linear.node) is not None:
            skipped.append(Skip(layer.label, "part of a factorised layer (merge-factors multiplies it out)"))
        elif channels < max(smallest, pattern.of):
            skipped.append(Skip(layer.label, f"{channels} input channels are fewer than {max(smallest, pattern.of)}"))
        elif layer.stuffing:
            skipped.append(Skip(layer.label, "kernels that skip zeros do not transpose a convolution"))
        else:
            found.append(SparseLayer(layer, channels))
    return found, skipped


def _fits(array: Floats, dtype: np.dtype[np.generic]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(dtype)).all())
