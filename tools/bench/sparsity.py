"""What sparse weights keep, by method, and what the solvers cost: Markdown tables.

    python tools/bench/sparsity.py                          all of it
    python tools/bench/sparsity.py minilm stories resnet56  whole models, one row a method
    python tools/bench/sparsity.py layer                    MiniLM's first query layer, errors on unseen sentences
    python tools/bench/sparsity.py cost --largest 4096      seconds and memory over the size of a layer

Calibration never sees what is measured: MiniLM is calibrated on 1024 sentences and measured on STS-B's test pairs, the
language model on 24 stories and 72 others, ResNet-56 on 2048 training images and all 10,000 test images. Seconds are
of the wall clock, the pass alone with its moments. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cifar
import numpy as np
import transformers as text
from threadpoolctl import threadpool_limits

import graphopt

METHODS = {
    "magnitude": "sparsify{method=magnitude%s}",
    "Wanda": "sparsify{method=wanda%s}",
    "NoWag-P": "sparsify{method=nowag%s}",
    "SparseGPT": "sparsify{method=sparsegpt%s}",
    "`cd`": "sparsify{%s}",
    "ARMOR, paper's objective": "armor{objective=paper,form=dense,overhead=0.085%s}",
    "ARMOR": "armor{form=dense,overhead=0.085%s}",
    "ARMOR, all layers at once": "armor{form=dense,overhead=0.085,propagate=false%s}",
    "ARMOR, one wrapper for q, k, v": "armor{form=dense,overhead=0.085,shared=true%s}",
    "SparseGPT, 50 % anywhere": "sparsify{method=sparsegpt,pattern=50%%%s}",
}
"""How a method is asked for; %s: more options."""

LLAMA_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
"""Linear layers of a decoder of 7 billion parameters: (outputs, inputs) -> how many."""

GPU_SHARE, GPU_FLOPS = 0.5, 60e12
"""A data-centre GPU: share reached of its float32 rate, FLOP/s. An assumption, not a measurement."""


def minilm_score(dense: Any) -> Callable[[Any], str]:
    """Spearman, and the mean of 1 - cos to the dense model's embeddings."""
    expected = np.concatenate(text.embeddings(dense))

    def score(model: Any) -> str:
        distance = 1 - (np.concatenate(text.embeddings(model)) * expected).sum(axis=1).mean()
        return f"{text.spearman(model):.4f} | {distance:.4f}"

    return score


def resnet_score(_: Any) -> Callable[[Any], str]:
    """Accuracy on the test images."""
    from graphopt.executor import Session

    images, labels = cifar.images("test")

    def score(model: Any) -> str:
        name = model.graph.inputs[0].name
        with Session(model, optimize=True) as session:
            logits = [next(iter(session.run({name: images[i : i + 250]}).values())) for i in range(0, len(images), 250)]
        return f"{(np.concatenate(logits).argmax(axis=1) == labels).mean():.2%}"

    return score


MODELS: dict[str, tuple[str, Callable[[], Iterator[Any]], Callable[[Any], Callable[[Any], str]], str, str]] = {
    "minilm": ("minilm_l6", text.sentences, minilm_score, "Spearman | 1 - cos", ""),
    "stories": (
        "stories260k", text.stories, lambda _: lambda model: f"{text.perplexity(model):.3f}", "perplexity", "",
    ),
    "resnet56": ("resnet56_cifar10", cifar.calibration, resnet_score, "top-1", ""),
}  # fmt: skip


def whole(name: str, names: list[str], more: str) -> None:
    """One table: a model sparsified by every method."""
    file, calibration, scored, columns, options = MODELS[name]
    dense = graphopt.load(text.DATA / "models" / f"{file}.onnx")
    score = scored(dense)
    print(f"\n| {name} | {columns} | layers | mean error on calibration data | seconds |")
    print("|---|" + "---|" * (columns.count("|") + 4))
    print(f"| dense | {score(dense)} | | | |", flush=True)
    rest = ",".join(part for part in (options, more) if part)
    for method in names:
        chain = METHODS[method] % (f",{rest}" if rest else "")
        chain = chain.replace("{,", "{").removesuffix("{}")
        result = graphopt.optimize(dense, f"fold,{chain}", calib=calibration, bench=False, verify_each="structure")
        record = result.report.passes[-1]
        rows = [row for table in record.details.values() for row in table if "layer" in row]
        errors = [row["error"] for row in rows if row.get("error") is not None]
        mean = f"{np.mean(errors):.4f}" if errors else ""
        print(f"| {method} | {score(result.model)} | {len(rows)} | {mean} | {record.seconds:.1f} |", flush=True)


def layer_table(cycles: list[int]) -> None:
    """The first query layer: relative errors, seconds of the solver on one core.

    Its inputs are the embeddings of words: of the words of the test pairs 19 % never occur in the calibration data, of
    those of the development pairs 6 %.
    """
    from graphopt.numerics.metric import damped
    from graphopt.numerics.sparsity import one_shot
    from graphopt.numerics.sparsity.armor import armor, block_size
    from graphopt.numerics.sparsity.descent import coordinate_descent
    from graphopt.numerics.sparsity.patterns import parse

    weight, (seen, *unseen) = query_moments()
    metric, pattern = damped(seen), parse("2:4")
    single, diagonal = weight.astype(np.float32), np.diag(metric)
    m, n = weight.shape

    def factorised(count: int, wrappers: Any, objective: Any = "hessian") -> Any:
        block = block_size(m, n, 0.085, wrappers, pattern)
        return armor(single, metric, pattern, block=block, objective=objective, wrappers=wrappers, cycles=count).dense()

    rows: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: one_shot.magnitude(weight, pattern),
        "Wanda": lambda: one_shot.wanda(weight, diagonal, pattern),
        "NoWag-P": lambda: one_shot.nowag(weight, diagonal, pattern),
        "SparseGPT": lambda: one_shot.sparsegpt(single, metric, pattern),
        "`cd`": lambda: coordinate_descent(single, metric, pattern, sweeps=6),
        "SparseGPT, 50 % anywhere": lambda: one_shot.sparsegpt(single, metric, parse("50%")),
        "ARMOR, paper's objective, both": lambda: factorised(40, "both", "paper"),
    }
    for count in cycles:
        for wrappers in ("in", "out", "both"):
            rows[f"ARMOR, {wrappers}, {count} cycles"] = lambda c=count, w=wrappers: factorised(c, w)  # type: ignore[misc]
    print("\n| MiniLM's first query layer, 384 x 384 | error: calibration | dev pairs | test pairs | seconds |")
    print("|---|---|---|---|---|")
    for name, solve in rows.items():
        taken, found = [], None
        for _ in range(3):
            with threadpool_limits(1):  # as the passes do: they use the cores for one layer each
                start = time.perf_counter()
                found = solve()
                taken.append(time.perf_counter() - start)
        gap = weight - np.asarray(found, dtype=np.float64)
        errors = [np.sum(gap @ h * gap) / np.sum(weight @ h * weight) for h in (seen, *unseen)]
        print(f"| {name} | {' | '.join(f'{e:.4f}' for e in errors)} | {np.median(taken):.2f} |", flush=True)


def query_moments() -> tuple[Any, list[Any]]:
    """W, and E[x x^T] on calibration sentences, on STS-B's development pairs and on its test pairs."""
    from graphopt.calibration import load
    from graphopt.numerics.sparsity.patterns import parse
    from graphopt.parallel import Workers
    from graphopt.sparsity.layers import prepare, sparse_layers
    from graphopt.sparsity.moments import Measured
    from graphopt.target import SparseKernels

    model = graphopt.load(text.DATA / "models" / "minilm_l6.onnx")
    prepare(model)
    layer = sparse_layers(model, parse("2:4"), (), SparseKernels())[0][0]
    found = []
    for source in (text.sentences, lambda: pairs("stsb_dev_covered"), lambda: pairs("stsb_test")):
        with Workers(2) as workers:
            [[task]] = Measured(model, [(layer,)], load(source, model), None, workers).stages()
        found.append(task.inputs[0].second)
    return layer.weight()[0], found


def pairs(split: str) -> Iterator[Any]:
    """The first sentences of pairs, 32 of about the same length at a time."""
    with np.load(text.DATA / "sts" / f"{split}.npz") as data:
        ids, mask = data["ids1"].astype(np.int64), data["mask1"].astype(np.int64)
    order = np.argsort(mask.sum(axis=1), kind="stable")
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        longest = int(mask[rows].sum(axis=1).max())
        yield {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}


def one_size(m: int, n: int, block: int, cycles: int) -> dict[str, float]:
    """Seconds of the start and of a cycle, and the peak of memory in bytes, of one random layer; in its own process."""
    import resource

    from graphopt.numerics.sparsity.armor import armor
    from graphopt.numerics.sparsity.descent import coordinate_descent
    from graphopt.numerics.sparsity.patterns import parse

    random = np.random.default_rng(0)
    weight = random.standard_normal((m, n), dtype=np.float32)
    mixed = random.standard_normal((n, n), dtype=np.float32) / np.sqrt(n)
    metric = mixed @ mixed.T + 0.01 * np.eye(n, dtype=np.float32)
    del mixed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    armor(weight[:64, :64], metric[:64, :64], parse("2:4"), block=16, cycles=1)  # what is loaded at the first use
    times = []
    for count in (1, 1 + cycles):
        start = time.perf_counter()
        armor(weight, metric, parse("2:4"), block=block, cycles=count, tolerance=0.0)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    coordinate_descent(weight, metric, parse("2:4"), sweeps=6)
    descent = time.perf_counter() - start
    cycle = (times[1] - times[0]) / cycles
    return {
        "first": times[0] - cycle, "cycle": cycle, "cd": descent, "bytes": 1024.0 * (peak - before),
        "weights": 4.0 * (m * n + n * n),
    }  # fmt: skip


def cost_table(largest: int) -> None:
    """Time and memory over size; what a model of 7 billion parameters would take."""
    sizes = [(s, s) for s in (512, 1024, 2048, 4096) if s <= largest]
    for side in (512, 1024):
        sizes += [(3 * side, side), (side, 3 * side)] if 3 * side <= largest else []
    print("\n| outputs x inputs | block | start, s | a cycle, s | `cd`, s | memory beside W and H, of theirs |")
    print("|---|---|---|---|---|---|")
    rows = []
    for m, n in sizes:
        for share in (0.02, 0.05) if m == n else (0.05,):
            block = max(4, int(share * m) // 4 * 4)
            command = [sys.executable, __file__, "one", "--size", str(m), str(n), str(block)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append((m, n, block, found))
            print(
                f"| {m} x {n} | {block} | {found['first']:.2f} | {found['cycle']:.2f} | {found['cd']:.2f} "
                f"| {found['bytes'] / found['weights']:.1f} |",
                flush=True,
            )
    fitted = {key: fit([(m, n, found[key]) for m, n, _, found in rows]) for key in ("first", "cycle", "cd")}
    for key, (scale, row, column) in fitted.items():
        print(f"\n{key}: {scale:.2e} m^{row:.2f} n^{column:.2f} seconds")
    total = {key: sum(c * at(f, m, n) for (m, n), c in LLAMA_7B.items()) for key, f in fitted.items()}
    hours = {"ARMOR, 20 cycles": (total["first"] + 20 * total["cycle"]) / 3600, "`cd`": total["cd"] / 3600}
    flops = sum(count * 20 * 8 * m * n * n for (m, n), count in LLAMA_7B.items())  # 4 m n^2 multiply-adds a cycle
    print("\n7 billion parameters:")
    for name, each in hours.items():
        print(f"- {name}, on this machine: {each:.1f} h (extrapolated)")
    minutes = flops / GPU_SHARE / GPU_FLOPS / 60
    rate = f"{flops:.1e} FLOP at {GPU_SHARE * GPU_FLOPS:.0e} FLOP/s"
    print(f"- ARMOR, 20 cycles, {rate}: {minutes:.1f} min of arithmetic (estimate)")


def fit(points: list[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Least squares in logarithms: seconds = scale m^a n^b; the larger half of the layers, where no overheads count."""
    points = sorted(points, key=lambda p: p[0] * p[1] ** 2)[len(points) // 3 :]
    design = np.array([[1.0, np.log(m), np.log(n)] for m, n, _ in points])
    found, *_ = np.linalg.lstsq(design, np.log([max(s, 1e-6) for *_, s in points]), rcond=None)
    return float(np.exp(found[0])), float(found[1]), float(found[2])


def at(fitted: tuple[float, float, float], m: int, n: int) -> float:
    """Seconds for a size."""
    scale, row, column = fitted
    return float(scale * m**row * n**column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["layer", *MODELS, "cost"]
    parser.add_argument("what", nargs="*", default=choices, metavar="WHAT", help=", ".join(choices))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--more", default="", help="options of every pass, such as exclude=...")
    parser.add_argument("--cycles", nargs="+", type=int, default=[20, 40])
    parser.add_argument("--largest", type=int, default=4096, help="side of the largest layer of the cost table")
    parser.add_argument("--size", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.size:
        m, n, block = given.size
        print(json.dumps(one_size(m, n, block, cycles=2)))
        return
    for what in given.what:
        if what == "layer":
            layer_table(given.cycles)
        elif what == "cost":
            cost_table(given.largest)
        else:
            whole(what, given.methods, given.more)


if __name__ == "__main__":
    main()
