"""What the measurements of all backends share: the inputs, and how times become a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.backend import BenchResult
from graphopt.errors import DataError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data.feeds import Array
    from graphopt.timing import Paired


def feeds_for(models: Sequence[ir.Model | Path], feeds: Mapping[str, Array] | None) -> dict[str, Array]:
    """What the models are timed on: the feeds, or random ones of the first model, batch 1, that all models take.

    Raises:
        DataError: there are no feeds, and the models have different inputs.
    """
    from graphopt.data.feeds import input_specs
    from graphopt.model import load
    from graphopt.verify import random_feeds

    if feeds is not None:
        return dict(feeds)
    loaded = [load(m, check_weights=False) if isinstance(m, Path) else m for m in models]
    wanted = [{s.name: s.dtype for s in input_specs(m) if s.required} for m in loaded]
    for other in wanted[1:]:
        if other != wanted[0]:
            raise DataError(
                "the models have different inputs, so they cannot be timed on the same data",
                where=", ".join(sorted(other)), hint="time them one by one",
            )  # fmt: skip
    return dict(random_feeds(loaded[0], 0, samples=1)[0])


def bench_result(found: Paired, feeds: Mapping[str, Array], *, threads: int, **details: Any) -> BenchResult:
    """Times as backends report them: with the sizes of the inputs, the machine, and the backend's own `details`."""
    from graphopt.bundle import describe_machine

    return BenchResult(
        milliseconds=found.milliseconds,
        ratios=found.ratios,
        low=found.low,
        high=found.high,
        rounds=found.rounds,
        threads=threads,
        batch=batch_of(feeds),
        details={
            **details,
            "within_noise": list(found.within_noise),
            "shapes": shapes_of(feeds),
            **describe_machine(),
        },
    )


def batch_of(feeds: Mapping[str, Array]) -> int | None:
    """Samples in one run: the common length of axis 0 of all inputs; None where there is none."""
    lengths = {array.shape[:1] for array in feeds.values()}
    length = lengths.pop() if len(lengths) == 1 else ()
    return int(length[0]) if length else None


def shapes_of(feeds: Mapping[str, Array]) -> dict[str, list[int]]:
    """Sizes of the inputs, for a report."""
    return {name: list(array.shape) for name, array in feeds.items()}
