"""Python's cycle collector, asked seldom while graphs are rewritten.

A graph is millions of objects in cycles (nodes know their values, values their readers), all of them alive. By default
the collector looks through the young ones after every 700 new objects, and through all as often as they grow by a
quarter: a quarter of the time of a fold of 10,000 nodes, to find detached nodes. Weights do not wait for it: a value
that gets a new tensor lets go of the old one.
"""

from __future__ import annotations

import gc
import threading
from types import TracebackType

THRESHOLD = 100_000
"""New objects after which the collector looks through them."""


class _Seldom:
    """A block in which the collector runs seldom; blocks may be nested, also in threads: the last to end restores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = gc.get_threshold()
                # 0 switches it off, which stays as it is.
                if 0 < self._before[0] < THRESHOLD:
                    gc.set_threshold(THRESHOLD, *self._before[1:])
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                gc.set_threshold(*self._before)


seldom_collected = _Seldom()
"""`with seldom_collected: ...`"""
