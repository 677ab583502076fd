"""Gates: bounds on accuracy and latency against the input model; a pass that breaks one is undone.

- `max-drop`: how much worse the model may become. By the user's evaluation where there is one (in the unit of the
  metric), else by fidelity: 1 - mean cosine per sample between the outputs, of the worst output, on calibration data.
- `max-latency`: bound R on the ratio to the input model's time on the target. Timings are noisy, and a gate refuses
  only what was shown: a model is too slow iff the lower end of the 95 % interval of its median ratio is above R. A
  bound of 1 says "no slower", and ratios up to 1.02 count as equal there. A bound below 1 is a demand on the result: a
  pass on the way there may miss it as long as it does not make the model slower than it was, and `graphopt.optimize`
  refuses the result in the end where the demand is not met.

What cannot be measured does not pass silently: the record says so, and a warning goes to the user.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from graphopt.base import Effect, Pass, PassResult
from graphopt.errors import UsageError
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.measure import Measures
from graphopt.report.data import GateRecord, Latency, PassRecord

if TYPE_CHECKING:
    import onnx_ir as ir

EQUAL = 1.02
"""Ratios up to here count as no slower. Two sessions of one model differ as long as they live, by up to 0.8 % in five
trials (`graphopt bench m.onnx m.onnx`), with intervals of the median as narrow as 0.06 %: measuring longer is no help.
"""

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?(%?)")


def parse_bound(value: float | str | None, option: str, *, positive: bool = False) -> float | None:
    """A bound as the command line takes it: `0.01`, `1%`, `inf`; None where the gate is off.

    Args:
        value: as given.
        option: its name.
        positive: refuse 0, which no model can meet where the bound is on time.

    Raises:
        UsageError: not a number, negative, or 0 where that makes no sense; names the option.
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        found = _NUMBER.fullmatch(text)
        if found is not None:
            value = float(text.rstrip("%")) / (100 if found.group(3) else 1)
        elif text in ("inf", "infinity"):
            value = math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise UsageError(f"{value!r} is not a bound", where=option, hint="write a number such as 0.01 or 1%, or inf")
    if positive and value == 0:
        raise UsageError(
            "no model takes 0x the time", where=option, hint="write the ratio that is allowed, such as 1 or 0.8, or inf"
        )
    return float(value)


class DropGate(Instrument):
    """Undo a lossy pass after which the model is worse than the input model by more than `limit`.

    Exact passes are proved equal by verification and are not measured again.
    """

    def __init__(self, limit: float, measures: Measures) -> None:
        self.limit = limit
        self.measures = measures
        self._records: list[GateRecord] = []

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Start a new record."""
        self._records = []
        return None

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Measure and decide."""
        if pass_.effect is Effect.EXACT:
            return None
        record = self.measure(model)
        self._records.append(record)
        if record.passed is None:
            result.notes.append(f"warning: the max-drop gate did not decide: {record.detail}")
        return record.detail if record.passed is False else None

    def measure(self, model: ir.Model) -> GateRecord:
        """The drop of a model, against the limit."""
        evaluation = self.measures.ctx.evaluation
        if math.isinf(self.limit):
            return GateRecord("max-drop", self.limit, None, True, "the bound is inf")
        if evaluation is not None:
            drop = self.measures.accuracy_drop(model)
            what = f"{evaluation.metric} {self.measures.accuracy(model):.6g} after {self.measures.baseline():.6g}"
        elif self.measures.ctx.calibration is not None:
            fidelity = self.measures.fidelity(model)
            if fidelity.cosine is None:
                return GateRecord("max-drop", self.limit, None, None, f"not measured: {fidelity.reason}")
            drop = 1 - fidelity.cosine
            what = f"output fidelity {fidelity.cosine:.6f} on the calibration data"
        else:
            detail = "neither evaluation nor calibration data was given, so no drop can be measured"
            return GateRecord("max-drop", self.limit, None, None, detail)
        passed = bool(drop <= self.limit)  # False for NaN
        verdict = "within" if passed else "beyond"
        return GateRecord(
            "max-drop", self.limit, float(drop), passed, f"{what}: a drop of {drop:.4g}, {verdict} {self.limit:g}"
        )

    def fill(self, record: PassRecord) -> None:
        """Write the verdict."""
        record.gates += self._records
        self._records = []


class LatencyGate(Instrument):
    """Undo a pass after which the model is slower than the bound allows, beyond the noise of the measurement.

    It is where the lower end of the 95 % interval of the median ratio (`Latency.certain_low`) is above the bound and,
    for a bound of 1, the ratio is above `EQUAL` besides. Where the bound is below 1 and not reached yet, the pass must
    not make the model slower than it was before the pass.
    """

    def __init__(self, limit: float, measures: Measures) -> None:
        self.limit = limit
        self.measures = measures
        self._before = 1.0
        self._reached = 1.0
        self._records: list[GateRecord] = []

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Note how fast the model is before the pass."""
        self._records = []
        self._before = 1.0 if model is self.measures.model else self._reached
        return None

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Measure and decide."""
        if math.isinf(self.limit):
            self._records.append(GateRecord("max-latency", self.limit, None, True, "the bound is inf"))
            return None
        bound = max(self.limit, min(self._before, 1.0)) if self.limit < 1 else self.limit
        record = self.measure(model, bound)
        self._records.append(record)
        if record.passed is None:
            result.notes.append(f"warning: the max-latency gate did not decide: {record.detail}")
        elif record.passed and record.value is not None:
            self._reached = record.value
        return record.detail if record.passed is False else None

    def measure(self, model: ir.Model, bound: float | None = None) -> GateRecord:
        """The latency ratio of a model, against the bound (the gate's own where none is given).

        A ratio above the bound whose interval holds the bound is unclear, and is measured again for longer.
        """
        bound = self.limit if bound is None else bound
        found = self.measures.latency(model)
        if found.ratio is not None and found.ratio > _allowed(bound) and not self.exceeds(found, bound):
            found = self.measures.latency(model, seconds=4 * self.measures.seconds)
        if found.ratio is None:
            return GateRecord("max-latency", self.limit, None, None, f"latency was not measured: {found.reason}")
        passed = not self.exceeds(found, bound)
        verdict = "above" if not passed else "within" if found.ratio <= bound else "not measurably above"
        detail = f"{found.ratio:.3f}x the time of the input model, {verdict} {bound:.3g}x"
        return GateRecord("max-latency", self.limit, found.ratio, passed, detail)

    def exceeds(self, latency: Latency, bound: float | None = None) -> bool:
        """Whether a time was shown to be above the bound (the gate's own where none is given); see the class."""
        bound = self.limit if bound is None else bound
        return latency.ratio is not None and latency.ratio > _allowed(bound) and _shown_above(latency, bound)

    def fill(self, record: PassRecord) -> None:
        """Write the verdict."""
        record.gates += self._records
        self._records = []


class Regressions(Instrument):
    """Say so where a lossy pass without a gate left the model slower, larger or less faithful than one would expect.

    Args:
        measures: against the input model.
        drop, latency: False where a gate already watches.
        expected: fidelity below 1 - expected is warned about.
    """

    def __init__(self, measures: Measures, *, drop: bool, latency: bool, expected: float = 0.01) -> None:
        self.measures = measures
        self.drop = drop
        self.latency = latency
        self.expected = expected
        self._before: ir.Model | None = None

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Remember the model to compare with."""
        self._before = model
        return None

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Measure and warn."""
        if pass_.effect is Effect.EXACT or self._before is None:
            return None
        if self.drop:
            self._warn_about_drop(pass_, model, result)
        if self.latency:
            self._warn_about_time(pass_, model, result)
        self._warn_about_size(pass_, model, result)
        self._before = None
        return None

    def _warn_about_drop(self, pass_: Pass, model: ir.Model, result: PassResult) -> None:
        ctx = self.measures.ctx
        if ctx.evaluation is not None:
            drop = self.measures.accuracy_drop(model)
            if not drop <= self.expected:
                result.notes.append(
                    f"warning: {ctx.evaluation.metric} is {self.measures.accuracy(model):.6g} after {pass_.name}, "
                    f"{self.measures.baseline():.6g} before the pipeline; no gate was set (--max-drop 1%)"
                )
            return
        fidelity = self.measures.fidelity(model)
        if fidelity.cosine is None:
            result.notes.append(f"warning: the fidelity after {pass_.name} could not be measured: {fidelity.reason}")
        elif not 1 - fidelity.cosine <= self.expected:
            result.notes.append(
                f"warning: the outputs after {pass_.name} have a mean cosine of {fidelity.cosine:.4f} with the input "
                f"model's on {fidelity.data} data; no gate was set (--max-drop 1%)"
            )

    def _warn_about_time(self, pass_: Pass, model: ir.Model, result: PassResult) -> None:
        found = self._time(model, None)
        if found.ratio is not None and found.ratio > EQUAL and not _shown_above(found, 1.0):
            found = self._time(model, 4 * self.measures.seconds)  # noise hides the verdict
        if found.ratio is not None and _shown_above(found, 1.0):
            advice = pass_.if_slower()
            result.notes.append(
                f"warning: {pass_.name} made the model slower: {found.ratio:.2f}x the time of the model before it; "
                f"no gate was set (--max-latency 1){'; ' * bool(advice)}{advice}"
            )

    def _time(self, model: ir.Model, seconds: float | None) -> Latency:
        """Time over that of the model before the pass, measured for so long; None: for the usual time."""
        from graphopt.pipeline.measure import paired_latency

        assert self._before is not None
        measures = self.measures
        if self._before is measures.model:
            return measures.latency(model, seconds=seconds)
        return paired_latency(self._before, model, measures.ctx, seconds or measures.seconds / 2, measures.threads)

    def _warn_about_size(self, pass_: Pass, model: ir.Model, result: PassResult) -> None:
        from graphopt.model import weight_bytes

        assert self._before is not None
        old, new = weight_bytes(self._before), weight_bytes(model)
        if new > old:
            result.notes.append(f"warning: {pass_.name} made the weights larger: {old} -> {new} bytes")


def _allowed(bound: float) -> float:
    """The largest ratio that counts as within a bound whatever the noise."""
    return EQUAL if bound == 1 else bound


def _shown_above(latency: Latency, bound: float) -> bool:
    """Whether the ratio is above the bound beyond the noise of its measurement."""
    low = latency.certain_low
    return low is not None and low > bound
