"""Layers go back to float until a mixture of formats is accurate enough, those that disturb the outputs most first.

First those whose noise costs more than their time saves, whatever the bound on accuracy says
(`tradeoff`). Then as many more as the bound on accuracy asks for, which is measured as the gate
measures it: by the user's evaluation, or by the fidelity of the outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.progress import Progress
from graphopt.quantization.formats import Format
from graphopt.quantization.search.sensitivity import Reference, decibel, measure
from graphopt.quantization.search.tradeoff import Price, kept_in_float

Assignment = dict[str, Format]
Build = Callable[[Mapping[str, Format]], ir.Model]

SECONDS = 45.0
"""Time for measuring noise where nobody says otherwise; a third of it is for what goes back."""

MOST, LEAST = 128, 12
"""Measurements of layers alone, at most and at least; with more layers than that, neighbours are measured together."""

MOST_SETS, LEAST_SETS = 32, 6
"""Measurements of sets of layers that go back, at most and at least."""


@dataclass
class Repair:
    """What came of a mixture.

    Attributes:
        assignment: the mixture without what went back to float.
        returned: what went back, the worst first.
        noise: noise-to-signal power at the outputs of each quantised layer alone.
        before, after: noise of all of them, with those that dominate and without them.
        drop: what was measured last; None where it cannot be measured.
        samples: of the calibration data that noise was measured on.
    """

    assignment: Assignment
    returned: list[str] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    drop: float | None = None
    samples: int = 0

    @property
    def told(self) -> str:
        """A sentence for the report."""
        on = f"on {self.samples} calibration samples"
        text = f"signal to noise of the worst output {on}: {decibel(self.before):.1f} dB"
        if self.returned:
            text += f"; with {len(self.returned)} layers back in float: {decibel(self.after):.1f} dB"
        return text


def repair(
    assignment: Mapping[str, Format],
    build: Build,
    reference: Reference,
    work: Mapping[str, float],
    speedup: float,
    drop: Callable[[ir.Model], float | None],
    limit: float,
    progress: Progress,
    seconds: float = SECONDS,
) -> Repair:
    """Bring a mixture within a bound on accuracy.

    Args:
        assignment: the format of each layer.
        build: makes the model of a mixture.
        reference: the outputs in float.
        work: of each layer, in any unit.
        speedup: how many times as long the model takes in float.
        drop: how much worse a model is; None where nothing can be measured.
        limit: the largest drop.
        progress: told of every step.
        seconds: time for measuring noise, as far as the fewest measurements allow.
    """
    quantised = [key for key, format in assignment.items() if format != "float"]

    def without(left_out: Sequence[str]) -> dict[str, Format]:
        gone = set(left_out)
        return {key: "float" if key in gone else format for key, format in assignment.items()}

    def alone(keys: Sequence[str]) -> ir.Model:
        kept = set(keys)
        return build({key: format if key in kept else "float" for key, format in assignment.items()})

    start = time.perf_counter()
    whole = build(assignment)
    found = Repair(dict(assignment), before=reference.noise(whole), samples=reference.samples)
    runs = seconds / max(time.perf_counter() - start, 1e-3)
    found.noise = measure(reference, quantised, alone, progress, most=int(min(MOST, max(LEAST, runs * 2 / 3))))
    found.returned = kept_in_float(
        found.noise, {key: work.get(key, 0.0) for key in quantised}, found.before,
        lambda keys: reference.noise(build(without(keys))), Price(speedup=max(speedup, 1.0)),
        runs=int(min(MOST_SETS, max(LEAST_SETS, runs / 3))),
    )  # fmt: skip
    found.drop = drop(build(without(found.returned)) if found.returned else whole)
    if found.drop is not None and not found.drop <= limit:
        rest = sorted(set(quantised) - set(found.returned), key=lambda key: (-found.noise[key], quantised.index(key)))
        order = found.returned + rest
        count, found.drop = _fewest(lambda n: drop(build(without(order[:n]))), len(found.returned), len(order), limit)
        found.returned = order[:count]
    found.assignment = without(found.returned)
    found.after = reference.noise(build(found.assignment)) if found.returned else found.before
    return found


def _fewest(drop: Callable[[int], float | None], low: int, high: int, limit: float) -> tuple[int, float | None]:
    """The fewest layers, more than `low`, without which the drop is within the limit; `high` is all of them."""
    step, best = 1, (high, 0.0)
    measured: float | None
    while low + step < high:
        measured = drop(low + step)
        if measured is not None and measured <= limit:
            best = (low + step, measured)
            break
        low, step = low + step, 2 * step
    while best[0] - low > 1:
        middle = (low + best[0]) // 2
        measured = drop(middle)
        if measured is not None and measured <= limit:
            best = (middle, measured)
        else:
            low = middle
    return best
