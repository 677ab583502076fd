"""Tables for the terminal, through rich; where the output is no terminal: plain aligned lines without colour or frames.

Text from models and data is never read as rich markup and never reaches the terminal with control characters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.base import Skip
from graphopt.delegates.text import as_text
from graphopt.report import summary, text
from graphopt.report.data import PassRecord, Report, Units

if TYPE_CHECKING:
    from graphopt.backend import BenchResult
    from graphopt.files.stored import Storage
    from graphopt.inspection import Inspection
    from graphopt.sparsity.verdicts import Eligibility
    from graphopt.verify import Comparison

TONES = {"good": "green", "bad": "bold red", "neutral": ""}
STATUS_TONES = {"applied": "green", "undone": "bold yellow", "not run": "yellow", "unchanged": "dim", "planned": "cyan"}
MOST_WEIGHTS = 24
"""Compressed weights that the terminal shows; `report.json` has all of them."""
PLAIN_WIDTH = 4000
"""Lines are not folded where no person reads them: a script that greps them wants whole rows."""

FACTS_WIDTH = 120
"""Lines of facts, which are prose, are folded for whoever reads them."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1; graphopt.shell knows better


def console(stream: IO[str]) -> Console:
    """A console that knows whether `stream` is a terminal; NO_COLOR and TERM=dumb are honoured by rich."""
    made = _Console(file=stream, highlight=False, markup=False, emoji=False)
    if made.is_terminal:
        return made
    return _Console(file=stream, highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH, color_system=None)


def print_report(out: Console, report: Report) -> None:
    """The whole report of a run: before and after, per pass, operators, what was skipped and why.

    `report.notes` are not printed: whoever ran the pipeline was told them as it began (`say` of `optimize`).
    """
    heading(out, f"{text.clean(report.model)} -> {text.clean(report.target)}: {summary.verdict(report)}")
    if report.dry_run:
        _print_plan(out, report)
        return
    print_rows(out, summary.rows(report))
    print_storage(out, report.storage)
    print_eligibility(out, report.sparsity, layers=False)
    print_passes(out, report.passes)
    print_ops(out, report)
    print_skips(out, report.passes)
    for note in summary.notes(report):
        out.print(Text(note))
    out.print(Text(f"took {text.duration(report.seconds)}", style="dim"))


def print_rows(out: Console, rows: Iterable[summary.Row]) -> None:
    """A before/after table."""
    found = grid(out, ["", ">before", ">after", ">change"])
    for row in rows:
        found.add_row(row.label, row.before, Text(row.after, TONES[row.tone]), Text(row.change, TONES[row.tone]))
    out.print(found)


def print_storage(out: Console, storage: Storage | None) -> None:
    """How compressed weights are stored: the largest ones, and all together."""
    if storage is None:
        return
    out.print(Text(text.clean(storage.summary(), 1000)))
    rows = summary.storage_rows(storage)
    if rows:
        print_mappings(out, rows[:MOST_WEIGHTS])
    if len(rows) > MOST_WEIGHTS:
        out.print(Text(f"and {len(rows) - MOST_WEIGHTS} smaller ones"))
    for note in storage.notes if rows else ():
        out.print(Text(text.clean(note, 1000)))


def print_eligibility(out: Console, found: Eligibility | None, *, layers: bool) -> None:
    """Which layers may run on kernels that skip zeros: all of them, or the reasons against with their layers."""
    if found is None:
        return
    out.print(Text(text.clean(found.summary(), 1000)))
    if layers:
        print_mappings(out, summary.eligibility_rows(found))
    else:
        against = [row for row in found.layers if row.verdict != "may"]
        for group in summary.group_skips(Skip(row.layer, f"{row.verdict}: {row.reason}") for row in against):
            out.print(Text(f"{len(group.nodes)} {text.clean(group.reason, 300)} ({text.names(group.nodes, 2)})"))
    for note in summary.eligibility_notes(found):
        out.print(Text(note))


def print_passes(out: Console, records: Sequence[PassRecord]) -> None:
    """One line a pass: what became of it, its effect on the counts, and how far the outputs moved."""
    if not records:
        return
    reasons = [_why(record) for record in records]
    columns = ["pass", "status", ">nodes", ">parameters", ">MACs", ">weights", "outputs", ">time"]
    found = grid(out, [*columns, "why"] if any(reasons) else columns)
    for record, why in zip(records, reasons, strict=True):
        cells: list[str] = [""] * 4
        if record.before is not None and record.after is not None:
            before, after = record.before, record.after
            cells = [
                _moved(before.nodes, after.nodes, text.count),
                _moved(before.parameters, after.parameters, text.short),
                _moved(before.macs, after.macs, text.short),
                _moved(before.bytes, after.bytes, text.size),
            ]
        found.add_row(
            text.clean(record.spec),
            Text(record.status, STATUS_TONES[record.status]),
            *cells,
            summary.pass_error(record),
            text.duration(record.seconds),
            *([why] if any(reasons) else []),
            style="dim" if record.status == "undone" else "",
        )
    out.print(found)


def print_ops(out: Console, report: Report) -> None:
    """The operators whose number changed."""
    rows = summary.op_rows(report.input, report.output, changed_only=True)
    if rows:
        found = grid(out, ["operator", ">before", ">after"])
        for op, before, after in rows:
            found.add_row(text.clean(op, 80), str(before), str(after))
        out.print(found)


def print_skips(out: Console, records: Iterable[PassRecord]) -> None:
    """What did not fire and why, one line a reason."""
    found = grid(out, ["skipped by", ">places", "why", "where"])
    for record in records:
        for group in summary.group_skips(record.skipped):
            places = str(len(group.nodes))
            found.add_row(record.name, places, text.clean(group.reason, 300), text.names(group.nodes, 2))
    if found.row_count:
        out.print(found)


def print_warnings(err: Console, warnings: Sequence[str]) -> None:
    """Warnings so that nobody misses them: framed on a terminal, one line each starting with 'warning: ' elsewhere."""
    if not warnings:
        return
    if err.is_terminal:
        from rich.panel import Panel

        lines = Text("\n").join(Text(text.clean(line, 1000)) for line in warnings)
        title = "warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
        err.print(Panel(lines, title=title, border_style="bold yellow", title_align="left"))
        return
    for line in warnings:
        err.print(Text(f"warning: {text.clean(line, 1000)}"), soft_wrap=True)


def print_units(out: Console, units: Units) -> None:
    """How much of a model can be pruned, and what keeps the rest."""
    if units.reason:
        out.print(Text(f"not analysed: {text.clean(units.reason, 1000)}"))
        return
    out.print(Text(f"{units.units:,} removable units, {units.exact:,} of them exact once zero"))
    reach = grid(out, ["", ">total", ">reachable", ">", ">exact", ">"])
    for name, total, reachable, exact in (
        ("parameters", units.parameters, units.prunable_parameters, units.exact_parameters),
        ("MACs", units.macs, units.prunable_macs, units.exact_macs),
    ):
        if total and reachable is not None and exact is not None:
            parts = [text.count(reachable), f"{reachable / total:.1%}", text.count(exact), f"{exact / total:.1%}"]
            reach.add_row(name, text.count(total), *parts)
    out.print(reach)
    if units.frozen:
        print_mappings(out, units.frozen)


def print_inspection(out: Console, name: str, found: Inspection, *, units: bool) -> None:
    """A model: counts, inputs and outputs, operators, what can be pruned."""
    heading(out, text.clean(name))
    counts = grid(out, ["", ">"])
    for row in summary.count_rows(found.stats, found.stats):
        counts.add_row(row.label, row.after)
    counts.add_row("opset", ", ".join(f"{text.clean(d)} {v}" for d, v in sorted(found.stats.opset.items())))
    out.print(counts)
    if found.stats.macs_unknown is not None:
        out.print(Text(f"MACs are unknown: {text.clean(found.stats.macs_unknown, 1000)}"))
    print_mappings(
        out,
        [
            {"": kind, "name": row["name"], "dtype": row["dtype"], "shape": _shape(row["shape"])}
            for kind, rows in (("input", found.inputs), ("output", found.outputs))
            for row in rows
        ],
    )
    by_count = sorted(found.stats.ops.items(), key=lambda item: (-item[1], item[0]))
    print_mappings(out, [{"operator": op, "nodes": number} for op, number in by_count])
    print_storage(out, found.storage)
    print_eligibility(out, found.sparsity, layers=True)
    for delegate in found.delegates:
        for line in as_text(delegate).splitlines():
            out.print(Text(text.clean(line, 1000)))
    print_units(out, found.units)
    if units:
        print_mappings(out, [group.to_row() for group in found.groups()])


def print_comparison(out: Console, found: Comparison, equal: bool) -> None:
    """How far two models are apart, output by output."""
    heading(
        out,
        f"{'the same' if equal else 'DIFFERENT'}: worst relative difference {found.worst_relative:.3g}, "
        f"cosine {found.cosine:.6f}, over {found.feeds} {'feed' if found.feeds == 1 else 'feeds'}",
    )
    print_mappings(
        out,
        [
            {
                "output": error.name,
                "relative L2": error.rel_l2,
                "cosine": f"{error.cosine:.6f}",
                "largest difference": error.max_abs,
                "SQNR dB": error.sqnr_db,
                "same top-1": "" if error.top1_agreement is None else f"{error.top1_agreement:.2%}",
            }
            for error in found.outputs
        ],
    )


def comparison_dict(found: Comparison, equal: bool) -> dict[str, Any]:
    """A comparison as plain data."""
    return {"equal": equal, "worst_relative": found.worst_relative, "cosine": found.cosine, **asdict(found)}


def print_bench(out: Console, models: Sequence[str], found: BenchResult) -> None:
    """Times of models that were run in turn."""
    rows = grid(out, ["model", ">median", ">ratio", ">quartiles"])
    for name, ms, ratio, low, high in _bench_rows(models, found):
        rows.add_row(text.clean(name), f"{ms:.3g} ms", text.ratio(ratio), f"{low:.3g}..{high:.3g}")
    out.print(rows)
    batch = "" if found.batch is None else f", batch {found.batch}"
    out.print(
        Text(
            f"{found.rounds} rounds, {found.threads} {'thread' if found.threads == 1 else 'threads'}{batch}",
            style="dim",
        )
    )
    if any(summary.unsteady(low, high) for low, high in zip(found.low, found.high, strict=True)):
        out.print(Text("unsteady timings: repeat on a quiet machine", style="dim"))
    for name, line in zip(models, found.details.get("runs", ()), strict=False):
        out.print(Text(f"{text.clean(name)} runs {line}", style="dim"))


def bench_dict(models: Sequence[str], found: BenchResult) -> dict[str, Any]:
    """Measured times as plain data."""
    rows = [
        {"model": name, "milliseconds": ms, "ratio": ratio, "low": low, "high": high}
        for name, ms, ratio, low, high in _bench_rows(models, found)
    ]
    return {
        "models": rows,
        "rounds": found.rounds,
        "threads": found.threads,
        "batch": found.batch,
        "details": found.details,
    }


def print_mappings(out: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Flat rows as a table; the columns are the keys of all rows in order of appearance."""
    columns = summary.columns(rows)
    found = grid(out, [f">{column.name}" if column.numeric else column.name for column in columns])
    for row in rows:
        found.add_row(*(text.cell(row.get(column.name)) for column in columns))
    out.print(found)


def print_facts(out: Console, facts: Mapping[str, Any]) -> None:
    """Keys and their values, whole: long ones go on below themselves. Those that say nothing are left out."""
    told = {key: value for key, value in facts.items() if value not in ("", (), [], None)}
    indent = max(map(len, told), default=0) + 2
    for key, value in told.items():
        whole = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        shown = text.clean(whole, PLAIN_WIDTH) if isinstance(whole, str) else text.cell(whole)
        width = max(min(out.width, FACTS_WIDTH) - indent, 20)
        lines = textwrap.wrap(shown, width, break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines or [""]):
            out.print(Text(f"{'' if number else key:<{indent}}{line}"), soft_wrap=True)


def heading(out: Console, line: str) -> None:
    """A line that stands out."""
    out.print(Text(line, style="bold"), soft_wrap=True)


def grid(out: Console, columns: Sequence[str]) -> Table:
    """An empty table; a column whose title starts with '>' is aligned right."""
    plain = not out.is_terminal
    made = Table(
        box=None if plain else box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2 if plain else 1, 0, 0),
        header_style="" if plain else "bold",
    )
    for title in columns:
        made.add_column(
            Text(text.clean(title.lstrip(">"))), justify="right" if title.startswith(">") else "left", overflow="fold"
        )
    return made


def _bench_rows(models: Sequence[str], found: BenchResult) -> list[tuple[str, float, float, float, float]]:
    return list(zip(models, found.milliseconds, found.ratios, found.low, found.high, strict=True))


def _shape(shape: Sequence[int | str | None] | None) -> str:
    return "unknown" if shape is None else f"[{', '.join('?' if s is None else str(s) for s in shape)}]"


def _why(record: PassRecord) -> str:
    """Why a pass has the status it has, or what of it could not be measured."""
    details = [gate.detail for gate in record.gates if gate.passed is None]
    return text.clean(record.reason or "; ".join(details), 400)


def _moved(before: int | None, after: int | None, show: Any) -> str:
    change = text.change(before, after)
    return f"{show(after)} ({change})" if change else str(show(after))


def _print_plan(out: Console, report: Report) -> None:
    print_rows(out, [row for row in summary.count_rows(report.input, report.input) if row.before])
    found = grid(out, ["pass", "effect", "status", "why"])
    for record in report.passes:
        found.add_row(text.clean(record.spec), record.effect, record.status, text.clean(record.reason or "", 400))
    out.print(found)
