"""Delegates: which nodes of a model a phone's or board's accelerator takes, by tables of data, and what would help."""

from __future__ import annotations

from graphopt.delegates.report import Report, report
from graphopt.delegates.table import Delegate, Rule, delegate, delegates

__all__ = ["Delegate", "Report", "Rule", "delegate", "delegates", "report"]
