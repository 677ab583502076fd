"""fold on random graphs: python tools/fuzz/folding.py 0 1000 [--kinds plain,norms,if,loop,state] [--fold SPEC]

"redundant" graphs have detours that folding should find (`tests/models/redundant_graphs.py`), "plain" ones are what
these are made of, "norms" those in which norms of all kinds meet, the others have a stretch of their nodes in a body.
Each is folded and must then be valid, compute the same within the tolerance of its type (NaN and infinity in the same
places), have no more nodes or bytes than before, and stay as it is when it is folded again. Prints the seeds that fail
and which member of fold is the first to break them; exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

import onnx_ir as ir
from fold_checks import context, problem
from random_graphs import random_graph
from random_norm_graphs import norm_graph
from redundant_graphs import redundant_graph
from wrapped_graphs import wrapped_graph

from graphopt.base import Pass
from graphopt.registry import pass_class
from graphopt.rewriting.size import size
from graphopt.spec import parse

KINDS = ("redundant", "plain", "norms", "redundant", "if", "loop", "state")


def graph_of(seed: int, kind: str) -> ir.Model | None:
    """The graph of a seed; None where a kind does not fit it."""
    if kind in ("norms", "redundant"):
        return norm_graph(seed) if kind == "norms" else redundant_graph(seed)
    return random_graph(seed) if kind == "plain" else wrapped_graph(seed, kind)


def culprit(model: ir.Model, whole: Pass, seed: int) -> str:
    """The first member of fold after which the model is not as it was."""
    from graphopt.passes.fold import MEMBERS

    current = model.clone()
    for name in MEMBERS * 2:
        kind = pass_class(name)
        shared = {f.name for f in fields(kind)} & {f.name for f in fields(whole)}
        member = kind(**{option: getattr(whole, option) for option in sorted(shared)})
        try:
            if wrong := problem(current, member, seed):
                return f"{name}: {wrong}"
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
        member.run(current, context())
    return "no member alone"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--kinds", default=",".join(KINDS), help="taken in turn")
    parser.add_argument("--fold", default="fold", help="the pass with its options")
    args = parser.parse_args()
    kinds, chosen = args.kinds.split(","), parse(args.fold)[0]
    graphs = failures = before = after = 0
    for seed in range(args.first, args.last):
        kind = kinds[seed % len(kinds)]
        model = graph_of(seed, kind)
        if model is None:
            continue
        try:
            wrong = problem(model, chosen, seed)
            folded = model.clone()
            chosen.run(folded, context())
            before, after = before + size(model).nodes, after + size(folded).nodes
        except Exception:
            wrong = traceback.format_exc(limit=-3)
        graphs += 1
        if wrong:
            failures += 1
            print(f"seed {seed} {kind}: {wrong} [{culprit(model, chosen, seed)}]", flush=True)
    print(f"{graphs} graphs, {failures} failures; {before} nodes became {after}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
