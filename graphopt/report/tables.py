"""Tables for the terminal, through rich; where the output is no terminal: plain aligned lines without colour or frames.

Text from models and data is never read as rich markup and never reaches the terminal with control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.report import summary, text
from graphopt.report.data import PassRecord, Report, Units

TONES = {"good": "green", "bad": "bold red", "neutral": ""}
STATUS_TONES = {"applied": "green", "undone": "bold yellow", "not run": "yellow", "unchanged": "dim", "planned": "cyan"}
PLAIN_WIDTH = 4000
"""Lines are not folded where no person reads them: a script that greps them wants whole rows."""


def console(stream: IO[str]) -> Console:
    """A console that knows whether `stream` is a terminal; NO_COLOR and TERM=dumb are honoured by rich."""
    made = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)
    return (
        made
        if made.is_terminal
        else Console(file=stream, highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH, color_system=None)
    )


def print_report(out: Console, report: Report) -> None:
    """The whole report of a run: before and after, per pass, operators, what was skipped and why."""
    heading(out, f"{text.clean(report.model)} -> {text.clean(report.target)}: {summary.verdict(report)}")
    if report.dry_run:
        _print_plan(out, report)
        return
    print_rows(out, summary.rows(report))
    print_passes(out, report.passes)
    print_ops(out, report)
    print_skips(out, report.passes)
    for note in report.notes:
        out.print(Text(text.clean(note, 1000)))
    out.print(Text(f"took {text.duration(report.seconds)}", style="dim"))


def print_rows(out: Console, rows: Iterable[summary.Row]) -> None:
    """A before/after table."""
    found = grid(out, ["", ">before", ">after", ">change"])
    for row in rows:
        found.add_row(row.label, row.before, Text(row.after, TONES[row.tone]), Text(row.change, TONES[row.tone]))
    out.print(found)


def print_passes(out: Console, records: Sequence[PassRecord]) -> None:
    """One line a pass: what became of it, its effect on the counts, and how far the outputs moved."""
    if not records:
        return
    found = grid(out, ["pass", "status", ">nodes", ">parameters", ">MACs", ">weights", "outputs", ">time", "why"])
    for record in records:
        cells: list[str] = [""] * 4
        if record.before is not None and record.after is not None:
            before, after = record.before, record.after
            cells = [
                _moved(before.nodes, after.nodes, text.count),
                _moved(before.parameters, after.parameters, text.short),
                _moved(before.macs, after.macs, text.short),
                _moved(before.bytes, after.bytes, text.size),
            ]
        why = [record.reason] if record.reason else [gate.detail for gate in record.gates if gate.passed is None]
        found.add_row(
            text.clean(record.spec),
            Text(record.status, STATUS_TONES[record.status]),
            *cells,
            summary.pass_error(record),
            text.duration(record.seconds),
            text.clean("; ".join(why), 400),
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
    share = units.prunable_parameters / units.parameters if units.parameters else 0.0
    out.print(
        Text(
            f"{units.units:,} removable units ({units.exact:,} exact once zero) reach "
            f"{text.count(units.prunable_parameters)} of {text.count(units.parameters)} parameters ({share:.1%})"
        )
    )
    if units.frozen:
        print_mappings(out, units.frozen)


def print_mappings(out: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Flat rows as a table; the columns are the keys of all rows in order of appearance."""
    columns = summary.columns(rows)
    found = grid(out, [f">{column.name}" if column.numeric else column.name for column in columns])
    for row in rows:
        found.add_row(*(text.cell(row.get(column.name)) for column in columns))
    out.print(found)


def heading(out: Console, line: str) -> None:
    """A line that stands out."""
    out.print(Text(line, style="bold"), soft_wrap=True)


def grid(out: Console, columns: Sequence[str]) -> Table:
    """An empty table; a column whose title starts with '>' is aligned right."""
    plain = not out.is_terminal
    made = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, header_style="" if plain else "bold")
    for title in columns:
        made.add_column(
            Text(text.clean(title.lstrip(">"))), justify="right" if title.startswith(">") else "left", overflow="fold"
        )
    return made


def _moved(before: int | None, after: int | None, show: Any) -> str:
    if before == after:
        return str(show(after))
    return f"{show(after)} ({text.change(before, after)})"


def _print_plan(out: Console, report: Report) -> None:
    print_rows(out, [row for row in summary.count_rows(report.input, report.input) if row.before])
    found = grid(out, ["pass", "effect", "status", "why"])
    for record in report.passes:
        found.add_row(text.clean(record.spec), record.effect, record.status, text.clean(record.reason or "", 400))
    out.print(found)
