"""Progress on stderr: one line that is redrawn on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import IO

from graphopt.report.text import clean


class LiveProgress:
    """A progress sink for people; see `graphopt.progress.Progress`.

    Args:
        stream: where to write; default stderr.
        every: seconds between plain lines about the same work.
    """

    def __init__(self, stream: IO[str] | None = None, every: float = 10.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._every = every
        self._what = ""
        self._last = 0.0
        self._width = 0

    def step(self, what: str, done: int, total: int | None = None) -> None:
        """Show that `done` of `total` steps of `what` are finished."""
        now = time.monotonic()
        pause = 0.1 if self._terminal else self._every
        if what == self._what and now - self._last < pause:
            return
        self._what, self._last = what, now
        counted = "" if total is None else f" {done}/{total}"
        line = f"{clean(what, 100)}{counted}"
        if self._terminal:
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.close()
        self._stream.write(f"{clean(line, 1000)}\n")
        self._stream.flush()

    def close(self) -> None:
        """Take the redrawn line away."""
        if self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._stream.flush()
            self._width = 0
