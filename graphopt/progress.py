"""Progress of long work, as a sink that passes write to; the command line decides how it looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A sink for progress messages."""

    def step(self, what: str, done: int, total: int | None = None) -> None:
        """Tell that `done` of `total` steps of `what` are finished."""


class Silent:
    """Says nothing."""

    def step(self, what: str, done: int, total: int | None = None) -> None:
        """Ignore the step."""
