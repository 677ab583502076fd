"""The shared models lowered for every target that this machine can check: built or refused, difference, size, time.

    python tools/bench/targets.py --out targets.md [--targets tvm-cpu,cpu] [--models gtcrn] [--versions float,int8]
    python tools/bench/targets.py --arm64 ~/.cache/graphopt/arm64        (tools/arm64/prepare.sh makes that folder)

A version is what passes make of a model (`VERSIONS`); inputs are one real call, their shapes fixed. A bundle for this
processor runs here, by the code of `graphopt run`; one for arm64 runs in the emulated system, by its own run.py. What
it computes is compared with ONNX Runtime here, optimisations off, on the very model that was lowered: the largest
difference of an output over the largest number of that output. Times are paired with ONNX Runtime here, one thread,
and stand only for targets of this processor. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import metrics
import numpy as np

import graphopt
from graphopt import jobs, registry
from graphopt.bundle import read
from graphopt.errors import GraphoptError
from graphopt.executor import Session
from graphopt.timing import paired

MODELS = (
    "resnet20_cifar10", "resnet56_cifar10", "minilm_l6", "stories260k", "yunet_n_dynamic", "ultraface_rfb320",
    "dnsmos_sig_bak_ovr", "gtcrn",
)  # fmt: skip
TARGETS = ("tvm-cpu", "tvm-arm64", "cpu", "cpu-arm64", "android")
VERSIONS = {
    "float": ("fold", ""),
    "int8": ("fold", "quantize"),
    "pruned": ("fold,prune{macs=MACS}", ""),
    "pruned int8": ("fold,prune{macs=MACS}", "quantize"),
}
"""Passes that serve all targets alike, and those that follow for each target by its own rules."""

MACS = {"gtcrn": 0.88}
"""Share of the multiply-accumulates that pruning keeps, where .6 is not to be had."""

HEAD = "| model | version | target | difference | artefact, kB | over ORT float | over ORT, same file | built in, s |"


def shared_model(subject: metrics.Subject, passes: str, work: Path) -> Path:
    """What serves all targets, made once."""
    file = work / "shared" / f"{subject.file.stem}-{passes}.onnx"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _optimised(subject, subject.file, passes, "cpu").save(file)
    return file


def _optimised(subject: metrics.Subject, file: Path, passes: str, target: str) -> graphopt.Result:
    calls = list(metrics.limited(subject.calibration(), 64))
    return graphopt.optimize(file, passes, target=target, calib=lambda: calls, units=False, verify_each="structure")


def outputs(bundle: Path, feeds: metrics.Feeds, arm64: Path | None) -> metrics.Feeds | None:
    """What a bundle computes; None where nothing here executes it."""

    target = read(bundle).target
    if registry.backend(target.backend).unavailable(target) is None:
        return jobs.run(bundle, feeds)
    if arm64 is None or target.arch != "aarch64":
        return None
    given, found = bundle.parent / "x.npz", bundle.parent / "y.npz"
    np.savez(given, **feeds)  # type: ignore[arg-type]
    command = [str(arm64 / "python"), str(bundle / "run.py"), str(given), str(found)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with np.load(found) as stored:
        return dict(stored)


def difference(file: Path, feeds: metrics.Feeds, found: metrics.Feeds) -> float:
    """Largest of all outputs, relative to the largest number of each."""

    with Session(file) as session:
        wanted = session.run(feeds)
    return max(
        float(np.abs(found[name].astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-6))
        for name, want in wanted.items()
    )


def ratio(reference: Path, bundle: Path, feeds: metrics.Feeds, seconds: float) -> float | None:
    """Time of a bundle over that of a model in ONNX Runtime; None where the bundle does not run here."""

    found = read(bundle)
    backend = registry.backend(found.target.backend)
    if backend.unavailable(found.target) is not None:
        return None
    session = backend.open(found, threads=1)
    with Session(reference, optimize=True) as first:
        return paired([lambda: first.run(feeds), lambda: session.run(feeds)], seconds).ratios[1]


def row(name: str, version: str, target: str, given: argparse.Namespace) -> str:
    """One line of the table."""
    subject = metrics.subject(name)
    feeds = next(iter(subject.shapes.values()))
    shapes = {key: array.shape for key, array in feeds.items()}
    shared, own = VERSIONS[version]
    shared = shared.replace("MACS", str(MACS.get(name, 0.6)))
    file = shared_model(subject, shared, given.work)
    work = given.work / name / version.replace(" ", "-") / target
    work.mkdir(parents=True, exist_ok=True)
    head, start = f"| {name} | {version} | {target} |", time.monotonic()
    try:
        if own:
            made = _optimised(subject, file, own, target)
            file = work / "model.onnx"
            made.save(file)
        jobs.lower(file, target, work / "bundle", calib=lambda: [feeds], input_shape=shapes)
    except GraphoptError as error:
        return f"{head} refused: {' '.join(str(error).split())[:200]} | | | | |"
    took, bundle = time.monotonic() - start, work / "bundle"
    size = read(bundle).model.stat().st_size
    found = outputs(bundle, feeds, given.arm64)
    apart = "not run" if found is None else f"{difference(file, feeds, found):.1e}"
    times = [ratio(reference, bundle, feeds, given.seconds) for reference in (subject.file, file)]
    cells = [apart, f"{size / 1e3:.0f}", *("" if t is None else f"{t:.3f}" for t in times), f"{took:.0f}"]
    return f"{head} {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="stems of the files, separated by commas")
    parser.add_argument("--targets", default=",".join(TARGETS), help="separated by commas")
    parser.add_argument("--versions", default=",".join(VERSIONS), help="separated by commas")
    parser.add_argument("--arm64", type=Path, help="folder of the emulated system; without it such bundles do not run")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each ratio")
    parser.add_argument("--work", type=Path, default=Path("out/targets"), help="folder for models and bundles")
    parser.add_argument("--out", type=Path, help="file for the table; it is printed in any case")
    given = parser.parse_args()
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for name in given.models.split(","):
        for version in given.versions.split(","):
            for target in given.targets.split(","):
                try:
                    lines.append(row(name, version, target, given))
                except Exception as error:  # whatever is raised is the answer, and stands in the table
                    lines.append(
                        f"| {name} | {version} | {target} | {type(error).__name__}: {str(error)[:200]} | | | | |"
                    )
                print(lines[-1], flush=True)
                if given.out:
                    given.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    sys.exit(main())
