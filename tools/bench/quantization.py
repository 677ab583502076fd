"""Our quantisation beside that of onnxruntime.quantization and NNCF: quality, bytes and latency, as Markdown tables.

    python tools/bench/quantization.py --nncf-python VENV_WITH_NNCF/bin/python --out table.md
    python tools/bench/quantization.py --models resnet20_cifar10,minilm_l6 --schemes int8,auto --seconds 4

Every tool gets the same unlabelled samples. All files of a model are timed in one process with one thread,
interleaved in random order and its reverse; what counts are medians of the ratios to the model as it came, of the same
round. Files that take more than `--slow` times its time are timed with it alone, so that the others get their rounds.
NNCF has dependencies of its own and runs in its own environment; without `--nncf-python` it is left out. What a tool
refuses, and why, stands in its row. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import metrics
from metrics import Subject
from quantization_peers import Make, peers

OURS = {
    "int8": "fold,quantize",
    "int8-dynamic": "fold,quantize{scheme=int8-dynamic}",
    "int8-weights": "fold,quantize{scheme=int8-weights}",
    "int4-weights": "fold,quantize{scheme=int4-weights}",
    "auto": "fold,quantize{scheme=auto}",
}
"""Our schemes, as pipelines; more are given by `--passes`."""

TRANSFORMERS = ("minilm_l6", "stories260k", "stories260k_kv", "magika_v3_3")
"""Models of matrix products, for which weight-only schemes and those of MatMul alone are tried."""


def ours(subject: Subject, passes: str, source: Path, out: Path) -> None:
    """Run one of our pipelines."""
    import graphopt

    calls = list(subject.calibration())
    graphopt.optimize(source, passes, target="cpu", calib=lambda: calls, bench=False, units=False).save(out)


def runner(path: Path, feeds: metrics.Feeds) -> Callable[[], object]:
    """A call of the runtime, all of its optimisations on, one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def ratios(paths: list[Path], feeds: metrics.Feeds, seconds: float, slow: float) -> list[float]:
    """Time of each file over that of the first."""
    from graphopt.timing import paired

    calls = [runner(path, feeds) for path in paths]
    rough = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        rough.append(time.perf_counter() - start)
    fast = [i for i, t in enumerate(rough) if t <= slow * rough[0]]
    found = dict(zip(fast, paired([calls[i] for i in fast], seconds).ratios, strict=True))
    for i in range(len(calls)):
        if i not in found:
            found[i] = paired([calls[0], calls[i]], seconds / 8).ratios[1]
    return [found[i] for i in range(len(calls))]


def table(name: str, schemes: dict[str, str], nncf_python: Path | None, given: Any) -> list[str]:
    """The lines of one model's table."""
    subject = metrics.subject(name)
    made: dict[str, Make] = {f"`{passes}`": partial(ours, subject, passes) for passes in schemes.values()}
    if not given.no_peers:
        made |= peers(subject, name in TRANSFORMERS, nncf_python)
    files, refused = {"as it came": subject.file}, {}
    for scheme, make in made.items():
        out = given.work / f"{name}.{len(files) + len(refused)}.onnx"
        start = time.perf_counter()
        try:
            make(subject.file, out)
            runner(out, next(iter(subject.shapes.values())))()
            files[scheme] = out
        except Exception as error:  # whatever a tool raises is its answer, and stands in its row
            refused[scheme] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(f"{name}: {scheme}: {time.perf_counter() - start:.0f} s {refused.get(scheme, '')}", file=sys.stderr)
    paths = list(files.values())
    timed = [ratios(paths, feeds, given.seconds, given.slow) for feeds in subject.shapes.values()]
    lines = [
        f"| {name} | {subject.metric} | bytes | {' | '.join(subject.shapes)} |",
        "|---" * (3 + len(timed)) + "|",
    ]
    for (scheme, path), *each in zip(files.items(), *timed, strict=True):
        times = " | ".join(f"{ratio:.3f}" for ratio in each)
        lines.append(f"| {scheme} | {subject.score(path):.4f} | {path.stat().st_size} | {times} |")
    blank = " |" * (1 + len(timed))
    return [*lines, *(f"| {scheme} | refused: {reason} |{blank}" for scheme, reason in refused.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="stems of the files, separated by commas; default: all")
    parser.add_argument("--schemes", default=",".join(OURS), help=f"of ours: {', '.join(OURS)}")
    parser.add_argument("--passes", nargs="*", default=[], help="more pipelines of ours")
    parser.add_argument("--no-peers", action="store_true", help="our schemes only")
    parser.add_argument("--nncf-python", type=Path, help="interpreter of an environment with NNCF")
    parser.add_argument("--work", type=Path, default=Path("out/quantization"), help="folder for the models made")
    parser.add_argument("--out", type=Path, help="file for the tables; they are printed in any case")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measured rounds, for each model and shape")
    parser.add_argument("--slow", type=float, default=3.0, help="files slower than this are timed on their own")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    schemes = {name: OURS[name] for name in given.schemes.split(",") if name} | {p: p for p in given.passes}
    lines: list[str] = []
    for name in given.models.split(",") if given.models else metrics.names():
        found = table(name, schemes, given.nncf_python, given)
        print("\n".join(found), end="\n\n", flush=True)
        lines += [*found, ""]
        if given.out:
            given.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
