"""Which rule for the ranges of activations disturbs the outputs of a model least, also on data held out.

    python tools/bench/ranges.py --data ../shared/data resnet20_cifar10 minilm_l6 ultraface_rfb320

Every model is folded and all that has an integer kernel on the target `cpu` is quantised; nothing is left in float and
weights are rounded to nearest, so that only ranges differ. Figures are the signal-to-noise ratio of the worst output in
dB: on the samples by which `ranges=auto` and `ranges=search` choose, and on held-out ones. CIFAR-10: 512 training and
256 test images. minilm_l6: 256 calibration sentences and 256 of the development set. stories260k: 64 and 32 stories.
The others: every second recorded sample calibrates and the rest is held out; with one sample there is nothing held out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt import calibration
from graphopt.numerics.rounding import Affine
from graphopt.progress import Silent
from graphopt.quantization.prepared import SAMPLES, Prepared
from graphopt.quantization.ranges.choice import SINGLE, measure_ranges
from graphopt.quantization.ranges.ranging import affines, histograms
from graphopt.quantization.search.sensitivity import Reference, decibel
from graphopt.quantization.static.prepare import to_integer_form
from graphopt.registry import target

Feeds = list[dict[str, np.ndarray]]


def images(data: Path, split: str, count: int) -> Feeds:
    mean, deviation = (
        np.array(v, np.float32).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with np.load(data / "cifar10" / f"{split}.npz") as stored:
        x = (stored["images"][:count].astype(np.float32) / 255 - mean) / deviation
    return [{"input": x[i : i + 32]} for i in range(0, count, 32)]


def sentences(path: Path, ids: str, mask: str, count: int) -> Feeds:
    with np.load(path) as stored:
        tokens, masks = stored[ids].astype(np.int64), stored[mask].astype(np.int64)
    found = []
    for start in range(0, count, 32):
        rows = slice(start, start + 32)
        longest = int(masks[rows].sum(1).max())
        found.append({"input_ids": tokens[rows, :longest], "attention_mask": masks[rows, :longest]})
    return found


def stories(tokens: np.ndarray) -> Feeds:
    return [{"input_ids": tokens[i : i + 4]} for i in range(0, len(tokens), 4)]


def recorded(path: Path) -> Feeds:
    with np.load(path) as stored:
        keys = sorted({key.split("|")[0] for key in stored.files}, key=int)
        return [{k.split("|", 1)[1]: stored[k] for k in stored.files if k.split("|")[0] == key} for key in keys]


def samples(data: Path, name: str) -> tuple[Feeds, Feeds]:
    """To calibrate on, and held out."""
    if name.startswith("resnet"):
        return images(data, "train2048", 512), images(data, "test", 256)
    if name == "minilm_l6":
        sts = data / "sts"
        return (
            sentences(sts / "calib1024.npz", "ids", "mask", 256),
            sentences(sts / "stsb_dev_covered.npz", "ids1", "mask1", 256),
        )
    if name == "stories260k":
        with np.load(data / "lm" / "stories260k_tokens.npz") as stored:
            calib, held = stored["calib"][:64].astype(np.int64), stored["eval"][:32].astype(np.int64)
        return stories(calib), stories(held)
    found = recorded(data / "inputs" / f"{name}.npz")
    return found[::2], found[1::2]


def row(data: Path, name: str, percentile: float, rules: tuple[str, ...]) -> str:
    """One line of the table: signal-to-noise ratios on calibration samples / held-out samples, by rule."""
    model = graphopt.optimize(data / "models" / f"{name}.onnx", passes="fold", bench=False).model
    calib, held = (calibration.load(feeds, model) if feeds else None for feeds in samples(data, name))
    assert calib is not None
    to_integer_form(model)
    scheme = target("cpu").quant
    assert scheme is not None
    prepared = Prepared(model, scheme, scheme.per_channel, calibration=calib)
    if "search" in rules:
        measure_ranges(prepared, prepared.everything, "search", percentile=percentile, samples=512, progress=Silent())
    else:
        tensors = prepared.everything.ranged
        prepared.histograms = histograms(model, tensors, calib, samples=512, threads=1, progress=Silent())
        prepared.compared = {
            rule: affines(prepared.histograms, rule, prepared.grid, percentile=percentile) for rule in SINGLE
        }
    judges = [prepared.reference, Reference(model, held, samples=256) if held else None]
    unfit = prepared.unfit_units()
    cells = []
    for rule in rules:
        scales: dict[str, Affine] = dict(prepared.compared[rule])
        prepared.activations = scales
        made = prepared.variant(prepared.planned(unfit))
        cells.append(" / ".join(f"{decibel(j.noise(made)):.1f}" if j else "" for j in judges).rstrip(" /"))
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of shared models")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--search", action="store_true", help="add the column of ranges=search, which takes its time")
    parser.add_argument("--percentile", type=float, default=99.99)
    args: Any = parser.parse_args()
    rules = (*SINGLE, "search") if args.search else SINGLE
    print(f"| dB on {SAMPLES} calibration samples / held out | {' | '.join(rules)} |")
    print("|---" * (len(rules) + 1) + "|")
    for name in args.models:
        print(row(args.data, name, args.percentile, rules), flush=True)


if __name__ == "__main__":
    main()
