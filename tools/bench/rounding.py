"""What rounding does to models whose weights are integers: each method on each grid, and the metric of each model.

    python tools/bench/rounding.py --data ../shared/data --models stories260k,minilm_l6 --out table.md

Weights of all layers are rounded and written back as the numbers that the integers stand for, so that nothing else
differs from the float model: activations stay float. Data to calibrate with is never the data that is measured on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.calibration import Calibration
from graphopt.calibration import load as load_data
from graphopt.model import load, save
from graphopt.quantization.rounding.front_to_back import FrontToBack, Requests
from graphopt.quantization.rounding.interface import Rounding, WeightGrid, nearest
from graphopt.quantization.rounding.second_order import SecondOrder
from graphopt.rewriting.layers import layers_of

GRIDS = {
    "4 bits, block 16": WeightGrid(4, symmetric=False, block=16),
    "4 bits, block 32": WeightGrid(4, symmetric=False, block=32),
    "4 bits, block 64": WeightGrid(4, symmetric=False, block=64),
    "4 bits, block 128": WeightGrid(4, symmetric=False, block=128),
    "4 bits, block 16, symmetric": WeightGrid(4, block=16, full=True),
    "4 bits, block 32, symmetric": WeightGrid(4, block=32, full=True),
    "4 bits, block 64, symmetric": WeightGrid(4, block=64, full=True),
    "4 bits, block 128, symmetric": WeightGrid(4, block=128, full=True),
    "8 bits per channel": WeightGrid(8),
    "8 bits per tensor": WeightGrid(8, per_channel=False),
    "4 bits per channel": WeightGrid(4),
}
METHODS = ("nearest", "search", "gptq", "descent", "front to back")


def calibration(data: Path, name: str, samples: int) -> dict[str, np.ndarray]:
    """Unlabelled feeds of a model, apart from those it is measured on."""
    if name.startswith("stories"):
        with np.load(data / "lm" / "stories260k_tokens.npz") as stored:
            return {"input_ids": stored["calib"][:samples].astype(np.int64)}
    if name.startswith("minilm"):
        with np.load(data / "sts" / "calib1024.npz") as stored:
            return {
                "input_ids": stored["ids"][:samples].astype(np.int64),
                "attention_mask": stored["mask"][:samples].astype(np.int64),
            }
    sys.path.insert(0, str(data))
    import evaluate

    model = load(data / "models" / f"{name}.onnx")
    return {str(model.graph.inputs[0].name): evaluate.cifar_arrays("train2048")[0][:samples]}


def metric(data: Path, name: str) -> Callable[[str], float]:
    """What a model is measured by: perplexity, rank correlation or accuracy."""
    sys.path.insert(0, str(data))
    import evaluate

    found = {"s": evaluate.lm, "m": evaluate.sts, "r": evaluate.cifar}[name[0]]
    return lambda path: float(found(path))


def rounding(method: str, model: Any, calib: Calibration, grid: WeightGrid) -> Rounding:
    """The rounding of a method."""
    if method == "nearest":
        return nearest
    if method == "front to back":
        asked = Requests()
        for key, layer in layers_of(model)[0].items():
            asked(key, layer.weight(), grid)
        return FrontToBack(model, calib, asked)
    return SecondOrder(model, calib, method)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="stories260k,minilm_l6,resnet20_cifar10,resnet56_cifar10")
    parser.add_argument("--grids", default=",".join(GRIDS).replace(", ", "; "), help="separated by commas, ; inside")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    methods = options.methods.split(",")
    lines = ["| model | grid | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    print("\n".join(lines), flush=True)
    for name in options.models.split(","):
        model = load(options.data / "models" / f"{name}.onnx")
        calib = load_data(calibration(options.data, name, options.samples), model)
        measured = metric(options.data, name)
        for title in (part.replace("; ", ", ") for part in options.grids.split(",")):
            cells = []
            for method in methods:
                began = time.perf_counter()
                copy = model.clone()
                chosen = rounding(method, model, calib, GRIDS[title])
                for key, layer in layers_of(copy)[0].items():
                    layer.store(chosen(key, layer.weight(), GRIDS[title]).dequantised().astype(float), layer.bias())
                seconds = time.perf_counter() - began
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "rounded.onnx"
                    save(copy, path)
                    cells.append(f"{measured(str(path)):.4f} ({seconds:.0f} s)")
            lines.append(f"| {name} | {title} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
