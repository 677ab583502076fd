"""Wall time and peak memory of folding a model of more than 2 GB, beside plain load and save, and beside onnxslim.

    python tools/bench/large_model.py [--layers 20] [--rows 4096] [--columns 8192] [--onnxslim PYTHON]

Generates a chain of MatMul + Add + Identity + Relu (80 nodes, 2.7 GB of float32 weights as external data) in a
temporary folder, runs every tool in a process of its own, and prints a markdown table. Peak memory is the high-water
mark of the resident set of the process (VmHWM), file-backed pages included. onnxslim runs under the interpreter that is
named; by default a virtual environment is made for it, since it is no dependency of ours. Its shape inference is off:
with it on, onnxslim 0.1.98 ends in an error above 2 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

REPOSITORY = Path(__file__).resolve().parents[2]

REPORT = """
import atexit
def _report():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            print("PEAK_KB", line.split()[1])
atexit.register(_report)
"""

FOLD = """
from graphopt.cli import main
import sys
sys.argv = ["graphopt", "optimize", {source!r}, "-o", {target!r}, "--passes", "fold", "--verify-each", {verify!r}]
main()
"""

LOAD_SAVE = """
from graphopt.model import load, save
save(load({source!r}), {target!r})
"""

ONNXSLIM = """
import sys
from onnxslim.cli import main
sys.argv = ["onnxslim", {source!r}, {target!r}, "--save-as-external-data", "--no-shape-infer"]
main()
"""


def generate(path: Path, layers: int, rows: int, columns: int) -> int:
    """Write the model, one weight at a time; returns the bytes of its weights."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 20).astype(np.float32) / np.float32(np.sqrt(columns))
    nodes, initializers, offset, current = [], [], 0, "x"
    with path.with_suffix(".bin").open("wb") as data:

        def tensor(name: str, *dims: int) -> None:
            nonlocal offset
            size = int(np.prod(dims))
            for start in range(0, size, len(block)):
                data.write(np.roll(block, offset // 4 + start)[: min(len(block), size - start)].tobytes())
            proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", path.with_suffix(".bin").name), ("offset", offset), ("length", 4 * size)):
                proto.external_data.add(key=key, value=str(value))
            initializers.append(proto)
            offset += 4 * size

        for index in range(layers):
            shape = (rows, columns) if index % 2 == 0 else (columns, rows)
            tensor(f"w{index}", *shape)
            tensor(f"b{index}", shape[1])
            nodes.append(helper.make_node("MatMul", [current, f"w{index}"], [f"m{index}"], name=f"matmul{index}"))
            nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"], name=f"add{index}"))
            nodes.append(helper.make_node("Identity", [f"a{index}"], [f"i{index}"], name=f"identity{index}"))
            # Without it the layers are one product, which is another fold and another amount of work.
            nodes.append(helper.make_node("Relu", [f"i{index}"], [f"r{index}"], name=f"relu{index}"))
            current = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, None)],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return offset


def measure(python: Path, code: str) -> tuple[float, float]:
    """Seconds and peak gigabytes of a process that runs the code."""
    start = time.perf_counter()
    result = subprocess.run([python, "-c", REPORT + code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if result.returncode != 0:
        raise SystemExit(f"failed with exit code {result.returncode}:\n{result.stderr[-2000:]}")
    kilobytes = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("PEAK_KB")]
    return seconds, max(kilobytes) / 1e6


def onnxslim_python(folder: Path) -> Path:
    """An interpreter that has onnxslim."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxslim", "onnx"], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--onnxslim", type=Path, help="an interpreter that has onnxslim")
    parser.add_argument("--only", nargs="*", default=[""], help="run only the rows whose name contains one of these")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-model-") as name:
        folder = Path(name)
        source = folder / "large.onnx"
        size = generate(source, arguments.layers, arguments.rows, arguments.columns)
        python = Path(sys.executable)
        jobs = [
            ("graphopt: load, check, save", python, LOAD_SAVE, "off"),
            ("graphopt optimize --passes fold --verify-each structure", python, FOLD, "structure"),
            ("graphopt optimize --passes fold (verified numerically)", python, FOLD, "numeric"),
            ("onnxslim", None, ONNXSLIM, ""),
        ]
        print(f"{size / 1e9:.2f} GB of weights, {4 * arguments.layers} nodes, {os.cpu_count()} cores\n")
        print("| tool | seconds | peak memory (GB) | nodes after |\n|---|---|---|---|", flush=True)
        for title, interpreter, code, verify in jobs:
            if not any(word in title for word in arguments.only):
                continue
            target = folder / "out" / "large.onnx"
            target.parent.mkdir()
            chosen = interpreter or arguments.onnxslim or onnxslim_python(folder / "venv")
            seconds, peak = measure(chosen, code.format(source=str(source), target=str(target), verify=verify))
            after = len(onnx.load(target, load_external_data=False).graph.node)
            print(f"| {title} | {seconds:.1f} | {peak:.2f} | {after} |", flush=True)
            for path in target.parent.iterdir():
                path.unlink()
            target.parent.rmdir()


if __name__ == "__main__":
    main()
