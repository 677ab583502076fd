"""Measure what a table of latencies lacks: small batches of one-layer models, each in turn with the reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphopt import registry
from graphopt.errors import MissingBackendError
from graphopt.latency.micro import copies, micro
from graphopt.latency.precision import as_int8
from graphopt.latency.shapes import LayerShape
from graphopt.latency.table import LatencyTable, Point, cache_path, load, machine_of
from graphopt.progress import Progress, Silent
from graphopt.target import Target
from graphopt.timing import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

Feeds = Mapping[str, npt.NDArray[Any]]

BATCH = 12
"""Layers measured in turn with each other."""

SECONDS = 0.8
"""Measured time of a batch."""

WHOLE_SECONDS = 4.0
"""Time to measure whole models for."""

REFERENCE = LayerShape("Conv", "float32", (1, 16, 16), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), activation="Relu")
REFERENCE_WIDTHS = (64, 64)
REFERENCE_COPIES = 4
"""Some tenths of a millisecond of ordinary work."""


def table_of(target: Target, threads: int = 1) -> tuple[LatencyTable, Path]:
    """The table of this machine for a target, empty where nothing was measured yet, and its file.

    Raises:
        DataError: the file is damaged.
    """
    machine = machine_of(target, threads)
    path = cache_path(machine)
    return (load(path) if path.is_file() else LatencyTable(machine)), path


def fill(
    table: LatencyTable,
    points: Sequence[Point],
    target: Target,
    *,
    threads: int = 1,
    path: Path | None = None,
    progress: Progress | None = None,
) -> int:
    """Measure the points that a table lacks.

    Args:
        table: gets them.
        points: layers and widths.
        target: where they run.
        threads: of one session.
        path: file to keep the table in; written after every few batches, so that an interruption costs little.
        progress: told of every batch.

    Returns:
        How many were measured.

    Raises:
        MissingBackendError: the target cannot run here.
    """
    missing = table.missing(points)
    reporter = progress or Silent()
    for start in range(0, len(missing), BATCH):
        reporter.step("measuring layers", start, len(missing))
        part = missing[start : start + BATCH]
        table.add(_measure(table, part, target, threads))
        if path is not None and (start // BATCH % 8 == 7 or start + BATCH >= len(missing)):
            table.save(path)
    return len(missing)


def model_times(models: Sequence[ir.Model], target: Target, feeds: Feeds, threads: int = 1) -> list[float]:
    """Times of whole models in multiples of the reference's, measured in turn.

    Raises:
        MissingBackendError: the target cannot run here.
    """
    with ExitStack() as stack:
        calls = [_call(stack, _reference(), target, threads, None)]
        calls += [_call(stack, model, target, threads, feeds) for model in models]
        reference, *times = undisturbed(calls, WHOLE_SECONDS, warm=True)
    return [time / reference for time in times]


def _measure(table: LatencyTable, points: Sequence[Point], target: Target, threads: int) -> dict[Point, float]:
    with ExitStack() as stack:
        calls = [_call(stack, _reference(), target, threads, None)]
        for shape, widths in points:
            for count in (1, 1 + copies(shape, widths)):
                model = micro(shape, widths, count)
                model = as_int8(model, target) if shape.precision == "int8" else model
                calls.append(_call(stack, model, target, threads, None))
        reference, *times = undisturbed(calls, SECONDS)
    table.reference_ms = table.reference_ms or 1e3 * reference
    return {
        (shape, widths): max(0.0, many - one) / copies(shape, widths) / reference
        for (shape, widths), one, many in zip(points, times[::2], times[1::2], strict=True)
    }


def _reference() -> ir.Model:
    return micro(REFERENCE, REFERENCE_WIDTHS, REFERENCE_COPIES)


def _call(stack: ExitStack, model: ir.Model, target: Target, threads: int, feeds: Feeds | None) -> Callable[[], object]:
    """A run of a model on the target; closed with the stack."""
    backend = registry.backend(target.backend)
    reason = backend.unavailable(target)
    if reason is not None:
        raise MissingBackendError(
            reason,
            where=f"latency on target {target.name!r}",
            hint="measure there (graphopt bench --table MODEL --json > FILE) and give table=FILE",
        )
    session = backend.session(model, target, threads=threads)
    close = getattr(session, "close", None)
    if close is not None:
        stack.callback(close)
    given = dict(feeds) if feeds is not None else _random(model)
    return lambda: session.run(given)


def _random(model: ir.Model) -> dict[str, npt.NDArray[Any]]:
    random = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        feeds[value.name] = random.normal(size=value.shape.numpy()).astype(value.dtype.numpy())
    return feeds
