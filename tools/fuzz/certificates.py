"""Certificates on thousands of random graphs: python tools/fuzz/certificates.py 0 5000

Prints the seeds that fail; exit code 1 if there are any.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

from random_graphs import random_graph

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import analyse


def main(first: int, last: int) -> int:
    certificates = units = exact = failures = 0
    for seed in range(first, last):
        model = random_graph(seed)
        coupling = analyse(model)
        units += len(coupling.units)
        exact += sum(unit.exact for unit in coupling.units)
        dead = choose(coupling, 0.5, seed)
        if not dead:
            continue
        certificates += 1
        certificate = certify(model, coupling, dead, seed=seed)
        if not certificate.holds:
            failures += 1
            print(f"seed {seed}: {certificate}")
    print(f"{certificates} certificates, {failures} failures; {units} units, {exact} exact")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
