"""Reports of delegates for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graphopt.delegates.report import Refused, Report

NAMED = 4
"""Names that a line shows before it says how many more there are."""


_SHAPE = re.compile(r"the shape of .+? is \[.*?\]")
"""Nodes whose shapes are open are told together, with the shape of the first."""


def as_text(found: Report) -> str:
    """A report as plain lines: what is taken, what is refused and why, what would help."""
    lines = [found.summary()]
    for number, part in enumerate(found.parts, 1):
        lines.append(f"  part {number}: {_nodes(len(part.nodes))}, {part.macs:.1%}: {_ends(part.nodes)}")
    if found.refused:
        lines.append("  refused:")
    rows: dict[tuple[str, ...], list[Refused]] = {}
    for refused in found.refused:
        key = (refused.op, *(_SHAPE.sub("a shape", reason) for reason in refused.reasons))
        rows.setdefault(key, []).append(refused)
    for alike in sorted(rows.values(), key=lambda row: -len(row)):
        first, nodes = alike[0], _some([refused.node for refused in alike])
        lines.append(f"    {len(alike)} {first.op} ({nodes}): {'; '.join(first.reasons)}")
    if found.changes:
        lines.append(f"  what would help (nodes taken, share of {found.measure}, parts):")
    for change in found.changes:
        lines.append(f"    {change.change}: {change.taken}, {change.macs:.1%}, {change.parts}")
    lines += [f"  note: {note}" for note in found.notes]
    lines += [f"  source ({found.date}): {source}" for source in found.sources]
    return "\n".join(lines) + "\n"


def _nodes(count: int) -> str:
    return f"{count} node{'' if count == 1 else 's'}"


def _ends(nodes: Sequence[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} to {nodes[-1]}"


def _some(nodes: Sequence[str]) -> str:
    shown = ", ".join(nodes[:NAMED])
    return shown if len(nodes) <= NAMED else f"{shown} and {len(nodes) - NAMED} more"
