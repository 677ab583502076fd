"""`fold,quantize{scheme=auto}` on the shared models, one after the other: what it chooses, gains and loses, as a table.

    python tools/bench/auto.py --out auto.md
    python tools/bench/auto.py --models yunet_n_dynamic,stories260k --max-drop 0.001

Ratios are those of the report: the result over the model as it came, single thread, on the first calibration sample.
Those "over folded" are what the pass itself confirmed, on the shapes of the data. GRAPHOPT_DATA names the folder of the
data.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import metrics

HEAD = "| model | quantize | formats | ratio | over folded | cosine | metric | before | after | seconds |"

CONFIRMED = re.compile(r"([\d./]+) of the time of the model before the pass")
FORMATS = re.compile(r"(?:[\w-]+ for \d+(?: layers)?(?:, )?)+$")


class Steps:
    """Tells the error stream when a step begins."""

    def __init__(self, name: str) -> None:
        self.name, self.what, self.start = name, "", time.monotonic()

    def step(self, what: str, done: int, total: int | None = None) -> None:
        """See `graphopt.progress.Progress`."""
        if what != self.what:
            print(f"{self.name}: {time.monotonic() - self.start:.0f} s: {what}", file=sys.stderr, flush=True)
            self.what = what


def row(name: str, passes: str, max_drop: float | None, work: Path) -> tuple[str, list[str]]:
    """One line of the table, and what the pass has to say."""
    import graphopt

    subject = metrics.subject(name)
    calls = list(subject.calibration())
    start = time.monotonic()
    try:
        result = graphopt.optimize(
            subject.file, passes, target="cpu", calib=lambda: calls, max_drop=max_drop, units=False,
            progress=Steps(name),
        )  # fmt: skip
    except Exception as error:  # whatever is raised is the answer, and stands in the table
        return f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:160]} |" + " |" * 8, []
    seconds = time.monotonic() - start
    file = work / f"{name}.onnx"
    result.save(file)
    record, report = result.report.passes[-1], result.report
    confirmed = next((found[1] for note in record.notes if (found := CONFIRMED.match(note))), "")
    formats = next((note for note in record.notes if FORMATS.fullmatch(note)), "" if record.changed else "float")
    cells = [
        name, record.status, formats, _ratio(report.latency), confirmed,
        "" if report.fidelity is None or report.fidelity.cosine is None else f"{report.fidelity.cosine:.5f}",
        subject.metric, f"{subject.score(subject.file):.4f}", f"{subject.score(file):.4f}", f"{seconds:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |", [*report.warnings, *record.notes]


def _ratio(latency: Any) -> str:
    if latency is None or latency.ratio is None:
        return "" if latency is None else str(latency.reason)
    return f"{latency.ratio:.3f} ({latency.low:.2f}..{latency.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="stems of the files, separated by commas; default: all")
    parser.add_argument("--passes", default="fold,quantize{scheme=auto}", help="the pipeline")
    parser.add_argument("--max-drop", type=float, help="the gate on accuracy")
    parser.add_argument("--work", type=Path, default=Path("out/auto"), help="folder for the models made")
    parser.add_argument("--out", type=Path, help="file for the table; it is printed in any case")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    lines, said = [HEAD, "|---" * 10 + "|"], list[str]()
    for name in given.models.split(",") if given.models else metrics.names():
        line, notes = row(name, given.passes, given.max_drop, given.work)
        lines.append(line)
        said += ["", f"{name}:", "", *(f"- {note}" for note in notes)]
        print(line, flush=True)
        if given.out:
            given.out.write_text("\n".join([*lines, *said, ""]))


if __name__ == "__main__":
    main()
