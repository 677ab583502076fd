"""What simplifiers make of the same models: nodes, bytes, time, memory, latency and the difference of the outputs.

    python tools/bench/folding.py --peers VENV [--models NAME ...] [--seconds 2] [--json FILE] [--gaps FILE]

`--peers` is a virtual environment with onnxslim, onnxsim and onnxscript (pip install onnxslim onnxsim onnxscript
onnxruntime); every tool runs in a process of its own. Models: those of the shared data folder (GRAPHOPT_DATA), the nine
of the onnx package (`onnx/backend/test/data/light`), and ten networks of `tests/models/zoo` by both of torch's
exporters.

Nodes are counted in the main graph, all bodies and local functions, without Constant nodes, which are a way to store a
tensor; a count with a star holds operators of custom domains that the input does not have. Latency: median ratio to the
input file in ONNX Runtime with all its optimisations, one thread, paired and interleaved. Difference: the largest
relative difference of an output from the input model's, on the samples that come with it or random ones, ONNX Runtime
without optimisations. A cell: nodes · kB · seconds · MB of memory · latency · difference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from folding_tools import TOOLS, Made, make

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("GRAPHOPT_DATA", REPOSITORY.parent / "shared" / "data"))
ZOO = (
    *("rep_vgg", "mobilenet_v3", "shufflenet_v2", "unet_groupnorm", "yolo_c2f"),
    *("swin", "bert", "llama", "lstm_tagger", "conformer"),
)
"""One network of every family: attention, convolution, detection, language, recurrence, signals."""


@dataclass(frozen=True)
class Cell:
    """What one tool made of one model; numbers are None where they could not be had, and `failure` says why."""

    nodes: int | None = None
    custom: bool = False
    kilobytes: float | None = None
    seconds: float | None = None
    megabytes: float | None = None
    latency: float | None = None
    difference: float | None = None
    failure: str = ""

    def __str__(self) -> str:
        if self.nodes is None:
            return f"failed: {self.failure[:60]}"
        parts = [f"{self.nodes}{'*' if self.custom else ''}", f"{self.kilobytes:.0f}"]
        for number, form in ((self.seconds, ".1f"), (self.megabytes, ".0f"), (self.latency, ".3f")):
            parts.append("–" if number is None else format(number, form))
        return " · ".join([*parts, self.failure[:40] if self.difference is None else f"{self.difference:.0e}"])


def sources(cache: Path) -> dict[str, Path]:
    """All models by the name of their row; networks of the zoo are exported into `cache`."""
    import onnx

    found = {path.stem: path for path in sorted((DATA / "models").glob("*.onnx"))}
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    found |= {path.stem: path for path in sorted(light.glob("*.onnx"))}
    sys.path.insert(0, str(REPOSITORY / "tests" / "models"))
    from zoo.export import EXPORTERS, exported

    import zoo

    for name in ZOO:
        found |= {f"{name} ({exporter})": exported(zoo.ZOO[name], exporter, cache) for exporter in EXPORTERS}
    return found


def operators(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator there are, in bodies and local functions too, without Constant."""
    count: Counter[str] = Counter()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            if node.op_type != "Constant" and node.op_identifier() not in model.functions:
                count[node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"] += 1
    return count


def samples(name: str, model: ir.Model) -> list[dict[str, Any]]:
    """At most two of the samples that come with a model, else random feeds."""
    from graphopt.verify import random_feeds

    path = DATA / "inputs" / f"{name}.npz"
    if not path.is_file():
        return random_feeds(model, 0, samples=1)
    stored = np.load(path)
    keys = sorted({key.split("|")[0] for key in stored.files}, key=int)[:2]
    return [{k.split("|", 1)[1]: stored[k] for k in stored.files if k.split("|")[0] == key} for key in keys]


def session(path: Path, *, optimised: bool) -> Any:
    """ONNX Runtime as its users start it, with one thread; without its optimisations to compare outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def difference(expected: list[Any], path: Path, feeds: list[dict[str, Any]]) -> float:
    """The largest relative difference of an output, ||a - b|| / ||a||, over all samples."""
    runner, worst = session(path, optimised=False), 0.0
    for wanted, sample in zip(expected, feeds, strict=True):
        for a, b in zip(wanted, runner.run(None, sample), strict=True):
            x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            gap = np.linalg.norm(np.where(same, 0.0, x - y))
            worst = max(worst, float(gap / max(float(np.linalg.norm(np.where(same, 0.0, x))), 1e-30)) if gap else 0.0)
    return worst


def latencies(paths: list[Path], sample: dict[str, Any], seconds: float) -> list[float]:
    """Median time ratios to the first file."""
    from graphopt.timing import paired

    runners = [session(path, optimised=True) for path in paths]
    calls = [lambda runner=runner: runner.run(None, sample) for runner in runners]
    return list(paired(calls, seconds * len(paths)).ratios)


def row(name: str, source: Path, folder: Path, peers: Path | None, seconds: float) -> tuple[dict[str, Cell], list[str]]:
    """All cells of one model, and how the operators differ where a peer leaves fewer nodes than we do."""
    original = ir.load(source)
    feeds = samples(name, original)
    runner = session(source, optimised=False)
    expected = [runner.run(None, sample) for sample in feeds]
    tools = [tool for tool in TOOLS if peers is not None or not tool.peer]
    made = {tool.name: make(tool, source, folder / f"{tool.name}.onnx".replace(" ", "_"), peers) for tool in tools}
    cells = {"input": Cell(sum(operators(original).values()), kilobytes=source.stat().st_size / 1e3, latency=1.0)}
    counts: dict[str, Counter[str]] = {}
    ran: dict[str, Path] = {}
    for tool, result in made.items():
        cells[tool], counts[tool] = _cell(result, original, expected, feeds)
        if result.out is not None and cells[tool].difference is not None:
            ran[tool] = result.out
    if seconds > 0:
        ratios = latencies([source, *ran.values()], feeds[0], seconds)
        for tool, ratio in zip(ran, ratios[1:], strict=True):
            cells[tool] = Cell(**(asdict(cells[tool]) | {"latency": ratio}))
    return cells, [line for tool in ran for line in _gap(name, tool, cells, counts)]


def _cell(
    made: Made, original: ir.Model, expected: list[Any], feeds: list[dict[str, Any]]
) -> tuple[Cell, Counter[str]]:
    if made.out is None:
        return Cell(failure=made.failure), Counter()
    count = operators(ir.load(made.out))
    known = operators(original)
    size = sum(path.stat().st_size for path in (made.out, made.out.with_suffix(".onnx.data")) if path.exists()) / 1e3
    try:
        gap, failure = difference(expected, made.out, feeds), ""
    except Exception as error:
        gap, failure = None, f"does not run: {' '.join(str(error).split())}"
    custom = any("." in name and name not in known for name in count)
    return Cell(sum(count.values()), custom, size, made.seconds, made.megabytes, None, gap, failure), count


def _gap(name: str, tool: str, cells: dict[str, Cell], counts: dict[str, Counter[str]]) -> list[str]:
    ours, theirs = cells["graphopt"].nodes, cells[tool].nodes
    if ours is None or theirs is None or theirs >= ours:
        return []
    mine, other = counts["graphopt"], counts[tool]
    fewer = " ".join(f"{op}-{mine[op] - other[op]}" for op in sorted(mine) if mine[op] > other[op])
    more = " ".join(f"{op}+{other[op] - mine[op]}" for op in sorted(other) if other[op] > mine[op])
    star = "*" if cells[tool].custom else ""
    return [f"{name}: {tool}{star} {theirs} < {ours} nodes, {cells[tool].kilobytes:.0f} kB for our "
            f"{cells['graphopt'].kilobytes:.0f}: {fewer} | {more}"]  # fmt: skip


INFLATED = 1.25
"""A peer's file above this multiple of the input's holds weights that the input computes, or holds once."""


def verdicts(table: dict[str, dict[str, Cell]]) -> list[str]:
    """What the table has to show: rows where we are not best, worse than the input, or different.

    A peer that wrote weights out which the input computes is listed apart: nodes saved at that price are no gain.
    """
    told: dict[str, list[str]] = {
        "a peer has fewer nodes": [],
        "a peer has fewer nodes by writing weights out": [],
        "a peer has fewer bytes, by more than 1 %": [],
        "worse than the input": [],
        "difference above 1e-5": [],
    }
    fewer, written, smaller, worse, apart = told.values()
    for name, cells in table.items():
        ours, given = cells["graphopt"], cells["input"]
        if ours.nodes is None:
            apart.append(name)
            continue
        peers = [c for t, c in cells.items() if t not in ("input", "graphopt") and c.nodes and not c.custom]
        if peers:
            _beside(name, ours, given, peers, fewer, written)
            least = min(c.kilobytes or 0.0 for c in peers)
            if (ours.kilobytes or 0.0) > 1.01 * least:
                smaller.append(f"{name} ({ours.kilobytes:.0f} kB, best peer {least:.0f} kB)")
        if ours.nodes > (given.nodes or 0) or (ours.latency or 0) > 1.02:
            worse.append(f"{name} ({ours.nodes} of {given.nodes} nodes, latency {ours.latency})")
        if ours.difference is None or ours.difference > 1e-5:
            apart.append(f"{name} ({ours.difference})")
    return [
        f"{what}: {len(rows)} of {len(table)} rows{': ' if rows else ''}{', '.join(rows)}"
        for what, rows in told.items()
    ]


def _beside(name: str, ours: Cell, given: Cell, peers: list[Cell], fewer: list[str], written: list[str]) -> None:
    """Note where a peer has fewer nodes than we, and at which price."""
    limit = INFLATED * (given.kilobytes or 0.0)
    counts = [c.nodes or 0 for c in peers if (c.kilobytes or 0.0) <= limit]
    best = min(peers, key=lambda c: c.nodes or 0)
    if counts and min(counts) < (ours.nodes or 0):
        fewer.append(f"{name} ({ours.nodes}, best peer {min(counts)})")
    elif (best.nodes or 0) < (ours.nodes or 0):
        more = (best.kilobytes or 0.0) - (given.kilobytes or 0.0)
        written.append(f"{name} ({ours.nodes}, peer {best.nodes} and {more:.0f} kB of weights)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--peers", type=Path, help="virtual environment of the peers")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for a file; 0: no latency")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "build" / "zoo", help="of exported networks")
    parser.add_argument("--json", type=Path, help="write all numbers")
    parser.add_argument("--gaps", type=Path, help="write by which operators a peer has fewer nodes")
    args = parser.parse_args()
    chosen = {
        name: path
        for name, path in sources(args.cache).items()
        if not args.models or any(word in name for word in args.models)
    }
    tools = [tool.name for tool in TOOLS if args.peers is not None or not tool.peer]
    print("| model | input |", " | ".join(tools), "|")
    print("|---" * (2 + len(tools)) + "|", flush=True)
    table: dict[str, dict[str, Cell]] = {}
    for name, source in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            cells, gaps = row(name, source, Path(folder), args.peers, args.seconds)
        table[name] = cells
        given = cells["input"]
        told = [f"{given.nodes} · {given.kilobytes:.0f}", *(str(cells[tool]) for tool in tools)]
        print(f"| {name} |", " | ".join(told), "|", flush=True)
        if args.gaps:
            with args.gaps.open("a") as file:
                file.writelines(f"{line}\n" for line in gaps)
        if args.json:
            plain = {model: {tool: asdict(cell) for tool, cell in row.items()} for model, row in table.items()}
            args.json.write_text(json.dumps(plain, indent=1))
    print()
    print("\n".join(verdicts(table)))


if __name__ == "__main__":
    main()
