"""What a check finds: a rule, the nodes that break it, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt.rewriting.nodes import label

SHOWN = 4
"""Nodes that a sentence names; the manifest has all of them."""


@dataclass(frozen=True)
class Finding:
    """One rule and the nodes that break it in the same way.

    Attributes:
        rule: its name.
        severity: "error": TensorRT refuses the file or computes something else; "warning": it takes the file, and
            something about it is lost or was not seen to work.
        nodes: how messages name the nodes; for a rule about the file, its inputs or outputs.
        text: what is wrong, a sentence about them.
        hint: what to do, an imperative.
        source: where the rule was read.
    """

    rule: str
    severity: Literal["error", "warning"]
    nodes: tuple[str, ...]
    text: str
    hint: str
    source: str = ""

    def sentence(self) -> str:
        """The finding in one line."""
        more = len(self.nodes) - SHOWN
        named = ", ".join(self.nodes[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{named}: {self.text}; {self.hint}" if named else f"{self.text}; {self.hint}"


def error(rule: str, node: ir.Node | str, text: str, hint: str, source: str = "") -> Finding:
    """An error at one node."""
    return Finding(rule, "error", (_name(node),) if node else (), text, hint, source)


def warning(rule: str, node: ir.Node | str, text: str, hint: str, source: str = "") -> Finding:
    """A warning at one node."""
    return Finding(rule, "warning", (_name(node),) if node else (), text, hint, source)


def gathered(found: Iterable[Finding]) -> list[Finding]:
    """Findings that say the same of several nodes as one, errors first."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for one in found:
        groups.setdefault((one.severity, one.rule, one.text, one.hint), []).append(one)
    merged = [
        replace(group[0], nodes=tuple(dict.fromkeys(name for one in group for name in one.nodes)))
        for group in groups.values()
    ]
    return sorted(merged, key=lambda f: f.severity)


def _name(node: ir.Node | str) -> str:
    return node if isinstance(node, str) else label(node)
