"""Accuracy against measured latency of pruned ResNets, float and int8: a table and a plot of the front.

    python tools/bench/latency_front.py resnet56 --work out/front --plot docs/latency_front.svg
    python tools/bench/latency_front.py resnet56 --work out/front --options distil=20

2048 unlabelled training images choose and refit, all 10,000 test images measure. Latency: one thread, medians of paired
rounds, as ratios to the model as it came, batch 1 and batch 32; `prune{latency=}` aims at batch 1. ResNet-20, float and
int8, stands beside ResNet-56 as the honest rival: a smaller network, trained as such. Models are kept in --work and not
made again, so that times can be measured anew on a quiet machine. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cifar import DATA, images

import graphopt
from graphopt import registry
from graphopt.model import load, save
from pruning import top1

FLOAT = (0.85, 0.7, 0.55)
INT8 = (0.38, 0.35, 0.32, 0.28)


@dataclass
class Point:
    """One measured model.

    Attributes:
        label: what it is.
        series: "float", "int8" or "rival".
        model: the model.
        accuracy: top-1 on the test images, in percent.
        ratios: time over that of the dense model, at batch 1 and 32.
    """

    label: str
    series: str
    model: Any
    accuracy: float = 0.0
    ratios: tuple[float, float] = (0.0, 0.0)


def made(path: Path, pipeline: str, work: Path, calibration: np.ndarray[Any, Any]) -> Any:
    """The model of a pipeline, from the folder if it is there."""
    name = hashlib.sha256(f"{path.name} {pipeline}".encode()).hexdigest()[:10]
    file = work / f"{path.stem}-{name}.onnx"
    if not file.is_file():
        start = time.process_time()
        dense = load(path)
        feeds = {dense.graph.inputs[0].name: calibration}
        result = graphopt.optimize(dense, pipeline, calib=feeds, bench=False, verify_each="structure")
        for record in result.report.passes:
            print("\n".join(f"    {note}" for note in record.notes))
        save(result.model, file)
        print(f"{path.stem} {pipeline}: {time.process_time() - start:.0f} s of processor time", flush=True)
    return load(file)


def points(network: str, given: argparse.Namespace, calibration: np.ndarray[Any, Any]) -> list[Point]:
    """All models of the front."""
    path = DATA / "models" / f"{network}_cifar10.onnx"
    extra = f",{given.options}" if given.options else ""
    pipelines = [("float", "fold"), ("int8", "fold,quantize")]
    pipelines += [("float", f"fold,prune{{latency={share}{extra}}}") for share in given.float]
    pipelines += [("int8", f"fold,prune{{latency={share},precision=int8{extra}}},quantize") for share in given.int8]
    found = [Point(f"{network} as it came", "float", load(path))]
    found += [Point(f"{network} `{p}`", series, made(path, p, given.work, calibration)) for series, p in pipelines]
    if network == "resnet56":
        rival = DATA / "models" / "resnet20_cifar10.onnx"
        for pipeline in ("fold", "fold,quantize"):
            found.append(Point(f"resnet20 `{pipeline}`", "rival", made(rival, pipeline, given.work, calibration)))
    return found


def measure(found: list[Point], given: argparse.Namespace) -> None:
    """Accuracy on all test images, and times in turn."""
    x, labels = images("test")
    target = registry.target(given.target)
    backend = registry.backend(target.backend)
    for point in found:
        point.accuracy = 100 * top1(point.model, x, labels)
    name = found[0].model.graph.inputs[0].name
    for point in found:
        if point.model.graph.inputs[0].name != name:
            point.model.graph.inputs[0].name = name
    both = [
        backend.bench([p.model for p in found], target, {name: x[:batch]}, threads=1, seconds=given.seconds).ratios
        for batch in (1, 32)
    ]
    for point, one, many in zip(found, *both, strict=True):
        point.ratios = (one, many)


def table(found: list[Point]) -> str:
    """Markdown."""
    lines = ["| model | top-1 % | latency, batch 1 | batch 32 |", "|---|---|---|---|"]
    for p in found:
        lines.append(f"| {p.label} | {p.accuracy:.2f} | {p.ratios[0]:.3f} | {p.ratios[1]:.3f} |")
    return "\n".join(lines)


COLOURS = {"float": "#1f6fb4", "int8": "#c8553d", "rival": "#5b7553"}


def plot(found: list[Point], title: str) -> str:
    """An SVG of accuracy over latency at batch 1, written by hand: points, the lines through each series, two axes."""
    width, height, left, bottom = 720, 440, 64, 52
    lows = min(p.accuracy for p in found)
    low, high = np.floor(lows * 2) / 2 - 0.25, np.ceil(max(p.accuracy for p in found) * 2) / 2 + 0.25
    right = max(1.05, *(p.ratios[0] for p in found))

    def at(ratio: float, accuracy: float) -> tuple[float, float]:
        x = left + ratio / right * (width - left - 24)
        return x, height - bottom - (accuracy - low) / (high - low) * (height - bottom - 44)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="24" font-size="15">{title}</text>',
    ]
    for tick in np.arange(0, right + 1e-9, 0.1):
        x, y = at(float(tick), low)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="40" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:.1f}</text>')
    for tick in np.arange(np.ceil(low), high + 1e-9, 1.0):
        x, y = at(0, float(tick))
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{width - 24}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:.0f} %</text>')
    parts.append(
        f'<text x="{width / 2:.0f}" y="{height - 12}" text-anchor="middle">'
        "time at batch 1, relative to the dense float model</text>"
    )
    for number, (series, colour) in enumerate(COLOURS.items()):
        mine = sorted((p for p in found if p.series == series), key=lambda p: p.ratios[0])
        if not mine:
            continue
        places = [at(p.ratios[0], p.accuracy) for p in mine]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="4 4"' if series == "rival" else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        text = "ResNet-20, float and int8" if series == "rival" else series
        parts.append(f'<text x="{width - 210}" y="{height - 130 + 18 * number}" fill="{colour}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet56"], help="resnet20, resnet56")
    parser.add_argument("--float", nargs="*", type=float, default=FLOAT, help="budgets of latency, float")
    parser.add_argument("--int8", nargs="*", type=float, default=INT8, help="budgets of latency, int8")
    parser.add_argument("--options", default="", help="more options of prune, such as 'distil=20,samples=1024'")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measured rounds per batch size")
    parser.add_argument("--work", type=Path, default=Path("out/front"), help="folder for the models made")
    parser.add_argument("--plot", type=Path, help="file for the plot of the last network, SVG")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    calibration, _ = images("train2048")
    for network in given.networks:
        found = points(network, given, calibration)
        measure(found, given)
        print(table(found), flush=True)
        if given.plot:
            given.plot.write_text(plot(found, f"{network}, CIFAR-10: accuracy over latency"), encoding="utf-8")


if __name__ == "__main__":
    main()
