"""Models with 2:4 weights, alone or as factors between wrappers, written as the pass `armor` writes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.model import infer_shapes
from graphopt.numerics.sparsity.factors import Factors
from graphopt.numerics.sparsity.patterns import mask, parse
from graphopt.rewriting.layers import layers_of
from graphopt.sparsity.factors import write_factors
from graphopt.sparsity.layers import SparseLayer


def sparse(shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """A random (outputs, inputs) matrix that is 2:4 along its inputs."""
    weight = random.normal(size=shape)
    return weight * mask(np.abs(weight), parse("2:4"))


def make_sparse(model: ir.Model, seed: int = 0) -> None:
    """Give every linear layer a random 2:4 weight, in place; its bias stays."""
    random = np.random.default_rng(seed)
    for layer in _layers(model):
        groups, rows, columns = layer.weight().shape
        cores = np.stack([_core(rows, columns, layer.channels, random) for _ in range(groups)])
        assert layer.store(cores, layer.layer.bias()) is None
    infer_shapes(model)


def make_factorised(model: ir.Model, wrappers: str, block: int, seed: int = 0) -> None:
    """Make every linear layer A S B with random parts, in place; its bias stays.

    Args:
        model: whose layers can all be factorised.
        wrappers: 'in', 'out' or 'both'.
        block: size of the blocks; it divides the channels.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    for layer in _layers(model):
        _, rows, columns = layer.weight().shape
        right = random.normal(size=(layer.channels // block, block, block)) / block**0.5
        left = random.normal(size=(rows // block, block, block)) / block**0.5
        core = _core(rows, columns, layer.channels, random)
        sides = {"in": (None, right), "out": (left, None), "both": (left, right)}[wrappers]
        made = Factors(left=sides[0], core=core, right=sides[1], taps=layer.taps, losses=[0.0])
        write_factors(model, layer, made, layer.layer.bias())
    infer_shapes(model)


def _layers(model: ir.Model) -> list[SparseLayer]:
    return [SparseLayer(layer, layer.linear.inputs // layer.groups) for layer in layers_of(model)[0].values()]


def _core(rows: int, columns: int, channels: int, random: np.random.Generator) -> np.ndarray:
    return sparse((rows * columns // channels, channels), random).reshape(rows, columns) / columns**0.5
