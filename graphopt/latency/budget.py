"""A budget of latency: what the dense model takes, the terms that the solver spends, and the time of a candidate.

The ratio is time of the candidate over time of the model as it is given, one sample a run. With `integer` the candidate
is timed as int8 and the model still as it is given: the ratio is that of the whole way to an int8 model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.units import Coupling
from graphopt.errors import UsageError
from graphopt.latency.measure import fill, model_times, table_of
from graphopt.latency.passing import passing
from graphopt.latency.precision import as_int8
from graphopt.latency.shapes import sites
from graphopt.latency.table import LatencyTable, load
from graphopt.latency.terms import latency_terms, points_of
from graphopt.progress import Progress
from graphopt.pruning.selection import Term
from graphopt.pruning.work import sized
from graphopt.target import Target

Feeds = Mapping[str, npt.NDArray[Any]]
T = TypeVar("T")

TOLERANCE = 0.01
"""Part of a ratio by which a measured one may miss it: no measurement here is better than that."""

SLACK = 0.03
"""Part of a ratio that may be left unspent without another round."""

ROUNDS = 8
"""Corrections at most."""

NARROW = 0.004
"""Fractions so close need no further round."""


@dataclass
class LatencyBudget:
    """Latency of one model on one target.

    Attributes:
        terms: work that adds up to `after`, in multiples of the reference's time.
        before: time of the model as it is given, in the same unit.
        after: its time in the format it will be deployed in.
        measured: how many layers had to be measured.
        source: where the table came from.
    """

    terms: list[Term]
    before: float
    after: float
    measured: int
    source: Path
    _model: ir.Model
    _feeds: Feeds
    _target: Target
    _integer: bool
    _here: bool

    @classmethod
    def of(
        cls,
        model: ir.Model,
        coupling: Coupling,
        feeds: Feeds,
        target: Target,
        *,
        integer: bool,
        multiple: int,
        table: str | None,
        progress: Progress,
        given: ir.Model | None = None,
    ) -> LatencyBudget:
        """Measure what is missing.

        Args:
            model: dense; not changed.
            coupling: its analysis.
            feeds: one sample.
            target: where it will run; it must be able to run here, unless a table is given.
            integer: deployed as int8.
            multiple: of widths.
            table: file of a table that was measured elsewhere; nothing is measured then.
            progress: told of every batch.
            given: the model whose time counts as 1, where it is written in another form; None: `model`.

        Raises:
            UsageError: a given table lacks layers, or no layer has known sizes.
            DataError: a table is damaged.
            MissingBackendError: the target cannot run here.
        """
        known = sized(model, feeds)
        found = list(sites(known, coupling, integer=integer))
        if not found:
            raise UsageError(
                "no layer with known sizes, so there is nothing to time",
                where="prune.latency",
                hint="fix sizes with --dim NAME=SIZE, or take another budget",
            )
        points = points_of(found, multiple)
        first = known if given is None else sized(given, feeds)
        copy = known if not integer else as_int8(known, target)
        if table is not None:
            times = load(Path(table))
            _check_complete(times, points, table)
            before = sum(times.time(s.shape, s.widths) for s in sites(known, coupling))
            after = sum(times.time(s.shape, s.widths) for s in found)
            return cls(
                latency_terms(times, found, after, []),
                before,
                after,
                0,
                Path(table),
                known,
                feeds,
                target,
                integer,
                False,
            )
        times, path = table_of(target)
        measured = fill(times, points, target, path=path, progress=progress)
        before, after = model_times([first, copy], target, feeds)
        others = passing(known, coupling, {site.key for site in found})
        return cls(
            latency_terms(times, found, after, others),
            before,
            after,
            measured,
            path,
            first,
            feeds,
            target,
            integer,
            True,
        )

    def keep(self, ratio: float) -> float:
        """The fraction of the terms that may stay for a ratio."""
        return ratio * self.before / self.after

    def ratio(self, candidate: ir.Model) -> float | None:
        """Measured time of a candidate, as it will be deployed, over that of the model; None where it cannot run."""
        if not self._here:
            return None
        copy = sized(candidate, self._feeds)
        copy = as_int8(copy, self._target) if self._integer else copy
        before, after = model_times([self._model, copy], self._target, self._feeds)
        return after / before

    def settle(self, ratio: float, choose: Callable[[float], T], build: Callable[[T], ir.Model]) -> Settled[T]:
        """Choose, measure what was chosen, and correct the budget by what the table did not foresee.

        Args:
            ratio: what the candidate may take.
            choose: a choice that keeps this fraction of the terms.
            build: the model of a choice; its weights do not matter.

        Returns:
            The slowest candidate within the budget that was found, or the fastest of all if none is.
        """
        keep = min(1.0, self.keep(ratio))
        limit = ratio * (1 + TOLERANCE)
        best: Settled[T] | None = None
        # (keep, measured): the most that met the limit, the least that missed it
        within, beyond = (0.0, 0.0), (1.0, self.after / self.before)
        for _ in range(ROUNDS):
            choice = choose(keep)
            measured = self.ratio(build(choice))
            if measured is None:
                return Settled(choice, None, keep)
            found = Settled(choice, measured, keep)
            if best is None or _better(measured, best.ratio or 0.0, limit):
                best = found
            if ratio * (1 - SLACK) <= measured <= limit or (keep >= 1.0 and measured <= limit):
                break
            if measured <= limit:
                within = max(within, (keep, measured))
            else:
                beyond = min(beyond, (keep, measured))
            keep = _between(within, beyond, keep * ratio / measured, ratio)
            if beyond[0] - within[0] < NARROW or not within[0] < keep < beyond[0]:
                break
        assert best is not None
        return best


@dataclass(frozen=True)
class Settled(Generic[T]):
    """What `LatencyBudget.settle` found.

    Attributes:
        choice: the choice.
        ratio: measured for its model; None where the target is not here.
        keep: fraction of the terms it was allowed.
    """

    choice: T
    ratio: float | None
    keep: float

    def within(self, asked: float) -> bool:
        """True where the measured ratio meets what was asked."""
        return self.ratio is not None and self.ratio <= asked * (1 + TOLERANCE)

    def note(self, asked: float, *, integer: bool) -> str:
        """The measured time, and where it misses the budget, by how much."""
        if self.ratio is None:
            return "warning: the target cannot run here, so the time was taken from the table alone"
        how = "as int8 " if integer else ""
        text = f"the result {how}takes {self.ratio:.3f} of the time of this pass's input, measured at batch 1"
        if self.within(asked):
            return text
        return f"warning: {text}: {self.ratio - asked:.3f} above the budget, which no choice of units met"


def _between(within: tuple[float, float], beyond: tuple[float, float], guess: float, ratio: float) -> float:
    """The next fraction to try: in proportion while one side is unknown, else where the line between both meets."""
    (low, fast), (high, slow) = within, beyond
    if low < guess < high and not (low and high < 1.0):
        return round(guess, 4)
    if slow <= fast:
        return round((low + high) / 2, 4)
    share = (ratio - fast) / (slow - fast)
    return round(low + min(0.8, max(0.2, share)) * (high - low), 4)


def _better(one: float, other: float, limit: float) -> bool:
    """Within the limit the slower is better: it keeps more; beyond it the faster."""
    if (one <= limit) != (other <= limit):
        return one <= limit
    return one > other if one <= limit else one < other


def _check_complete(table: LatencyTable, points: list[Any], name: str) -> None:
    lacking = table.missing(points)
    if lacking:
        shape, widths = lacking[0]
        raise UsageError(
            f"lacks {len(lacking)} of {len(points)} entries, the first: {shape}, {'x'.join(map(str, widths))}",
            where=f"table {name}",
            hint="measure this model on the device: graphopt bench --table MODEL --json > FILE",
        )
