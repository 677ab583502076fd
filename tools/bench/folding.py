"""Node counts after graphopt's fold, onnxslim and onnxsim on the same models, and how well each kept the outputs.

    .venv/bin/python tools/bench/folding.py ../shared/data/models/*.onnx --peers /path/to/venv

`--peers` is the virtual environment that holds the peers (pip install onnxslim onnxsim); they run as subprocesses, so
their dependencies never meet ours. Nodes are counted in the main graph and all bodies, without Constant nodes, which
are a way to store a tensor. Prints a Markdown table: nodes / bytes of the file / seconds of wall time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx_ir as ir

from graphopt.base import Context
from graphopt.model import load, save
from graphopt.progress import Silent
from graphopt.registry import pass_class, target
from graphopt.rewriting.edit import size


def fold(source: Path, out: Path) -> None:
    model = load(source)
    ctx = Context(target("cpu"), None, None, seed=0, jobs=1, progress=Silent(), resolve=pass_class)
    pass_class("fold")().run(model, ctx)
    save(model, out)


def command(tool: str, peers: Path, source: Path, out: Path) -> list[str]:
    return [str(peers / "bin" / tool), str(source), str(out)]


def describe(out: Path, seconds: float) -> str:
    return f"{size(ir.load(out)).nodes} / {out.stat().st_size / 1000:.0f} kB / {seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--peers", type=Path, help="virtual environment with onnxslim and onnxsim")
    args = parser.parse_args()
    tools = ["onnxslim", "onnxsim"] if args.peers else []
    print("| model | input |", " | ".join(["graphopt fold", *tools]), "|")
    print("|---" * (3 + len(tools)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for source in args.models:
            cells = [source.stem, f"{size(ir.load(source)).nodes} / {source.stat().st_size / 1000:.0f} kB"]
            for tool in ["fold", *tools]:
                out = Path(folder) / f"{source.stem}_{tool}.onnx"
                start = time.perf_counter()
                if tool == "fold":
                    fold(source, out)
                else:
                    done = subprocess.run(
                        command(tool, args.peers, source, out), capture_output=True, text=True, check=False
                    )
                    if done.returncode or not out.exists():
                        print(f"{tool} {source.name}: {done.stderr.strip()[-300:]}", file=sys.stderr)
                        cells.append(f"failed ({done.returncode})")
                        continue
                cells.append(describe(out, time.perf_counter() - start))
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
