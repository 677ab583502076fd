"""What a report says in short: the rows, verdicts and groups that the tables and the HTML page both show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from graphopt.base import Skip
from graphopt.files.stored import Storage
from graphopt.report import text
from graphopt.report.data import Latency, PassRecord, Report, Stats
from graphopt.sparsity.verdicts import Eligibility

Tone = Literal["good", "bad", "neutral"]


@dataclass(frozen=True)
class Row:
    """One measure of the model before and after.

    Attributes:
        before, after: as shown.
        change: the relative change as shown; may be empty.
        tone: whether the change is what the user hoped for.
        bar: the two values to draw as bars, (before, after), where both are known and not negative.
    """

    label: str
    before: str
    after: str
    change: str = ""
    tone: Tone = "neutral"
    bar: tuple[float, float] | None = None


@dataclass
class SkipGroup:
    """Places with one reason in common."""

    reason: str
    nodes: list[str] = field(default_factory=list)


CELL = 60
"""Characters of a reason in a table: one long cell would make all its rows wide."""


@dataclass(frozen=True)
class Column:
    """A column of a table of flat rows."""

    name: str
    numeric: bool


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of flat rows: the keys of all of them, in order of appearance."""
    found = dict.fromkeys(key for row in rows for key in row)
    return [Column(name, all(_is_number(row.get(name, 0)) for row in rows)) for name in found]


def count_rows(before: Stats, after: Stats) -> list[Row]:
    """Size of the graph before and after: nodes, parameters, MACs, bytes; opset and IR version where they changed."""
    rows = [
        # More nodes are no loss in themselves: an int8 graph names its scales in nodes.
        replace(_lower_is_better("nodes", before.nodes, after.nodes, text.count), tone="neutral"),
        _lower_is_better("parameters", before.parameters, after.parameters, text.count),
        _lower_is_better("MACs", before.macs, after.macs, text.short),
        _lower_is_better("weights", before.bytes, after.bytes, text.size),
    ]
    for domain in sorted({*before.opset, *after.opset}):
        old, new = before.opset.get(domain), after.opset.get(domain)
        if old != new:
            name = text.clean(domain) or "ai.onnx"
            rows.append(Row(f"opset {name}", "-" if old is None else str(old), "-" if new is None else str(new)))
    if before.ir_version != after.ir_version:
        rows.append(Row("IR version", str(before.ir_version), str(after.ir_version)))
    return rows


def rows(report: Report) -> list[Row]:
    """Everything measured on the model before and after; what could not be measured says why."""
    found = count_rows(report.input, report.output)
    if report.storage is not None:
        found.append(_lower_is_better("stored weights", report.input.bytes, report.storage.after, text.size))
    latency, fidelity, accuracy = report.latency, report.fidelity, report.accuracy
    if latency is not None:
        found.append(_latency_row(latency))
    if fidelity is not None:
        if fidelity.cosine is None:
            found.append(Row("fidelity", "", "not measured", _in_a_row(fidelity.reason)))
        else:
            # The reference is compared with itself, so its cosine is 1 by definition.
            how = text.clean(fidelity.reason) if fidelity.reason else f"cosine, {text.clean(fidelity.data)} data"
            found.append(Row("fidelity", "1", f"{fidelity.cosine:.6f}", how))
    if accuracy is not None:
        tone: Tone = "neutral" if accuracy.drop == 0 else "bad" if accuracy.drop > 0 else "good"
        before, after = (text.score(accuracy.metric, value) for value in (accuracy.before, accuracy.after))
        moved = accuracy.after - accuracy.before
        points = f"{100 * moved:+.2f} points" if accuracy.metric in ("top1", "top5") else f"{moved:+.4g}"
        bar = (accuracy.before, accuracy.after) if min(accuracy.before, accuracy.after) >= 0 else None
        found.append(Row(text.clean(accuracy.metric), before, after, points if moved else "", tone, bar))
    return found


def notes(report: Report) -> list[str]:
    """What the rows cannot say: why something was not measured, or the multiply-accumulates are not known."""
    found = []
    if report.latency is not None and report.latency.ratio is None and not _in_a_row(report.latency.reason):
        found.append(("latency was not measured", report.latency.reason))
    if report.fidelity is not None and report.fidelity.cosine is None and not _in_a_row(report.fidelity.reason):
        found.append(("fidelity was not measured", report.fidelity.reason))
    if report.output.macs is None and report.output.macs_unknown is not None:
        found.append(("MACs are unknown", report.output.macs_unknown))
    elif report.input.macs is None and report.input.macs_unknown is not None:
        found.append(("MACs of the input model are unknown", report.input.macs_unknown))
    return [f"{what}: {text.clean(why, 1000)}" for what, why in found if why]


def _in_a_row(reason: str | None) -> str:
    """A reason that is short enough for a cell of a table; others are told below it (`notes`)."""
    return text.clean(reason) if reason and len(reason) <= CELL else ""


def verdict(report: Report) -> str:
    """One line: how much smaller, how much faster, at what price; or that the model is as it was."""
    if report.dry_run:
        return "planned, nothing was run"
    if not any(record.changed for record in report.passes):
        idle = all(record.status == "unchanged" for record in report.passes)
        return "nothing to do, the model is unchanged" if idle else "the model is unchanged"
    parts = []
    if report.input.bytes and text.moved(report.input.bytes, report.output.bytes):
        share = report.output.bytes / report.input.bytes
        digits = 0 if abs(1 - share) >= 0.01 else 1
        parts.append(f"{1 - share:.{digits}%} smaller" if share < 1 else f"{share - 1:.{digits}%} larger")
    if report.latency is not None and report.latency.ratio is not None:
        parts.append(_speed(report.latency.ratio, report.latency.low, report.latency.high))
    if report.accuracy is not None:
        metric = report.accuracy.metric
        before, after = (text.score(metric, v) for v in (report.accuracy.before, report.accuracy.after))
        parts.append(f"{text.clean(metric)} {before} -> {after}")
    elif report.fidelity is not None and report.fidelity.cosine is not None:
        parts.append(f"output fidelity {report.fidelity.cosine:.4f}")
    return ", ".join(parts) or "nothing changed"


_STEADY = 1.3
"""Quartiles of the ratio further apart than this factor: the machine was busy."""


def unsteady(low: float, high: float) -> bool:
    """Whether quartiles of a ratio are so far apart that one number would claim too much."""
    return high > _STEADY * low


def _speed(ratio: float, low: float | None, high: float | None) -> str:
    """Speed in words: what the quartiles of the paired ratios support."""
    low, high = low or ratio, high or ratio
    if low <= 1 <= high or round(ratio, 2) == 1:
        return "no faster"  # the quartiles embrace 1, or what was seen is too little to speak of
    if unsteady(low, high):
        between = f"{1 / high:.1f}x to {1 / low:.1f}x as fast" if high < 1 else f"{low:.1f}x to {high:.1f}x SLOWER"
        return f"{between} (unsteady timings: repeat on a quiet machine)"
    return f"{1 / ratio:.2f}x as fast" if ratio < 1 else f"{ratio:.2f}x SLOWER"


def op_rows(before: Stats, after: Stats, *, changed_only: bool) -> list[tuple[str, int, int]]:
    """Operators with their counts before and after, the largest change first."""
    found = [(op, before.ops.get(op, 0), after.ops.get(op, 0)) for op in {*before.ops, *after.ops}]
    if changed_only:
        found = [row for row in found if row[1] != row[2]]
    return sorted(found, key=lambda row: (-abs(row[1] - row[2]), -row[2], row[0]))


def storage_rows(storage: Storage) -> list[dict[str, Any]]:
    """Compressed weights, the largest first."""
    largest = sorted(storage.tensors, key=lambda tensor: (-tensor.before, tensor.name))
    return [
        {
            "weight": text.clean(tensor.name, 80),
            "type": tensor.dtype,
            "shape": "x".join(map(str, tensor.shape)),
            "stored as": tensor.form,
            "bytes": tensor.before,
            "stored bytes": tensor.after,
            "share": f"{tensor.share:.1%}",
            "of float16": f"{tensor.share_of_float16:.1%}",
        }
        for tensor in largest
    ]


def eligibility_rows(found: Eligibility) -> list[dict[str, Any]]:
    """What a target's kernels that skip zeros may execute, layer by layer."""
    return [
        {
            "layer": text.clean(row.layer, 80),
            "operator": row.op,
            "channels": "" if row.inputs is None else f"{row.inputs} -> {row.outputs}",
            "groups": row.groups,
            "type": row.type,
            "2:4": "yes" if row.sparse else "no",
            "sparse kernels": row.verdict,
            "why": text.clean(row.reason, 200),
        }
        for row in found.layers
    ]


def eligibility_notes(found: Eligibility) -> list[str]:
    """What else must hold, and where the rules were read that decided."""
    sources = sorted({f"{row.rule}: {row.source}" for row in found.layers if row.source})
    lines = [found.note] if any(row.verdict != "not" for row in found.layers) else []
    return [text.clean(line, 1000) for line in (*lines, *(f"source of {line}" for line in sources)) if line]


def pass_error(record: PassRecord) -> str:
    """How far the outputs moved in this pass, in a few words."""
    check = record.verification
    if check is None:
        return ""
    if not check.outputs:
        return text.clean(check.reason or "structure only")
    worst = max(check.outputs, key=lambda output: output.rel_l2)
    if record.effect == "exact":
        return f"equal ({worst.rel_l2:.1e})" if check.passed else f"DIFFERS ({worst.rel_l2:.1e})"
    return f"cosine {min(output.cosine for output in check.outputs):.4f}"


def group_skips(skips: Iterable[Skip]) -> list[SkipGroup]:
    """Skipped places by reason, the most frequent first."""
    groups: dict[str, SkipGroup] = {}
    for skip in skips:
        groups.setdefault(skip.reason, SkipGroup(skip.reason)).nodes.append(skip.node)
    return sorted(groups.values(), key=lambda group: (-len(group.nodes), group.reason))


def warnings(report: Report) -> list[str]:
    """Everything the user must not miss: of the run, of gates that undid a pass, and of the passes."""
    found = list(report.warnings)
    for record in report.passes:
        found += [
            f"{record.name}: {note.removeprefix('warning: ')}"
            for note in record.notes
            if note.startswith("warning: ") and not any(note.removeprefix("warning: ") in known for known in found)
        ]
    return found


def _lower_is_better(label: str, before: int | None, after: int | None, show: Callable[[int | None], str]) -> Row:
    shown = show(before), show(after)
    if before is None or after is None:
        return Row(label, *shown)
    tone: Tone = "neutral" if before == after else "good" if after < before else "bad"
    return Row(label, *shown, text.change(before, after), tone, (float(before), float(after)))


def _latency_row(latency: Latency) -> Row:
    if latency.ratio is None:
        return Row("latency", "", "not measured", _in_a_row(latency.reason))
    spread = "" if latency.low is None or latency.high is None else f" ({latency.low:.3g}..{latency.high:.3g})"
    low, high = latency.low or latency.ratio, latency.high or latency.ratio
    tone: Tone = "good" if high < 1 else "bad" if low > 1 else "neutral"
    times = ["" if ms is None else f"{ms:.3g} ms" for ms in (latency.input_ms, latency.output_ms)]
    bar = None
    if latency.input_ms is not None and latency.output_ms is not None:
        bar = (latency.input_ms, latency.output_ms)
    return Row("latency", times[0], times[1], f"{text.ratio(latency.ratio)}{spread}", tone, bar)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
