"""Times of whole models on the target, on the shapes that the calibration data has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from graphopt import registry
from graphopt.errors import UsageError
from graphopt.model import weight_bytes
from graphopt.quantization.search.choice import Mixture, Ratio

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import BenchResult
    from graphopt.calibration import Calibration
    from graphopt.data.feeds import Call
    from graphopt.target import Target

LOOKED_AT = 256
"""Samples whose shapes are looked at."""

APART = 1.5
"""Samples whose inputs differ by less than this factor in size are timed as one shape."""

TOGETHER = 6
"""Models timed at once, beside the one they are compared with."""

MEMORY = 1 << 31
"""Bytes of weights that these hold together; of larger models fewer are timed at once, down to one."""

SECONDS = 0.1
"""Measured time of each model; the rounds at least that `graphopt.timing` demands, whatever they take."""


def shapes(calibration: Calibration, batch: int = 1) -> list[Call]:
    """Calls whose sizes stand for the data: a short one and a long one, or one where all are alike.

    Short and long are the 5th and the 95th percentile of the number of elements of all inputs: the very extremes of a
    large data set are seen by nobody.

    Args:
        calibration: the data.
        batch: samples of a call.

    Raises:
        UsageError: neither the model nor the data says how so many samples make one call.
    """
    calls = calibration.counted(batch_size=batch, limit=max(LOOKED_AT, batch))
    found = sorted((call for call, count in calls if batch in (1, count)), key=_elements)
    if not found:
        raise UsageError(
            f"no call of the calibration data holds {batch} samples", where="quantize.batch",
            hint="give data as arrays of at least so many samples, and a model whose batch size is free",
        )  # fmt: skip
    short, long = found[round(0.05 * (len(found) - 1))], found[round(0.95 * (len(found) - 1))]
    return [short, long] if _elements(long) > APART * _elements(short) else [found[len(found) // 2]]


def described(feeds: Call) -> str:
    """`input_ids [1,16]`: the largest input and its shape."""
    name, array = max(feeds.items(), key=lambda item: item[1].size)
    return f"{name} [{','.join(map(str, array.shape))}]"


def ratios(models: Sequence[ir.Model], target: Target, feeds: Sequence[Call], seconds: float) -> list[Ratio]:
    """Times of models over that of the first, which is not among the results; one thread, interleaved.

    Args:
        models: two or more.
        target: one that runs here.
        feeds: one sample of each shape.
        seconds: measured time of each model on each shape.

    Raises:
        MissingBackendError: the target cannot run here.
        ModelError: the runtime refuses a model.
    """
    backend = registry.backend(target.backend)
    runs = [backend.bench(models, target, each, threads=1, seconds=seconds * len(models)) for each in feeds]
    return [_ratio(runs, index) for index in range(1, len(models))]


def run_seconds(model: ir.Model, target: Target, feeds: Sequence[Call]) -> float:
    """Roughly what one run takes on all shapes together, in seconds; raises what `ratios` raises."""
    backend = registry.backend(target.backend)
    return sum(backend.bench([model], target, each, threads=1, seconds=0).milliseconds[0] for each in feeds) / 1e3


def comparer(
    build: Callable[[Mixture], ir.Model], target: Target, feeds: Sequence[Call], progress: Callable[[int], None]
) -> Callable[[Mixture, Sequence[Mixture]], list[Ratio]]:
    """What `graphopt.quantization.choice.search` times mixtures with; see `ratios` for what it raises.

    Args:
        build: makes the model of a mixture.
        target: one that runs here.
        feeds: one sample of each shape.
        progress: told how many models were timed.
    """
    timed = 0

    def compare(first: Mixture, others: Sequence[Mixture]) -> list[Ratio]:
        nonlocal timed
        reference = build(first)
        together = max(1, min(TOGETHER, MEMORY // max(1, weight_bytes(reference)) - 1))
        found: list[Ratio] = []
        for start in range(0, len(others), together):
            part = others[start : start + together]
            found += ratios([reference, *map(build, part)], target, feeds, SECONDS)
            timed += len(part)
            progress(timed)
        return found

    return compare


def _ratio(runs: Sequence[BenchResult], index: int) -> Ratio:
    # The interval of a median: 1.57 IQR / sqrt(rounds) on either side (McGill, Tukey and Larsen 1978).
    margins = [1.57 * (run.high[index] - run.low[index]) / run.rounds**0.5 for run in runs]
    values = [run.ratios[index] for run in runs]
    return Ratio(
        tuple(values),
        tuple(max(value - margin, 1e-6) for value, margin in zip(values, margins, strict=True)),
        tuple(value + margin for value, margin in zip(values, margins, strict=True)),
    )


def _elements(feeds: Call) -> int:
    return sum(int(array.size) for array in feeds.values())
