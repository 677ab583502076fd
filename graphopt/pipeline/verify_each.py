"""The instrument that runs the model after every pass: an exact pass really is exact, a lossy one is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.errors import GraphoptError, VerificationError
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.measure import output_records
from graphopt.report.data import PassRecord, Verification

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.verify import Comparison

Level = Literal["structure", "numeric", "off"]

LOSSY_SAMPLES = 64
"""Calibration samples on which the errors of a lossy pass are measured for the report."""


class VerifyEach(Instrument):
    """Check the model after each pass.

    "numeric": run it and the model before the pass with ONNX Runtime's optimisations off; an exact pass must agree
    within the tolerance of the dtype on random inputs, the errors of a lossy pass on calibration data go to the report.
    At "structure" and "off" nothing is run; whether the graph is valid is checked by the manager itself.
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
            VerificationError: an exact pass changed what the model computes, or a pass broke it.
        """
        if self.level == "numeric":
            self._compare(pass_, model, result)
        return None

    def fill(self, record: PassRecord) -> None:
        """Write the errors."""
        record.verification, self._found = self._found, None
        self._before = None

    def _compare(self, pass_: Pass, model: ir.Model, result: PassResult) -> None:
        assert self._before is not None
        exact = pass_.effect is Effect.EXACT
        problem = ""
        for data, feeds in self._sources(exact):
            try:
                comparison = self._run(model, feeds)
            except VerificationError as error:
                error.hint = f"leave {pass_.name} out, and report it with the reproducer"
                raise
            except GraphoptError as error:
                # The model before the pass does not run on these feeds: nothing can be compared on them.
                problem = str(error)
                continue
            self._judge(pass_, comparison, data, rounding(self._before) if exact else None)
            result.notes += [note for note in comparison.notes if data == "random"]
            return
        self._found = Verification("none", None, False, reason=problem)
        result.notes.append(f"warning: {pass_.name} was checked for structure only: {problem}")

    def _run(self, model: ir.Model, feeds: Callable[[], Iterable[dict[str, Any]]]) -> Comparison:
        from graphopt import verify

        assert self._before is not None
        return verify.compare(self._before, model, feeds())

    def _sources(self, exact: bool) -> Iterator[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]:
        """Where feeds come from, best first: random ones reach more of an exact rewrite, real ones tell its cost."""
        from graphopt import verify

        assert self._before is not None and self._ctx is not None
        before, ctx = self._before, self._ctx
        kinds: list[tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = [
            ("random", lambda: verify.random_feeds(before, ctx.seed))
        ]
        if ctx.calibration is not None:
            real = ctx.calibration
            kinds.append(("calibration", lambda: real.batches(limit=LOSSY_SAMPLES)))
        yield from kinds if exact else reversed(kinds)

    def _judge(self, pass_: Pass, comparison: Comparison, data: str, limit: float | None) -> None:
        from graphopt import verify

        records = output_records(comparison)
        if limit is None:
            self._found = Verification(data, None, True, records)
            broken = [o.name for o in comparison.outputs if o.nonfinite]
            if broken:
                raise VerificationError(
                    f"output {broken[0]!r} is not finite any more",
                    hint=f"leave {pass_.name} out, or choose milder options",
                )
            return
        for output in comparison.outputs:
            allowed = verify.tolerance(output.dtype)
            # Rounding inside the model bounds how closely floating-point outputs can agree; others must be equal.
            allowed = max(allowed, limit) if allowed else allowed
            if not output.rel_l2 <= allowed:
                raise VerificationError(
                    f"it is exact, but output {output.name!r} differs by {output.rel_l2:.3g} relative "
                    f"(tolerance {allowed:.0e})",
                    hint=f"leave {pass_.name} out, and report it with the reproducer",
                )
        self._found = Verification(data, limit, True, records)


QUANTISED_TOLERANCE = 2e-2
"""Where a model rounds to 8 bits inside, an equal rewrite may tip a value over to the next step: 1/127 and a margin."""


def rounding(model: ir.Model) -> float:
    """The relative difference that rounding inside a model may cause between two forms of it.

    By the narrowest floating-point type of weights, inputs and outputs (of bodies too), and by whether it holds
    quantisers.
    """
    import onnx_ir as ir

    from graphopt import verify

    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.all_nodes()):
        return QUANTISED_TOLERANCE
    values = [v for g in model.graphs() for v in (*g.inputs, *g.outputs, *g.initializers.values())]
    found = [v.dtype for v in values if v.dtype is not None and v.dtype.is_floating_point()]
    narrowest = min(found, key=lambda dtype: dtype.bitwidth, default=ir.DataType.FLOAT)
    return verify.tolerance(narrowest.numpy()) or QUANTISED_TOLERANCE
