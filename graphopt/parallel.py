"""Work dealt out to threads such that the result is the same bytes whatever their number.

Each piece of work is computed by one thread, its linear algebra on that thread alone (libraries split sums differently
for different numbers of threads, and pools of pools wait for each other), and results come in the order of the pieces.
Most of the time is spent in numpy and ONNX Runtime, which let other threads run meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Workers:
    """A pool of threads, to be used in a `with`; linear algebra has one thread as long as it lasts.

    Args:
        jobs: threads; with 1 everything runs where it is asked for.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._limit: Any = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        import numpy  # noqa: F401 - libraries that are loaded later are not limited
        from threadpoolctl import threadpool_limits

        self._limit = threadpool_limits(limits=1, user_api="blas")
        if self.jobs > 1:
            self._pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="graphopt")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._limit.restore_original_limits()

    def map(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
        """Results in order. At most `jobs` pieces are in work or waiting to be taken, so memory is bounded.

        Args:
            function: safe to run in several threads at once; must not use these workers itself.
            pieces: drawn in the calling thread.
        """
        if self._pool is None:
            yield from map(function, pieces)
            return
        waiting: deque[Future[Result]] = deque()
        for piece in pieces:
            waiting.append(self._pool.submit(function, piece))
            if len(waiting) > self.jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
