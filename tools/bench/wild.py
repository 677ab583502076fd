"""Every shared model through `fold`, `inspect`, a certificate, and `shrink` after 30 % of its units were zeroed.

    python tools/bench/wild.py [NAME ...]

Prints, per model: nodes before and after `fold`; the largest relative difference of its outputs on its own inputs (the
samples that come with it, else random ones); units, how many are exact, and the share of the parameters they reach; the
certificate (zeroed against pruned model, half of the units); planted units, those that `shrink` removed, and the
difference that made, relative to the outputs of the dense model as in a certificate. Exit code 1 if anything differs by
more than its bound (fold 1e-4, the others 1e-5).
GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt.analysis import savings
from graphopt.analysis.certificate import Distances, certify, choose, zero_units
from graphopt.analysis.cost import model_stats
from graphopt.analysis.units import analyse
from graphopt.verify import compare, random_feeds

DATA = Path(os.environ.get("GRAPHOPT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def feeds_of(name: str, model: Any) -> list[dict[str, Any]]:
    """At most two of the model's own samples; random feeds where it has none."""
    path = DATA / "inputs" / f"{name}.npz"
    if not path.is_file():
        return random_feeds(model, 0)
    stored = np.load(path)
    samples = sorted({key.split("|")[0] for key in stored.files}, key=int)[:2]
    return [{k.split("|", 1)[1]: stored[k] for k in stored.files if k.split("|")[0] == s} for s in samples]


def main(names: list[str]) -> int:
    print("| model | nodes | fold | difference | units (exact) | reach | certificate | planted | found | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    worst = 0
    for path in sorted((DATA / "models").glob("*.onnx")):
        if names and path.stem not in names:
            continue
        model = graphopt.load(path)
        feeds = feeds_of(path.stem, model)
        result = graphopt.optimize(model, "fold", verify_each="structure")
        folded = result.model
        change = compare(model, folded, feeds).worst_relative
        coupling = analyse(folded)
        exact = sum(unit.exact for unit in coupling.units)
        reach = savings.parameters(coupling).reachable / max(1, model_stats(folded).parameters)
        row = f"| {path.stem} | {model_stats(model).nodes} | {model_stats(folded).nodes} | {change:.1e} "
        row += f"| {len(coupling.units)} ({exact}) | {reach:.0%} "
        worst |= change > 1e-4
        if not exact:
            print(row + "| | | | |", flush=True)
            continue
        certificate = certify(folded, coupling, choose(coupling, 0.5, 1), feeds)
        planted = choose(coupling, 0.3, 2)
        zeroed = folded.clone()
        zero_units(zeroed, coupling, planted)
        small = graphopt.optimize(zeroed, "shrink", verify_each="structure").model
        found = len(coupling.units) - len(analyse(small).units)
        left = Distances(folded, feeds).distance(zeroed, small)
        worst |= certificate.difference > 1e-5 or left > 1e-5
        print(f"{row}| {certificate.difference:.1e} | {len(planted)} | {found} | {left:.1e} |", flush=True)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
