"""Sparse and factorised layers in thousands of random graphs: python tools/fuzz/sparse.py 0 5000

For each graph: factors are their product, folding and merging of wrappers keep the function, compressed files give the
same bits, torch agrees with ONNX Runtime, and patterns survive what must not break them (tests/models/sparse_fuzz.py).
Prints the seeds that fail; exit code 1 if there are any.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

from sparse_fuzz import wrong


def main(first: int, last: int) -> int:
    failures = 0
    for seed in range(first, last):
        try:
            found = wrong(seed)
        except Exception:
            traceback.print_exc()
            found = "an exception"
        if found:
            failures += 1
            print(f"seed {seed}: {found}", flush=True)
    print(f"{last - first} graphs, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
