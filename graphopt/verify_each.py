"""The instrument that checks every pass: the graph is valid, and an exact pass really is exact."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.errors import GraphoptError, VerificationError
from graphopt.instruments import Instrument
from graphopt.measure import output_records
from graphopt.report.data import PassRecord, Verification

if TYPE_CHECKING:
    import onnx_ir as ir

Level = Literal["structure", "numeric", "off"]

LOSSY_SAMPLES = 64
"""Calibration samples on which the errors of a lossy pass are measured for the report."""


class VerifyEach(Instrument):
    """Check the model after each pass.

    "structure": it is a valid graph. "numeric": also run it and the model before the pass on random inputs with ONNX
    Runtime's optimisations off; an exact pass must agree within the tolerance of the dtype, the errors of a lossy pass
    go to the report.
    """

    def __init__(self, level: Level = "numeric") -> None:
        self.level = level
        self._ctx: Context | None = None
        self._before: ir.Model | None = None
        self._found: Verification | None = None

    def begin(self, model: ir.Model, ctx: Context) -> None:
        """Remember the context."""
        self._ctx = ctx

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Remember the model to compare with."""
        self._before = model
        self._found = None
        return None

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Check.

        Raises:
            VerificationError: the graph is invalid, or an exact pass changed what the model computes.
        """
        from graphopt import verify

        if self.level == "off":
            return None
        try:
            verify.structure_check(model)
        except VerificationError:
            raise
        except GraphoptError as error:
            raise VerificationError(
                f"left an invalid graph: {error}", hint="this is a defect of the pass; leave it out and report it"
            ) from error
        if self.level == "numeric":
            self._compare(pass_, model, result)
        return None

    def fill(self, record: PassRecord) -> None:
        """Write the errors."""
        record.verification = self._found
        self._before = None

    def _compare(self, pass_: Pass, model: ir.Model, result: PassResult) -> None:
        from graphopt import verify

        assert self._before is not None and self._ctx is not None
        exact = pass_.effect is Effect.EXACT
        data, feeds = self._feeds(exact)
        limit = verify.tolerance(narrowest_dtype(self._before)) if exact else None
        try:
            comparison = verify.compare(self._before, model, feeds)
        except VerificationError:
            raise
        except GraphoptError as error:
            # The input model itself may be beyond what ONNX Runtime runs (custom operators): then nothing can be
            # compared, and that is said. A model that ran before the pass and does not any more is a broken one.
            reason = self._cannot_run(self._before)
            if reason is None:
                raise VerificationError(
                    f"the model ran before the pass and does not any more: {error}",
                    hint="this is a defect of the pass; leave it out and report it",
                ) from error
            self._found = Verification(data, limit, False, reason=reason)
            result.notes.append(f"warning: {pass_.name} was checked for structure only: {reason}")
            return
        worst = comparison.worst_relative
        passed = limit is None or bool(worst <= limit)
        self._found = Verification(data, limit, passed, output_records(comparison))
        if not passed:
            name = max(comparison.outputs, key=lambda o: math.inf if math.isnan(o.rel_l2) else o.rel_l2).name
            raise VerificationError(
                f"is exact, but output {name!r} differs by {worst:.3g} relative (allowed {limit:.3g})",
                hint="this is a defect of the pass; leave it out and report it",
            )
        if not exact and not math.isfinite(comparison.cosine):
            raise VerificationError(
                "the outputs are not finite any more", hint="leave the pass out, or choose milder options"
            )

    def _feeds(self, exact: bool) -> tuple[str, Iterable[dict[str, Any]]]:
        from graphopt import verify

        assert self._before is not None and self._ctx is not None
        if not exact and self._ctx.calibration is not None:
            return "calibration", self._ctx.calibration.batches(limit=LOSSY_SAMPLES)
        return "random", verify.random_feeds(self._before, self._ctx.seed)

    def _cannot_run(self, model: ir.Model) -> str | None:
        from graphopt import verify

        assert self._ctx is not None
        try:
            verify.compare(model, model, verify.random_feeds(model, self._ctx.seed))
        except GraphoptError as error:
            return str(error)
        return None


def narrowest_dtype(model: ir.Model) -> Any:
    """The floating-point type with the fewest bits among weights, inputs and outputs; float32 where there is none.

    Rounding of the narrowest type bounds how closely two equal models can agree.
    """
    import onnx_ir as ir

    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    found = [v.dtype for v in values if v.dtype is not None and v.dtype.is_floating_point()]
    return min(found, key=lambda dtype: dtype.bitwidth, default=ir.DataType.FLOAT)
