"""The pass manager: runs a tuple of passes, each on a private clone, watched by instruments that may undo it.

A pass leaves no trace in the model where it found nothing to do, an instrument vetoed it, or it raised. In the last
case the pipeline ends: a half-done pipeline is not what the user asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.base import Context, Pass, PassResult
from graphopt.errors import GraphoptError, PassFailure, UsageError, VerificationError
from graphopt.pipeline.clone import private_clone
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.reproducer import Bundle, write_bundle
from graphopt.report.data import PassRecord, Stats
from graphopt.spec import to_spec

if TYPE_CHECKING:
    import onnx_ir as ir


class PassManager:
    """Runs passes in order.

    Args:
        passes: the pipeline.
        instruments: called in this order around every pass; the first veto counts. Gates come after verification.
        bundles: folder that gets a reproducer bundle when a pass fails; None: the system's folder for temporary files.
        command: how the run was started, for the bundle.
        structure: check that every pass leaves a valid graph.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        instruments: Sequence[Instrument] = (),
        *,
        bundles: Path | None = None,
        command: str | None = None,
        structure: bool = True,
    ) -> None:
        self.passes = tuple(passes)
        self.instruments = tuple(instruments)
        self.bundles = bundles
        self.command = command
        self.structure = structure
        self.records: list[PassRecord] = []

    def check(self, ctx: Context) -> None:
        """Refuse a pipeline that cannot run, before any work.

        Raises:
            UsageError: an option has a wrong type, or a pass needs calibration data and there is none.
        """
        to_spec(self.passes)
        for p in self.passes:
            if p.needs_calibration and ctx.calibration is None:
                raise UsageError(
                    "needs calibration data and none was given",
                    where=f"pass {p.name!r}",
                    hint="give unlabelled inputs with --calib DATA (calib= in Python)",
                )

    def run(self, model: ir.Model, ctx: Context) -> ir.Model:
        """Run the pipeline; `records` then tells what each pass did, also when an error is raised.

        Args:
            model: the input model; not changed.
            ctx: what passes may know.

        Raises:
            UsageError: see `check`.
            VerificationError: a pass left an invalid or a different model.
            PassFailure: a pass raised something that is not meant for users.
            GraphoptError: a pass refused, with the name of the pass in front.
        """
        self.check(ctx)
        self.records = []
        for instrument in self.instruments:
            instrument.begin(model, ctx)
        for p in self.passes:
            model = self._step(p, model, ctx)
        return model

    def _step(self, p: Pass, model: ir.Model, ctx: Context) -> ir.Model:
        record = PassRecord(name=p.name, spec=to_spec([p]), effect=p.effect.value, status="unchanged")
        self.records.append(record)
        record.before = record.after = self.records[-2].after if len(self.records) > 1 else stats(model)
        for instrument in self.instruments:
            reason = instrument.before(p, model)
            if reason is not None:
                record.status, record.reason = "not run", reason
        try:
            return model if record.status == "not run" else self._apply(p, model, ctx, record)
        finally:
            # From the last to the first, so that a clock that was started first stops last.
            for instrument in reversed(self.instruments):
                instrument.fill(record)

    def _apply(self, p: Pass, model: ir.Model, ctx: Context, record: PassRecord) -> ir.Model:
        from graphopt.model import infer_shapes
        from graphopt.sparsity.found import lost_patterns

        candidate = private_clone(model)
        try:
            result = p.run(candidate, ctx)
            if result.changed:
                if self.structure:
                    _check_structure(p, candidate)
                infer_shapes(candidate)
                veto = self._ask(p, candidate, result)
        except GraphoptError as error:
            self._explain(p, model, ctx, record, error)
            raise
        except Exception as error:
            raise self._failure(p, model, ctx, record, error) from error
        record.skipped, record.details = result.skipped, result.details
        if not result.changed:
            record.notes = result.notes
            return model
        record.after = stats(candidate)
        record.notes = [*result.notes, *_version_notes(model, candidate), *lost_patterns(model, candidate)]
        if veto is not None:
            record.status, record.reason = "undone", veto
            # What the pass would have given stays readable in the notes; the counts are those of the model that stands.
            record.notes.append(_would_have(record.after))
            record.after = record.before
            return model
        record.status = "applied"
        return candidate

    def _ask(self, p: Pass, candidate: ir.Model, result: PassResult) -> str | None:
        for instrument in self.instruments:
            reason = instrument.after(p, candidate, result)
            if reason is not None:
                return reason
        return None

    def _explain(self, p: Pass, model: ir.Model, ctx: Context, record: PassRecord, error: GraphoptError) -> None:
        """Put the name of the pass in front of an error that it or a check of it raised."""
        record.status, record.reason = "not run", f"failed: {error}"
        prefix = f"pass {p.name!r}"
        if not (error.where or "").startswith(prefix):
            error.where = f"{prefix}: {error.where}" if error.where not in (None, "", p.name) else prefix
        if isinstance(error, VerificationError):
            bundle = self._bundle(p, model, ctx, error)
            error.what = f"{error.what} ({self._ran_before()}; {bundle})"

    def _failure(self, p: Pass, model: ir.Model, ctx: Context, record: PassRecord, error: Exception) -> PassFailure:
        record.status, record.reason = "not run", f"failed: {type(error).__name__}: {error}"
        node = getattr(error, "node", None)
        where = f"pass {p.name!r}" + (f", node {getattr(node, 'name', node)!r}" if node is not None else "")
        text = " ".join(str(error).split())
        bundle = self._bundle(p, model, ctx, error)
        return PassFailure(
            f"{type(error).__name__}: {text or 'no message'} ({self._ran_before()}; {bundle})",
            where=where,
            hint="leave the pass out of the pipeline, and report this with the reproducer bundle",
        )

    def _ran_before(self) -> str:
        ran = [f"{r.name} {r.status}" for r in self.records[:-1]]
        return f"before it: {', '.join(ran)}" if ran else "it was the first pass"

    def _bundle(self, p: Pass, model: ir.Model, ctx: Context, error: Exception) -> str:
        """Write the reproducer; a failure to write it must not hide the failure of the pass."""
        done = self.passes[: len(self.records) - 1]
        bundle = Bundle(failing=p, done=done, model=model, ctx=ctx, error=error, command=self.command)
        try:
            return f"reproducer: {write_bundle(bundle, self.bundles)}"
        except Exception as problem:
            # The model may be in a state that nothing can write, which is then part of the failure itself.
            return f"no reproducer could be written: {type(problem).__name__}: {problem}"


def _check_structure(p: Pass, model: ir.Model) -> None:
    from graphopt.verify import structure_check

    try:
        structure_check(model)
    except VerificationError as error:
        raise VerificationError(
            f"left an invalid graph: {error.what}",
            where=error.where,
            hint=f"leave {p.name} out, and report it with the reproducer",
        ) from error


def stats(model: ir.Model) -> Stats:
    """Counts of a model, with its opset and IR version."""
    from graphopt.analysis.cost import model_stats

    found = model_stats(model)
    return Stats(
        nodes=found.nodes,
        parameters=found.parameters,
        bytes=found.bytes,
        macs=found.macs,
        macs_unknown=found.macs_unknown,
        ops=dict(sorted(found.ops.items())),
        opset={domain or "ai.onnx": number for domain, number in sorted(model.opset_imports.items())},
        ir_version=model.ir_version or 0,
    )


def _version_notes(before: ir.Model, after: ir.Model) -> list[str]:
    """What to tell about a change of opset or IR version, which decides the runtimes that can read the model."""
    notes = []
    old, new = dict(before.opset_imports), dict(after.opset_imports)
    for domain in sorted(old.keys() | new.keys()):
        if old.get(domain) != new.get(domain):
            name = domain or "ai.onnx"
            notes.append(f"opset of {name}: {old.get(domain, 'none')} -> {new.get(domain, 'none')}")
    if before.ir_version != after.ir_version:
        notes.append(f"IR version: {before.ir_version} -> {after.ir_version}")
    return notes


def _would_have(after: Stats) -> str:
    macs = "" if after.macs is None else f", {after.macs} MACs"
    return f"undone: it would have left {after.nodes} nodes, {after.parameters} parameters, {after.bytes} bytes{macs}"
