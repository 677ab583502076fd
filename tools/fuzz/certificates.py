"""Certificates on thousands of random graphs: python tools/fuzz/certificates.py 0 5000 [norms|if,loop,state,...]

With kinds of bodies given, every graph has a stretch of its nodes moved into one (`wrapped_graphs`); "norms" are graphs
in which norms of all kinds meet (`random_norm_graphs`). For each graph:
EXACT units hold their certificate, any units can be removed from a graph that then still runs, and shrink keeps the
function. Prints the seeds that fail; exit code 1 if there are any.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

import numpy as np
import onnx_ir as ir
from random_graphs import random_graph
from random_norm_graphs import norm_graph
from wrapped_graphs import wrapped_graph

from graphopt.analysis.certificate import certify, choose, spare_axes, zero_units
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse
from graphopt.base import Context
from graphopt.executor import Session
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.target import Target
from graphopt.verify import compare, random_feeds


def check(seed: int, coupling: Coupling) -> str | None:
    """What is wrong with the units of a graph."""
    model = coupling.model
    dead = choose(coupling, 0.5, seed)
    if dead:
        certificate = certify(model, coupling, dead, seed=seed)
        if not certificate.holds:
            return f"{certificate}, units {sorted(dead)}"
    some = np.random.default_rng(seed).random(len(coupling.units)) < 0.4
    pruned = model.clone()
    remove_units(
        pruned, coupling, spare_axes(coupling, {u.id for u, gone in zip(coupling.units, some, strict=True) if gone})
    )
    feeds = random_feeds(model, seed)
    Session(pruned).run(feeds[0])
    shrunk = model.clone()
    zero_units(shrunk, coupling, dead)
    zeroed = shrunk.clone()
    if Shrink().run(shrunk, Context(Target("cpu", "ort"), None, None, 0, 1, Silent())).changed:
        gap = compare(zeroed, shrunk, feeds).worst_relative
        return f"shrink changes the function by {gap}" if not gap < 1e-4 else None
    return None


def graph_of(seed: int, kind: str) -> ir.Model | None:
    """The graph of a seed; None where a kind does not fit it."""
    if kind == "norms":
        return norm_graph(seed)
    return wrapped_graph(seed, kind) if kind else random_graph(seed)


def main(first: int, last: int, kinds: tuple[str, ...] = ()) -> int:
    units = exact = failures = graphs = 0
    for seed in range(first, last):
        kind = kinds[seed % len(kinds)] if kinds else ""
        try:
            model = graph_of(seed, kind)
            if model is None:
                continue
            coupling = analyse(model)
            wrong = check(seed, coupling)
        except Exception:
            traceback.print_exc()
            wrong = "an exception"
        graphs += 1
        if wrong:
            failures += 1
            print(f"seed {seed} {kind}: {wrong}", flush=True)
        units += len(coupling.units)
        exact += sum(unit.exact for unit in coupling.units)
    print(f"{graphs} graphs, {failures} failures; {units} units, {exact} exact")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3].split(",")) if len(sys.argv) > 3 else ()))
