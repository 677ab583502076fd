"""What the gates and the report measure of a model beside the input model: latency, fidelity, accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from graphopt.base import Context
from graphopt.errors import GraphoptError
from graphopt.report.data import Fidelity, Latency, OutputRecord

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data.feeds import Array
    from graphopt.verify import Comparison

FIDELITY_SAMPLES = 512
"""Calibration samples that fidelity is measured on: the standard error of a mean cosine is far below 0.1 % by then."""

BENCH_WEIGHTS_LIMIT = 1 << 29
"""Models with more bytes of weights than this are timed only when a gate asks: loading them takes time and memory."""


class Measures:
    """Measurements against one input model, made when first asked for and remembered for the last candidate.

    Args:
        model: the input model; not changed.
        ctx: target, calibration data, evaluation and seed.
        seconds: time to spend on one latency ratio.
        threads: threads of one session.
    """

    def __init__(self, model: ir.Model, ctx: Context, *, seconds: float = 1.0, threads: int = 1) -> None:
        self.model = model
        self.ctx = ctx
        self.seconds = seconds
        self.threads = threads
        self._latency: tuple[ir.Model, Latency] | None = None
        self._fidelity: tuple[ir.Model, Fidelity] | None = None
        self._accuracy: tuple[ir.Model, float] | None = None
        self._baseline: float | None = None

    def latency(self, candidate: ir.Model, *, seconds: float | None = None) -> Latency:
        """Time of the candidate over time of the input model on the target.

        Args:
            candidate: what to time.
            seconds: measure anew for this long; None: take what is known, or measure for the usual time.
        """
        if seconds is None and self._latency is not None and self._latency[0] is candidate:
            return self._latency[1]
        found = paired_latency(self.model, candidate, self.ctx, seconds or self.seconds, self.threads)
        self._latency = (candidate, found)
        return found

    def known_latency(self, candidate: ir.Model) -> Latency | None:
        """The latency of the candidate where it was measured already."""
        return self._latency[1] if self._latency is not None and self._latency[0] is candidate else None

    def fidelity(self, candidate: ir.Model) -> Fidelity:
        """Mean cosine per sample between the outputs of the candidate and of the input model."""
        if self._fidelity is None or self._fidelity[0] is not candidate:
            self._fidelity = (candidate, self._measure_fidelity(candidate))
        return self._fidelity[1]

    def accuracy(self, candidate: ir.Model) -> float:
        """The user's score of the candidate.

        Raises:
            UsageError: there is no evaluation.
        """
        if self._accuracy is None or self._accuracy[0] is not candidate:
            self._accuracy = (candidate, self._score(candidate))
        return self._accuracy[1]

    def baseline(self) -> float:
        """The user's score of the input model."""
        if self._baseline is None:
            self._baseline = self._score(self.model)
        return self._baseline

    def accuracy_drop(self, candidate: ir.Model) -> float:
        """How much worse the candidate scores than the input model; negative where it is better.

        In the unit of the metric for scores (0.01 of top1 is one point); relative to the input model's for errors such
        as mse, whose unit is that of the outputs squared and says nothing by itself.
        """
        assert self.ctx.evaluation is not None, "callers ask only where there is an evaluation"
        before, after = self.baseline(), self.accuracy(candidate)
        if self.ctx.evaluation.higher_is_better:
            return before - after
        if before == 0:
            return 0.0 if after == 0 else math.inf
        return (after - before) / abs(before)

    def drop(self, candidate: ir.Model) -> float | None:
        """How much worse the candidate is, as the gate on accuracy sees it; None where nothing can be measured.

        By the user's evaluation where there is one (`accuracy_drop`), else 1 - fidelity on the calibration data.
        """
        if self.ctx.evaluation is not None:
            return self.accuracy_drop(candidate)
        cosine = self.fidelity(candidate).cosine if self.ctx.calibration is not None else None
        return None if cosine is None else 1 - cosine

    def _score(self, model: ir.Model) -> float:
        assert self.ctx.evaluation is not None, "callers ask only where there is an evaluation"
        return self.ctx.evaluation.score(model)

    def _measure_fidelity(self, candidate: ir.Model) -> Fidelity:
        from graphopt import verify

        if self.ctx.calibration is not None:
            data = "calibration"
            feeds: Iterable[Mapping[str, Array]] = self.ctx.calibration.batches(limit=FIDELITY_SAMPLES)
        else:
            data, feeds = "random", verify.random_feeds(self.model, self.ctx.seed)
        try:
            comparison = verify.compare(self.model, candidate, feeds)
        except GraphoptError as error:
            return Fidelity(None, data, reason=str(error))
        return Fidelity(comparison.cosine, data, output_records(comparison))


def paired_latency(reference: ir.Model, candidate: ir.Model, ctx: Context, seconds: float, threads: int = 1) -> Latency:
    """Time of `candidate` over time of `reference`; where it cannot be measured, `reason` says why."""
    from graphopt import registry

    try:
        backend = registry.backend(ctx.target.backend)
        reason = backend.unavailable(ctx.target)
        if reason is not None:
            return Latency(None, reason=f"target {ctx.target.name!r} cannot run here: {reason}")
        feeds = None
        if ctx.calibration is not None:
            feeds = next(iter(ctx.calibration.batches(batch_size=1, limit=1)), None)
        found = backend.bench([reference, candidate], ctx.target, feeds, threads=threads, seconds=seconds)
    except GraphoptError as error:
        return Latency(None, reason=str(error))
    return Latency(
        ratio=found.ratios[1],
        low=found.low[1],
        high=found.high[1],
        input_ms=found.milliseconds[0],
        output_ms=found.milliseconds[1],
        rounds=found.rounds,
        batch=found.batch,
        threads=found.threads,
    )


def output_records(comparison: Comparison) -> list[OutputRecord]:
    """The errors of each output as the report keeps them."""
    return [
        OutputRecord(
            name=o.name,
            max_abs=float(o.max_abs),
            rel_l2=float(o.rel_l2),
            cosine=float(o.cosine),
            sqnr_db=float(o.sqnr_db),
            top1_agreement=None if o.top1_agreement is None else float(o.top1_agreement),
        )
        for o in comparison.outputs
    ]
