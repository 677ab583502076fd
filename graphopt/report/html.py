"""The report as one HTML file that needs nothing else: no scripts, fonts or network; it opens from a mail or a phone.

All text is escaped by the template engine, and a Content-Security-Policy forbids scripts and external resources, so
that a model whose nodes are named like markup stays text.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from graphopt.errors import UsageError
from graphopt.report import summary, text
from graphopt.report.data import Report

MOST_ROWS = 300
"""Rows of a detail table that the page shows; report.json has all of them."""
MOST_NAMES = 60
"""Names of skipped nodes that the page shows for one reason."""


def render(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("graphopt.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ops = summary.op_rows(report.input, report.output, changed_only=False)
    return environment.get_template("report.html.j2").render(
        report=report,
        css=Markup(files("graphopt.report").joinpath("report.css").read_text(encoding="utf-8")),
        verdict=summary.verdict(report),
        rows=summary.rows(report),
        warnings=summary.warnings(report),
        notes=summary.notes(report),
        skips=[(r.name, summary.group_skips(r.skipped)) for r in report.passes if r.skipped],
        stored=[] if report.storage is None else summary.storage_rows(report.storage),
        eligible=[] if report.sparsity is None else summary.eligibility_rows(report.sparsity),
        eligible_notes=[] if report.sparsity is None else summary.eligibility_notes(report.sparsity),
        ops=ops,
        most_ops=max((max(before, after) for _, before, after in ops), default=1) or 1,
        most_rows=MOST_ROWS,
        most_names=MOST_NAMES,
        clean=text.clean,
        text=text,
        columns=summary.columns,
        cell=text.cell,
        pass_error=summary.pass_error,
    )


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page to a file.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        Path(path).write_text(render(report), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path), hint="choose another file") from error
