"""How large sparse models are in files, and what it costs to load them.

    python tools/bench/storage.py --data ../shared/data

For every model, pattern and type of weights: bytes of the file in full and compressed, the weights that are compressed
alone (of their own bytes, and of float16), and gzip -6 of the full file for comparison. For 2:4 also, both files in
turn, each in processes of its own: seconds to make a session of ONNX Runtime and the memory that adds at its peak, and
the ratio of the times of one run. Zeros are those of `sparsify{method=magnitude}`: where they are does not matter here.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt.files.stored import Storage
from graphopt.rewriting.names import Names

MODELS = ("minilm_l6", "resnet56_cifar10")
PATTERNS = ("2:4", "1:4", "4:8", "50%", "80%")
ROUNDS = 5

LOAD = """
import json, sys, time
import numpy as np, onnxruntime as ort
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
start = time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options)
seconds = time.perf_counter() - start
more = peak() - before
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
feeds = {i.name: np.ones([d if isinstance(d, int) else n for d, n in zip(i.shape, (1, 32, 32, 32))], kinds[i.type])
         for i in session.get_inputs()}
times = []
for _ in range(30):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print(json.dumps([seconds, more, min(times) * 1e3]))
"""


def sparse(source: Path, pattern: str, then: str = "") -> ir.Model:
    passes = f"sparsify{{method=magnitude,pattern={pattern}}}{then}"
    calib = "random" if then else None  # the ranges that it gives do not change a size
    return graphopt.optimize(source, passes, calib=calib, verify_each="structure", units=False, bench=False).model


def halved(model: ir.Model) -> ir.Model:
    """The same with its matrices in float16, cast where they are read."""
    model, names = model.clone(), Names(model)
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        half = ir.Tensor(tensor.numpy().astype(np.float16))
        stored = ir.Value(name=names.fresh(f"{value.name}.half"), const_value=half, shape=half.shape,
                          type=ir.TensorType(half.dtype))  # fmt: skip
        model.graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=names.fresh(f"{value.name}.cast"))
        value.replace_all_uses_with(cast.outputs[0])
        model.graph.insert_before(model.graph[0], cast)
        del model.graph.initializers[value.name or ""]
    return model


def loaded(files: Sequence[Path]) -> list[tuple[float, float, float]]:
    """Medians over rounds: seconds and MB of making a session, milliseconds of a run, for each file in turn."""
    runs: list[list[list[float]]] = [[] for _ in files]
    for _ in range(ROUNDS):
        for found, file in zip(runs, files, strict=True):
            done = subprocess.run([sys.executable, "-c", LOAD, str(file)], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    return [tuple(statistics.median(column) for column in zip(*found, strict=True)) for found in runs]  # type: ignore[misc]


def row(name: str, pattern: str, kind: str, model: ir.Model, folder: Path, *, timed: bool = True) -> str:
    full, small, archive = folder / "full.onnx", folder / "small.onnx", folder / "small.safetensors"
    graphopt.save(model, full)
    storage = graphopt.save(model, small, compress=True)
    graphopt.save(model, archive, compress=True)
    assert isinstance(storage, Storage)
    before, after = (sum(getattr(t, key) for t in storage.tensors) for key in ("before", "after"))
    own = after / before if before else 1.0
    of_half = own * before / (2 * sum(int(np.prod(t.shape)) for t in storage.tensors)) if before else 1.0
    zipped = len(gzip.compress(full.read_bytes(), 6))
    sizes = [full.stat().st_size, small.stat().st_size, archive.stat().st_size, zipped]
    shown = " | ".join(f"{size / 1e6:.2f}" for size in sizes)
    first = f"| {name} | {pattern} | {kind} | {shown} | {own:.1%} | {of_half:.1%} |"
    if not timed:
        return f"{first} | | |"
    (s0, m0, t0), (s1, m1, t1) = loaded([full, small])
    return f"{first} {s0:.2f} -> {s1:.2f} | {m0:.0f} -> {m1:.0f} | {t1 / t0:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", nargs="*", default=MODELS)
    arguments = parser.parse_args()
    print(
        "| model | pattern | weights | full (MB) | compressed | archive | gzip of full | compressed weights | "
        "of float16 | session (s) | peak (MB) | run |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            source = arguments.data / "models" / f"{name}.onnx"
            for pattern in PATTERNS:
                model = sparse(source, pattern)
                timed = pattern == PATTERNS[0]
                print(row(name, pattern, "float32", model, Path(folder), timed=timed), flush=True)
                if timed:
                    print(row(name, pattern, "float16", halved(model), Path(folder)), flush=True)
                    print(row(name, pattern, "int8", sparse(source, pattern, ",quantize"), Path(folder)), flush=True)


if __name__ == "__main__":
    main()
