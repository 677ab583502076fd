"""Random graphs with sparse or factorised layers, through everything that must leave what they compute, or their zeros.

`wrong(seed)` runs one graph; tools/fuzz/sparse.py runs thousands, tests/passes/test_sparse_fuzz.py some.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import attention_graphs
import numpy as np
import onnx_ir as ir
from random_graphs import random_graph

from graphopt import calibration
from graphopt.base import Context, Pass
from graphopt.errors import ModelError, UsageError
from graphopt.executor import Session
from graphopt.files import compression
from graphopt.model import check, infer_shapes, load, save
from graphopt.numerics.sparsity.factors import Factors
from graphopt.numerics.sparsity.patterns import mask, parse
from graphopt.passes.armor import Armor
from graphopt.passes.fold import Fold
from graphopt.passes.fold_wrappers import FoldWrappers
from graphopt.passes.merge_factors import MergeFactors
from graphopt.passes.prune import Prune
from graphopt.passes.quantize import Quantize
from graphopt.passes.sparsify import Sparsify
from graphopt.progress import Silent
from graphopt.registry import pass_class
from graphopt.rewriting.layers import layers_of
from graphopt.sparsity.factors import factors_blocked, write_shared
from graphopt.sparsity.found import sparse_weights
from graphopt.sparsity.layers import SparseLayer, prepare
from graphopt.sparsity.marks import declare_pattern, is_wrapper
from graphopt.target import SparseKernels, Target
from graphopt.verify import compare

GAP = 1e-3
"""Relative difference of what is the same but for rounding: random graphs are deep, and full of divisions and Exp."""

KERNELS = SparseKernels(inputs=4, outputs=1)
PATTERN = parse("2:4")
Feeds = list[dict[str, np.ndarray]]


class Wrong(AssertionError):
    """What does not hold."""


def base(seed: int) -> ir.Model:
    """A graph of convolutions, or a block of attention."""
    blocks = [attention_graphs.separate, attention_graphs.fused, attention_graphs.grouped]
    return blocks[seed // 4 % 3]() if seed % 4 == 0 else random_graph(seed)


def feeds_of(model: ir.Model, seed: int) -> Feeds:
    """Two feeds whose channels are of unequal strength."""
    random = np.random.default_rng(seed)
    shape = [d if isinstance(d, int) else 3 for d in model.graph.inputs[0].shape]
    strength = np.geomspace(2, 0.3, shape[1]).reshape(-1, *(1,) * (len(shape) - 2))
    return [{"x": (random.normal(size=shape) * strength).astype(np.float32)} for _ in range(2)]


def context(model: ir.Model, feeds: Feeds | None) -> Context:
    """A run's context on a target whose kernels skip zeros and take any layer."""
    data = None
    if feeds is not None:
        data = calibration.load({"x": np.concatenate([feed["x"] for feed in feeds])}, model)
    target = Target("cuda", "torch", sparsity_2_4=True, sparse=KERNELS)
    return Context(target, data, None, 0, 1, Silent(), pass_class)


# -- factors ---------------------------------------------------------------------------------------------------------


def factorise(model: ir.Model, random: np.random.Generator) -> ir.Model:
    """Random factors in most layers, wrappers of layers that read the same sometimes shared; returns the dense twin."""
    prepare(model)
    sets = defaultdict(list)
    for layer in _layers(model):
        if factors_blocked(layer) is None and layer.channels >= 4 and random.random() < 0.8:
            sets[layer.reads if random.random() < 0.5 else layer.layer.key].append(layer)
    plan = [(layers, _factors(layers, random)) for layers in sets.values()]
    twin = model.clone()
    copies = {layer.layer.key: layer for layer in _layers(twin)}
    for layers, factors in plan:
        for layer, own in zip(layers, factors, strict=True):
            copies[layer.layer.key].store(np.asarray(own.dense())[None], layer.layer.bias())
    for layers, factors in plan:
        write_shared(model, layers, factors, [layer.layer.bias() for layer in layers])
        for layer in layers:
            declare_pattern(layer.layer.linear.node, PATTERN)
    infer_shapes(model)
    return twin


def _layers(model: ir.Model) -> list[SparseLayer]:
    found = [SparseLayer(x, x.linear.inputs // x.groups) for x in layers_of(model)[0].values()]
    return [layer for layer in found if not layer.layer.stuffing]


def _factors(layers: list[SparseLayer], random: np.random.Generator) -> list[Factors]:
    sides = str(random.choice(["in", "out", "both"])) if len(layers) == 1 else str(random.choice(["in", "both"]))
    diagonal = random.random() < 0.2
    right = None if sides == "out" else _blocks(layers[0].channels, random, diagonal)
    made = []
    for layer in layers:
        weight = layer.weight()[0]
        rows = weight.reshape(-1, layer.channels)
        core = (rows * np.asarray(mask(np.abs(rows), PATTERN))).reshape(weight.shape)
        left = None if sides == "in" else _blocks(len(weight), random, diagonal)
        made.append(Factors(core, left, right, layer.taps))
    return made


def _blocks(channels: int, random: np.random.Generator, diagonal: bool) -> np.ndarray:
    """Blocks of a random size that divides the channels, not far from 1."""
    size = int(random.choice([n for n in range(1, channels + 1) if channels % n == 0]))
    made = np.eye(size) + 0.2 * random.normal(size=(channels // size, size, size)) / np.sqrt(size)
    return made * np.eye(size) if diagonal else made


# -- what must hold --------------------------------------------------------------------------------------------------


def wrong(seed: int, *, quick: bool = False) -> str | None:
    """What does not hold for the graph of a seed; None where all does.

    `quick` leaves the slow ones, torch and passes over data, to one graph in eight each.
    """
    random, model = np.random.default_rng(seed), base(seed)
    feeds = feeds_of(model, seed)
    try:
        _made(model, seed, random, feeds)
        _unchanged_by(FoldWrappers(), model, feeds)
        _unchanged_by(Fold(), model, feeds)
        _stored(model, feeds)
        _merged(model, feeds)
        for turn, slow in enumerate((_lowered, _quantised, _pruned)):
            if not quick or seed // 5 % 8 == turn:
                slow(model, feeds)
    except Wrong as error:
        return str(error)
    return None


def _made(model: ir.Model, seed: int, random: np.random.Generator, feeds: Feeds) -> None:
    """Make layers sparse, one way or another."""
    match seed // 2 % 4:
        case 0:
            Sparsify(method="magnitude").run(model, context(model, None))
        case 1:
            wrappers = ("in", "out", "both")[seed // 8 % 3]
            Armor(form="factors", wrappers=wrappers, overhead=0.7, cycles=1).run(model, context(model, feeds))
        case _:
            twin = factorise(model, random)
            _same("factors and their product", twin, model, feeds)
    check(model)
    infer_shapes(model)
    _patterns("a sparse pass", model)


def _same(what: str, one: ir.Model, other: ir.Model, feeds: Feeds) -> None:
    gap = compare(one, other, feeds).worst_relative
    if not gap < GAP:
        raise Wrong(f"{what}: off by {gap:.2g}")


def _patterns(behind: str, model: ir.Model) -> None:
    broken = [weight.label for weight in sparse_weights(model, declared_only=True) if weight.broken]
    if broken:
        raise Wrong(f"behind {behind} {', '.join(broken)} have no pattern any more")


def _unchanged_by(step: Pass, model: ir.Model, feeds: Feeds) -> None:
    before = model.clone()
    step.run(model, context(model, None))
    check(model)
    infer_shapes(model)
    _same(step.name, before, model, feeds)
    _patterns(step.name, model)


def _stored(model: ir.Model, feeds: Feeds) -> None:
    """Stored compressed, run as it is, and loaded: the same bits."""
    with tempfile.TemporaryDirectory() as folder, patch.object(compression, "LEAST_SAVING", 16):
        plain, small, again = (Path(folder) / f"{name}.onnx" for name in ("plain", "small", "again"))
        save(load(_saved(model, plain)), plain)
        save(model, small, compress=True)
        save(load(small), again)
        if plain.read_bytes() != again.read_bytes():
            raise Wrong("compressed and loaded, the model has other bytes")
        _same("compressed", plain, small, feeds)
        archive = Path(folder) / "model.safetensors"
        save(model, archive, compress=True)
        save(load(archive), again)
        if plain.read_bytes() != again.read_bytes():
            raise Wrong("read from an archive, the model has other bytes")


def _saved(model: ir.Model, path: Path) -> Path:
    save(model, path)
    return path


def _lowered(model: ir.Model, feeds: Feeds) -> None:
    """torch, on the processor, computes what ONNX Runtime does; graphs with operators that it lacks are left out."""
    from graphopt.backends.torch_cuda import TorchBackend

    try:
        session = TorchBackend().session(model, Target("torch-cpu", "torch", device="cpu", dtype="model"))
    except ModelError:
        return
    for name, value in Session(model).run(feeds[0]).items():
        gap = np.linalg.norm(session.run(feeds[0])[name] - value) / max(np.linalg.norm(value), 1e-30)
        if not gap < GAP:
            raise Wrong(f"torch: {name} is off by {gap:.2g}")


def _merged(model: ir.Model, feeds: Feeds) -> None:
    merged = model.clone()
    result = MergeFactors().run(merged, context(merged, None))
    check(merged)
    infer_shapes(merged)
    _same("merge-factors", model, merged, feeds)
    left = [node for node in merged.graph if is_wrapper(node)]
    if left and not result.skipped:
        raise Wrong(f"merge-factors leaves {left[0].name} and says nothing")


def _quantised(model: ir.Model, feeds: Feeds) -> None:
    made = model.clone()
    Quantize(sensitive="none", ranges="minmax").run(made, context(made, feeds))
    check(made)
    infer_shapes(made)
    _patterns("quantize", made)
    Session(made).run(feeds[0])
    if any(is_wrapper(n) and any(v is not None and v.dtype == ir.DataType.INT8 for v in n.inputs) for n in made.graph):
        raise Wrong("a wrapper is quantised")


def _pruned(model: ir.Model, feeds: Feeds) -> None:
    """Pruned, a factorised model still runs; made sparse again, its patterns hold."""
    made = model.clone()
    try:
        Prune(params=0.7).run(made, context(made, feeds))
    except UsageError:
        return  # too little of it can go
    check(made)
    infer_shapes(made)
    Session(made).run(feeds[0])
    broken = {weight.label for weight in sparse_weights(made, declared_only=True) if weight.broken}
    result = Sparsify(method="magnitude").run(made, context(made, None))
    told = {skip.node for skip in result.skipped}
    for weight in sparse_weights(made, declared_only=True):
        if weight.broken and weight.label not in broken | told:
            raise Wrong(f"sparsify leaves {weight.label} without the pattern that it declares")
    Session(made).run(feeds[0])
