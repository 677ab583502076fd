"""Turning heads into the basis of their singular vectors, before units are ranked (`graphopt.pruning.heads`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.units import Coupling
from graphopt.calibration import Calibration, activations
from graphopt.numerics.moments import Moments
from graphopt.numerics.product import Basis, product_basis
from graphopt.pruning.families import alive_channels
from graphopt.pruning.heads import Head, Part, find_heads
from graphopt.rewriting.layers import Layer

Floats = npt.NDArray[np.float64]

LIMIT = 1e-6
"""Noise-to-signal power at the outputs above which a change that should be exact is taken back."""

CHECKED = 16
"""Samples on which that is measured."""


@dataclass
class Turned:
    """Heads in their new bases.

    Attributes:
        heads: with the basis of each.
        stored: weights and biases as they came: value -> tensor.
    """

    heads: list[tuple[Head, Basis]]
    stored: dict[ir.Value, ir.TensorProtocol]

    def strengths(self) -> dict[str, Floats]:
        """For every product of queries and keys the power that component j carries, summed over its heads, (d,)."""
        found: dict[str, Floats] = {}
        for head, basis in self.heads:
            if head.scores:
                power = np.square(np.asarray(basis.strength))
                found[head.product] = found[head.product] + power if head.product in found else power
        return found

    def shortened(self, coupling: Coupling, layers: Mapping[str, Layer], dead: Collection[int]) -> list[Head]:
        """Heads that lose some components, and not all of them."""
        found = []
        for head, _ in self.heads:
            part = head.parts[0]
            alive = alive_channels(coupling, layers[part.layer], dead, outputs=True)[list(part.channels)]
            if alive.any() and not alive.all():
                found.append(head)
        return found

    def restore(self, layers: Mapping[str, Layer], shortened: Iterable[Head]) -> None:
        """Take back every turn but those of these heads."""
        kept = set(shortened)
        for value, tensor in self.stored.items():
            value.const_value = tensor
        self.heads = [(head, basis) for head, basis in self.heads if head in kept]
        _apply(layers, self.heads)


def turn_heads(
    model: ir.Model, layers: Mapping[str, Layer], calibration: Calibration, *, samples: int | None, threads: int
) -> tuple[Turned, list[str]]:
    """Turn every head whose basis is free, in place; exact.

    Returns:
        What was turned, and sentences for the report.
    """
    from graphopt.quantization.search.sensitivity import Reference

    feeds = next(iter(calibration.batches(batch_size=1, limit=1)))
    heads = find_heads(model, layers, feeds)
    if not heads:
        return Turned([], {}), []
    reference = Reference(model, calibration, samples=CHECKED, threads=threads)
    grams = _grams(model, layers, heads, calibration, samples, threads)
    turned = Turned([(h, _basis(h, grams, layers)) for h in heads], {})
    for key in dict.fromkeys(p.layer for h in heads for p in h.parts):
        layer = layers[key]
        for value in (layer.linear.node.inputs[1], layer.bias_operand):
            if value is not None and value.const_value is not None:
                turned.stored[value] = value.const_value
    _apply(layers, turned.heads)
    noise = reference.noise(model)
    if noise > LIMIT:
        turned.restore(layers, ())
        return turned, [f"heads keep their bases: turning them moved the outputs by {noise:.1e} of their power"]
    return turned, [f"{len(heads)} heads turned into the bases of their singular vectors"]


def _grams(
    model: ir.Model,
    layers: Mapping[str, Layer],
    heads: Sequence[Head],
    calibration: Calibration,
    samples: int | None,
    threads: int,
) -> dict[Part, Moments]:
    """Moments of every part: of a layer's outputs, or of the inputs of one that reads heads."""
    wanted = {p: None for h in heads for p in (h.parts if h.scores else h.right)}
    tensors: dict[str, list[Part]] = {}
    for part in wanted:
        layer = layers[part.layer]
        tensors.setdefault(layer.output if part.side == "rows" else layer.source, []).append(part)
    moments = {part: Moments(full=True) for part in wanted}
    for batch in activations(model, list(tensors), calibration, limit=samples, threads=threads):
        for name, array in batch.items():
            for part in tensors[name]:
                axis = layers[part.layer].channel_axis(array.ndim)
                picked = np.moveaxis(np.take(array, part.channels, axis=axis), axis, -1)
                moments[part].update(picked.reshape(-1, len(part.channels)))
    return moments


def _basis(head: Head, grams: Mapping[Part, Moments], layers: Mapping[str, Layer]) -> Basis:
    if head.scores:
        left = _sum(grams[p].second for p in head.left)
        right = _sum(grams[p].covariance if head.centred else grams[p].second for p in head.right)
        return product_basis(left, right)
    left = _sum(grams[p].covariance for p in head.right)
    weights = [layers[p.layer].weight()[0][:, list(p.channels)] for p in head.right]
    return product_basis(left, _sum(w.T @ w for w in weights))


def _sum(arrays: Iterable[Any]) -> Floats:
    return np.asarray(sum(arrays), dtype=np.float64)


def _apply(layers: Mapping[str, Layer], heads: Sequence[tuple[Head, Basis]]) -> None:
    """Change the bases: y' = A^T y on the left, y' = B^T y or W' = W B on the right."""
    weights: dict[str, tuple[Floats, Floats]] = {}
    for head, basis in heads:
        for parts, matrix in ((head.left, basis.left), (head.right, basis.right)):
            for part in parts:
                layer, at = layers[part.layer], list(part.channels)
                weight, bias = weights.setdefault(part.layer, (layer.weight(), layer.bias()))
                if part.side == "rows":
                    weight[0, at] = matrix.T @ weight[0, at]
                    bias[at] = matrix.T @ bias[at]
                else:
                    weight[0, :, at] = (weight[0][:, at] @ matrix).T
    for key, (weight, bias) in weights.items():
        layers[key].store(weight, bias)
