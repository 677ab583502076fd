"""Accuracy and latency of pipelines on the CIFAR-10 ResNets of the shared data, as a Markdown table.

    python tools/bench/cifar.py resnet20 resnet56
    python tools/bench/cifar.py resnet20 --passes 'fold,prune{macs=0.5}' 'fold,quantize'

One pipeline by hand, from the root of the repository:

    graphopt optimize ../shared/data/models/resnet20_cifar10.onnx --passes fold,quantize \
      --calib tools.bench.cifar:calibration --eval tools.bench.cifar:top1

2048 unlabelled training images calibrate, all 10,000 test images measure. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import graphopt

DATA = Path(os.environ.get("GRAPHOPT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
PIPELINES = (
    "fold",
    "fold,quantize",
    *(f"fold,prune{{macs={share}}}" for share in (0.9, 0.7, 0.5)),
    *(f"fold,prune{{macs={share}}},quantize" for share in (0.9, 0.7, 0.5)),
)


def images(split: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Normalised images [n, 3, 32, 32] float32, and labels [n]."""
    with np.load(DATA / "cifar10" / f"{split}.npz") as arrays:
        raw, labels = arrays["images"], arrays["labels"]
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
    return (raw.astype(np.float32) / 255 - mean) / std, labels


def calibration() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Unlabelled training images, 64 at a time."""
    x, _ = images("train2048")
    name = graphopt.load(DATA / "models" / "resnet20_cifar10.onnx").graph.inputs[0].name or ""
    for start in range(0, len(x), 64):
        yield {name: x[start : start + 64]}


def top1(session: Any) -> float:
    """Share of the test images that are classified rightly."""
    x, labels = images("test")
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: x[i : i + 250]})[0].argmax(1) for i in range(0, len(x), 250)]
    return float((np.concatenate(found) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=["resnet20", "resnet56"])
    parser.add_argument("--passes", nargs="+", default=PIPELINES)
    arguments = parser.parse_args()
    print("| model | passes | top-1 before | after | MACs | bytes | time, ratio (quartiles) |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        model = graphopt.load(DATA / "models" / f"{name}_cifar10.onnx")
        for passes in arguments.passes:
            report = graphopt.optimize(model, passes, calib=calibration, evaluate=top1, bench_seconds=4.0).report
            accuracy, latency = report.accuracy, report.latency
            assert accuracy is not None and latency is not None and latency.ratio is not None
            macs = (report.output.macs or 0) / (report.input.macs or 1)
            print(
                f"| {name} | `{passes}` | {accuracy.before:.2%} | {accuracy.after:.2%} | {macs:.2f} "
                f"| {report.output.bytes / report.input.bytes:.2f} "
                f"| {latency.ratio:.3f} ({latency.low:.3f}..{latency.high:.3f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
