"""Models compiled by TVM beside ONNX Runtime: python tools/fuzz/targets.py 0 150 [--kinds plain,norms] [--target NAME]

A number is the seed of a random graph (as in folding.py), whose batch size is open for every second one; with --zoo,
the networks of tests/models/zoo are taken (all, or those that are named) at the sizes that they were exported with, or
with --open those that have open sizes, at others. Each is compiled in a process of its own and run. Right is: outputs
of the shapes and types of ONNX Runtime without optimisations, within 1e-4 of the largest number of each, NaN in the
same places; or a refusal that names a place and what to do. With --arm64 FOLDER the bundle for tvm-arm64 is written,
and run in the emulated system of that folder (tools/arm64/prepare.sh). Prints a line a model; exit code 1 if one is
wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

import numpy as np
import onnx_ir as ir
from random_graphs import random_graph
from random_norm_graphs import norm_graph
from redundant_graphs import redundant_graph
from wrapped_graphs import wrapped_graph

from graphopt import jobs, registry
from graphopt.errors import GraphoptError
from graphopt.executor import Session
from graphopt.files.input_sizes import fix_sizes
from graphopt.model import load
from graphopt.target import Target
from graphopt.verify import random_feeds

Feeds = dict[str, np.ndarray[Any, Any]]

KINDS = ("plain", "norms", "redundant", "plain", "if")
TOLERANCE = 1e-4
"""Largest difference, relative to the largest number of an output."""
PATIENCE = 300.0
"""Seconds that a model may take."""
INTERNAL = ("TVM cannot compile the model:",)
"""How a refusal begins that only passes on what a check inside of TVM said."""


def random_case(seed: int, kind: str) -> tuple[ir.Model, Feeds] | None:
    """A random graph and its inputs; None where the kind does not fit the seed."""
    makers = {"plain": random_graph, "norms": norm_graph, "redundant": redundant_graph}
    model = makers[kind](seed) if kind in makers else wrapped_graph(seed, kind)
    if model is None:
        return None
    feeds = dict(random_feeds(model, seed, samples=1)[0])
    if seed % 2:
        fix_sizes(model, {}, {name: array.shape for name, array in feeds.items()})
    return model, feeds


def zoo_case(name: str, exporter: str, cache: Path, *, left_open: bool) -> tuple[ir.Model, Feeds]:
    """A network of the zoo and its inputs."""
    from zoo.export import exported

    from zoo import ZOO

    network = ZOO[name]
    model = load(exported(network, exporter, cache))
    feeds = network.feeds(1, other_sizes=left_open)
    names = [value.name for value in model.graph.inputs]
    given = {key: feeds[key] for key in names if key in feeds}
    if not left_open:
        fix_sizes(model, {}, {key: array.shape for key, array in given.items()})
    return model, given


def difference(wanted: Feeds, found: Feeds) -> str | float:
    """The largest of all outputs, relative to the largest number of each; or what is wrong with one of them."""
    worst = 0.0
    if wanted.keys() != found.keys():
        return f"outputs {sorted(found)}, not {sorted(wanted)}"
    for name, want in wanted.items():
        have = found[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            return f"output {name!r} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}"
        if want.dtype.kind in "biu":
            wrong = int(np.count_nonzero(want != have))
            if wrong:
                return f"output {name!r}: {wrong} of {want.size} numbers differ"
            continue
        a, b = want.astype(np.float64), have.astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return f"output {name!r}: NaN or infinity in other places"
        scale = max(1e-6, float(np.abs(a[finite]).max(initial=0.0)))
        gap = float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale
        worst = max(worst, gap if np.isfinite(gap) else np.inf)
    return worst


def on_arm64(model: ir.Model, feeds: Feeds, target: Target, system: Path) -> Feeds:
    """What the runner of the bundle writes in the emulated system."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bundle = jobs.lower(model, target, work / "bundle")
        np.savez(work / "x.npz", **feeds)  # type: ignore[arg-type]
        command = [system / "python", bundle.folder / "run.py", work / "x.npz", work / "y.npz"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the runner fails: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
        with np.load(work / "y.npz") as found:
            return dict(found)


def verdict(model: ir.Model, feeds: Feeds, target: Target, system: Path | None) -> tuple[str, str]:
    """`ok`, `refused` or `WRONG`, and what about it."""
    with Session(model) as reference:
        wanted = dict(reference.run(feeds))
    try:
        if system is not None:
            found = on_arm64(model, feeds, target, system)
        else:
            found = dict(registry.backend(target.backend).session(model, target).run(feeds))
    except GraphoptError as error:
        named = error.where and error.hint and not error.what.startswith(INTERNAL)
        return "refused" if named else "WRONG", str(error)
    except Exception as error:
        return "WRONG", f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    gap = difference(wanted, found)
    if isinstance(gap, str):
        return "WRONG", gap
    return ("ok" if gap <= TOLERANCE else "WRONG"), f"differs by {gap:.1e}"


def _child(pipe: Connection, *case: Any) -> None:
    pipe.send(verdict(*case))


def apart(*case: Any) -> tuple[str, str]:
    """`verdict` in a process of its own, which may crash or take too long."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(there, *case))
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE):
            return "WRONG", f"not done after {PATIENCE:.0f} s"
        return here.recv()
    except EOFError:
        process.join()
        return "WRONG", f"the process dies (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()


def cases(args: argparse.Namespace) -> Iterator[tuple[str, ir.Model, Feeds]]:
    """The name, the model and the inputs of each."""
    if args.zoo is not None:
        from zoo import ZOO

        for name in args.zoo or ZOO:
            if args.exporter not in ZOO[name].cannot_export and (ZOO[name].dynamic or not args.open):
                yield f"{name} {args.exporter}", *zoo_case(name, args.exporter, args.cache, left_open=args.open)
        return
    kinds = args.kinds.split(",")
    for seed in range(*args.seeds):
        kind = kinds[seed % len(kinds)]
        case = random_case(seed, kind)
        if case is not None:
            yield f"seed {seed} {kind}", *case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="*", metavar="SEED", help="first, and the one behind the last")
    parser.add_argument("--kinds", default=",".join(KINDS), help="taken in turn")
    parser.add_argument("--zoo", nargs="*", metavar="NETWORK")
    parser.add_argument("--exporter", default="dynamo")
    parser.add_argument("--open", action="store_true", help="sizes of the zoo's networks stay open")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-zoo")
    parser.add_argument("--target", default="tvm-cpu")
    parser.add_argument("--arm64", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.zoo is None and len(args.seeds) != 2:
        parser.error("give the first seed and the one behind the last, or --zoo")
    target = registry.target("tvm-arm64" if args.arm64 else args.target)
    import tvm  # noqa: F401  (once, for all the processes that are forked)

    count: Counter[str] = Counter()
    for name, model, feeds in cases(args):
        start = time.perf_counter()
        what, about = apart(model, feeds, target, args.arm64)
        count[what] += 1
        print(f"{what} | {name} | {time.perf_counter() - start:.0f} s | {about}", flush=True)
    print(", ".join(f"{number} {what}" for what, number in count.items()))
    return int(count["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
