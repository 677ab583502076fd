"""Layers of a model factorised with random wrappers: exact folding does not care where they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Pass, PassResult
from graphopt.executor import Session
from graphopt.files.shape_inference import infer_shapes
from graphopt.model import check
from graphopt.numerics.sparsity.armor import Factors
from graphopt.numerics.sparsity.patterns import mask, parse
from graphopt.progress import Silent
from graphopt.registry import pass_class
from graphopt.rewriting.layers import layers_of
from graphopt.sparsity.factors import factors_blocked, write_factors
from graphopt.sparsity.found import sparse_weights
from graphopt.sparsity.layers import SparseLayer
from graphopt.sparsity.marks import declare_pattern
from graphopt.target import Target


def blocks(channels: int, size: int, random: np.random.Generator, *, diagonal: bool = False) -> np.ndarray:
    """Well-conditioned random blocks."""
    made = np.eye(size) + 0.2 * random.normal(size=(channels // size, size, size)) / np.sqrt(size)
    return made * np.eye(size) if diagonal else made


def factorise(
    model: ir.Model, layers: dict[str, dict[str, Any]], *, seed: int = 0, same: bool = False, diagonal: bool = False
) -> ir.Model:
    """Wrap layers: key -> {"right": block of B, "left": block of A}; `same`: equal B wherever the sizes are equal."""
    random = np.random.default_rng(seed)
    found, _ = layers_of(model)
    shared: dict[tuple[int, int], np.ndarray] = {}
    for key, sizes in layers.items():
        layer = SparseLayer(found[key], found[key].linear.inputs // found[key].groups)
        assert factors_blocked(layer) is None
        weight = layer.weight()[0]
        core = weight * np.asarray(mask(np.abs(weight), parse("2:4")))
        sides: dict[str, np.ndarray] = {}
        if "right" in sizes:
            made = blocks(layer.channels, sizes["right"], random, diagonal=diagonal)
            sides["right"] = shared.setdefault((layer.channels, sizes["right"]), made) if same else made
        if "left" in sizes:
            sides["left"] = blocks(len(weight), sizes["left"], random, diagonal=diagonal)
        write_factors(model, layer, Factors(core, taps=layer.taps, **sides), layer.layer.bias())
        declare_pattern(layer.layer.linear.node, "2:4")
    infer_shapes(model)
    check(model)
    return model


def exact(model: ir.Model, what: Pass, feeds: dict[str, np.ndarray], tolerance: float = 2e-5) -> PassResult:
    """Run a pass that must not change what the model computes, nor the zeros of its cores; returns what it says."""
    before = Session(model.clone()).run(feeds)
    result = what.run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent(), pass_class))
    check(model)
    infer_shapes(model)
    after = Session(model).run(feeds)
    for name, value in before.items():
        assert np.abs(after[name] - value).max() <= tolerance * np.abs(value).max(), name
    for weight in sparse_weights(model, declared_only=True):
        assert not weight.broken, weight.label
    return result


def wrapper_nodes(model: ir.Model) -> int:
    return sum("graphopt.sparsity.role" in n.metadata_props and n.metadata_props["graphopt.sparsity.role"] != "core"
               for n in model.graph)  # fmt: skip
