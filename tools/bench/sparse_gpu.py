"""What 2:4 weights and their wrappers gain on an NVIDIA GPU, and how long it takes to find them there.

python tools/bench/sparse_gpu.py --json gpu.json              # everything, on the first CUDA device
python tools/bench/sparse_gpu.py --device cpu --small         # the same code on small sizes: no figure means anything

layers   y = W x for three sizes of layers of language models, batches of 1 to 4096 tokens, float16: dense, plain 2:4,
         ARMOR with an input wrapper and with both. Microseconds, the gain over dense, and the ideal
         1 / (0.5 + overhead). Each figure is of one recorded graph of kernels over as many copies of the layer as do
         not fit into the cache.
solver   seconds and relative error of each solver of `graphopt.numerics.sparsity` on arrays of the device, per layer.
model    a network of the shape of Llama 3.2 1B with random weights, exported, its layers dense, 2:4 or factorised,
         lowered by `graphopt.fx.semi_structured` and timed as a whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llama import Llama, Shape

from graphopt.fx.from_torch import from_torch
from graphopt.fx.semi_structured.kernels import Kernel, kernel_for
from graphopt.fx.semi_structured.lower import lower
from graphopt.fx.semi_structured.modules import BlockDiagonal, SparseLinear
from graphopt.fx.semi_structured.replay import Runner, record
from graphopt.numerics.metric import damped, relative_error
from graphopt.numerics.sparsity.armor import armor
from graphopt.numerics.sparsity.descent import coordinate_descent
from graphopt.numerics.sparsity.factors import Wrappers, block_size
from graphopt.numerics.sparsity.one_shot import magnitude, sparsegpt
from graphopt.numerics.sparsity.patterns import parse
from graphopt.rewriting.layers import layers_of
from graphopt.sparsity.factors import write_factors
from graphopt.sparsity.layers import SparseLayer
from graphopt.timing import paired

PATTERN = parse("2:4")
OVERHEAD = 0.05
CACHE = 256 << 20
"""Bytes of weights that one round reads, several times the cache of any GPU."""
MOST_COPIES = 64


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    layers: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    cache: int
    rows: int
    cycles: int
    shape: Shape
    prompts: tuple[tuple[int, int], ...]
    seconds: float


WHOLE = Scale(
    layers=((4096, 4096), (11008, 4096), (13824, 5120)),
    batches=(1, 4, 16, 64, 256, 1024, 4096),
    cache=CACHE,
    rows=16384,
    cycles=20,
    shape=Shape(),
    prompts=((1, 1), (1, 128), (1, 1024), (16, 1), (16, 128)),
    seconds=1.0,
)
SMALL = Scale(
    layers=((96, 64), (64, 160)),
    batches=(1, 16),
    cache=1 << 16,
    rows=512,
    cycles=2,
    shape=Shape(vocabulary=96, width=64, layers=2, heads=4, groups=2, hidden=128),
    prompts=((1, 4), (2, 3)),
    seconds=0.05,
)


def block_of(outputs: int, inputs: int, wrappers: Wrappers) -> int:
    """The largest block within `OVERHEAD` that divides the channels it runs along; 0: none."""
    size = block_size(outputs, inputs, OVERHEAD, wrappers, PATTERN)
    sides = {"in": (inputs,), "out": (outputs,), "both": (outputs, inputs)}[wrappers]
    while size and any(side % size for side in sides):
        size -= PATTERN.of
    return max(size, 0)


def variants(
    outputs: int, inputs: int, device: torch.device, dtype: torch.dtype, kernel: Kernel, copies: int
) -> Iterator[tuple[str, float, list[torch.nn.Module]]]:
    """Name, elements of the wrappers relative to the weight's, and copies of the layer."""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32)

    def dense() -> torch.nn.Module:
        layer = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
        return layer.requires_grad_(False)

    def sparse(outer: torch.Tensor | None) -> SparseLinear:
        return SparseLinear(magnitude(matrix(outputs, inputs), PATTERN).to(dtype), None, outer, "tokens", kernel)

    def blocks(width: int, size: int) -> torch.Tensor:
        return (matrix(width // size, size, size) / size**0.5).to(dtype)

    def wrapped(size: int, both: bool) -> torch.nn.Module:
        return Wrapped(BlockDiagonal(blocks(inputs, size), "tokens"), sparse(blocks(outputs, size) if both else None))

    yield "dense", 0.0, [dense() for _ in range(copies)]
    yield "2:4", 0.0, [sparse(None) for _ in range(copies)]
    for side in ("in", "both"):
        size = block_of(outputs, inputs, side)  # type: ignore[arg-type]
        if size:
            overhead = size / outputs + (size / inputs if side == "both" else 0.0)
            yield f"armor, {side}, blocks of {size}", overhead, [wrapped(size, side == "both") for _ in range(copies)]


class Wrapped(torch.nn.Module):
    """S B x or A S B x."""

    def __init__(self, inner: BlockDiagonal, core: SparseLinear) -> None:
        super().__init__()
        self.inner, self.core = inner, core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x, self.inner(x))


def time_layers(scale: Scale, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    kernel, why_dense = kernel_for(device, dtype)
    if why_dense:
        print(f"layers run densely: {why_dense}", file=sys.stderr)
    for outputs, inputs in scale.layers:
        copies = max(1, min(MOST_COPIES, scale.cache // (outputs * inputs * 2)))
        made = list(variants(outputs, inputs, device, dtype, kernel, copies))
        for batch in scale.batches:
            x = torch.randn(batch, inputs, device=device, dtype=dtype)
            calls = [recorded(modules, x, device) for _, _, modules in made]
            found = paired(calls, scale.seconds)
            for (name, overhead, modules), ms, ratio in zip(made, found.milliseconds, found.ratios, strict=True):
                ideal = 1.0 if name == "dense" else 1 / (0.5 + overhead)
                yield {
                    "layer": f"{outputs}x{inputs}", "batch": batch, "what": name, "kernel": kernel,
                    "microseconds": ms / len(modules) * 1e3, "gain": 1 / ratio, "ideal": ideal,
                    "of ideal": 1 / ratio / ideal,
                }  # fmt: skip
        del made


def recorded(modules: list[torch.nn.Module], x: torch.Tensor, device: torch.device) -> Callable[[], object]:
    """All copies once, to the end of the last kernel."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(module(x) for module in modules)

    if device.type == "cpu":
        return lambda: run(x)
    recording = record(run, (x,), device)

    def call() -> None:
        recording.graph.replay()
        torch.cuda.synchronize(device)

    return call


def time_solvers(scale: Scale, device: torch.device) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(0)
    for outputs, inputs in scale.layers:
        # inputs of correlated channels of unequal strength, weights of heavy tails: what layers of transformers have
        mixing = torch.randn(inputs, inputs, generator=generator, device=device) / inputs**0.5
        strengths = torch.logspace(0, -2, inputs, device=device)
        rows = torch.randn(scale.rows, inputs, generator=generator, device=device) * strengths @ mixing
        second = rows.double().t() @ rows.double() / len(rows)
        weight = torch.randn(outputs, inputs, generator=generator, device=device)
        weight = weight * torch.rand(outputs, inputs, generator=generator, device=device)
        metric = damped(second)
        block = block_of(outputs, inputs, "in")
        solvers: dict[str, Callable[[], torch.Tensor]] = {
            "magnitude": lambda w=weight: magnitude(w, PATTERN),
            "sparsegpt": lambda w=weight, h=metric: sparsegpt(w, h, PATTERN),
            "cd": lambda w=weight, h=metric: coordinate_descent(w, h, PATTERN),
        }
        if block:
            solvers[f"armor, in, blocks of {block}"] = lambda w=weight, h=metric, b=block: armor(
                w, h, PATTERN, block=b, cycles=scale.cycles
            ).dense()
        for name, solve in solvers.items():
            begin = time.perf_counter()
            found = solve()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begin
            yield {
                "layer": f"{outputs}x{inputs}", "solver": name, "seconds": seconds,
                "relative error": float(relative_error(weight.double(), found.double(), metric)),
                "memory, GB": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            }  # fmt: skip


def time_model(scale: Scale, device: torch.device, dtype: torch.dtype | None) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    network = Llama(scale.shape).eval()
    example = torch.zeros(2, 3, dtype=torch.int64)
    free = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
    models = {}
    for kind in ("dense", "2:4", "armor, in"):
        models[kind] = from_torch(network, (example,), dynamic_shapes=free, input_names=["tokens"])
        for layer in layers_of(models[kind])[0].values() if kind != "dense" else ():
            if "head" not in layer.label and "head" not in str(layer.linear.node.inputs[1].name):
                make_sparse(models[kind], SparseLayer(layer, layer.linear.inputs), factorise=kind != "2:4")
    del network
    runners = {kind: Runner(lower(model, device, dtype)) for kind, model in models.items()}
    for batch, tokens in scale.prompts:
        x = torch.randint(0, scale.shape.vocabulary, (batch, tokens), device=device)

        def call(runner: Runner, x: torch.Tensor = x) -> None:
            runner(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        found = paired([lambda r=runner: call(r) for runner in runners.values()], scale.seconds)
        for (kind, runner), ms, ratio in zip(runners.items(), found.milliseconds, found.ratios, strict=True):
            fates = runner.lowered.fates
            yield {
                "model": kind, "batch": batch, "tokens": tokens, "milliseconds": ms, "gain": 1 / ratio,
                "sparse layers": sum(fate.runs != "dense" for fate in fates), "layers": len(fates),
                "runs": runner.describe(),
            }  # fmt: skip


def make_sparse(model: Any, layer: SparseLayer, *, factorise: bool) -> None:
    """Random weights stay random: a 2:4 core of the same scale, and wrappers near the identity."""
    import numpy as np

    from graphopt.numerics.sparsity.factors import Factors

    weight = layer.weight()[0]
    core = magnitude(weight, PATTERN)
    block = block_of(*weight.shape, "in") if factorise else 0
    if not block:
        layer.store(core[None], layer.layer.bias())
        return
    noise = np.random.default_rng(0).normal(size=(weight.shape[1] // block, block, block)) * 0.01
    factors = Factors(core=core, right=np.eye(block) + noise)
    write_factors(model, layer, factors, layer.layer.bias())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script itself")
    parser.add_argument("--small", action="store_true", help="sizes of a toy: for trying the script, not for figures")
    parser.add_argument("--only", choices=["layers", "solver", "model"])
    parser.add_argument("--json", type=Path, help="write all rows there, too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device; --device cpu --small tries the script", file=sys.stderr)
        sys.exit(6)
    scale = SMALL if arguments.small else WHOLE
    half = torch.float16 if device.type == "cuda" else torch.float32
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "layers": lambda: time_layers(scale, device, half),
        "solver": lambda: time_solvers(scale, device),
        "model": lambda: time_model(scale, device, half if device.type == "cuda" else None),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "scale": asdict(scale)}
    for part, rows in parts.items():
        if arguments.only not in {None, part}:
            continue
        found[part] = []
        for row in rows():
            found[part].append(row)
            print(part, ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
