"""What a run came to: the result beside the input model, what to warn of, and whether it stands at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphopt.base import Context, Effect
from graphopt.errors import GateRefused, GraphoptError
from graphopt.pipeline.gates import LatencyGate
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.measure import BENCH_WEIGHTS_LIMIT, Measures
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.verify_each import Level
from graphopt.report.data import Accuracy, Fidelity, Latency, Report, Units
from graphopt.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.sparsity.verdicts import Eligibility


def measure(report: Report, result: ir.Model, measures: Measures, bench: bool, verify_each: Level) -> None:
    """Compare the result with the input model for the report."""
    ctx = measures.ctx
    applied = [r for r in report.passes if r.changed]
    if ctx.evaluation is not None:
        before = measures.baseline()
        after = measures.accuracy(result) if applied else before
        report.accuracy = Accuracy(ctx.evaluation.metric, ctx.evaluation.higher_is_better, before, after)
    if not applied:
        report.latency = Latency(None, reason="the model is unchanged")
        report.fidelity = Fidelity(1.0, "none", reason="the model is unchanged")
        return
    lossy = any(r.effect == Effect.LOSSY.value for r in applied)
    only = applied[0].verification if len(applied) == 1 and not lossy else None
    if only is not None and only.outputs:
        # One exact pass was compared with the input model already.
        report.fidelity = Fidelity(min(o.cosine for o in only.outputs), only.data, only.outputs)
    elif verify_each != "numeric" and not lossy:
        report.fidelity = Fidelity(None, "none", reason=f"not measured with --verify-each {verify_each}")
    else:
        report.fidelity = measures.fidelity(result)
    big = report.input.bytes > BENCH_WEIGHTS_LIMIT
    if measures.known_latency(result) is not None or (bench and not big):
        report.latency = measures.latency(result)
    else:
        limit = f"the weights exceed {BENCH_WEIGHTS_LIMIT >> 20} MiB (--max-latency 1 measures all the same)"
        reason = limit if big else "switched off"
        report.latency = Latency(None, reason=f"not measured: {reason}")


def prunable(model: ir.Model) -> Units:
    """What could be pruned; an analysis that fails does not end a run that may not even prune, but it is told."""
    from graphopt.report.units import summarise

    try:
        return summarise(model)
    except GraphoptError as error:
        return Units(reason=str(error))
    except Exception as error:
        return Units(reason=f"internal error in the analysis: {type(error).__name__}: {error}")


def sparsity(model: ir.Model, target: Target) -> Eligibility | None:
    """What the target can do with the zeros of the result; None where it has no kernels for them, or there are none."""
    from graphopt.sparsity.eligibility import eligibility

    found = eligibility(model, target).sparse()
    return found if found.layers else None


def warn(report: Report, plan: Plan, ctx: Context) -> None:
    """Write down what must not be missed: what data and passes warn of, and where the result is worse than before."""
    mark = "warning: "
    if ctx.calibration is not None:
        report.warnings += [note.removeprefix(mark) for note in ctx.calibration.notes if note.startswith(mark)]
    for record in report.passes:
        report.warnings += [note.removeprefix(mark) for note in record.notes if note.startswith(mark)]
        if record.status == "undone":
            report.warnings.append(f"{record.name} was undone: {record.reason}")
    if report.units is not None and report.units.reason is not None:
        report.warnings.append(f"what can be pruned is not known: {report.units.reason}")
    found = report.latency
    if found is not None and found.certain_low is not None and found.certain_low > 1 and plan.max_latency is None:
        report.warnings.append(f"the model is slower than the input model: {found.ratio:.2f}x its time")
    if report.output.bytes > report.input.bytes:
        report.warnings.append(f"the weights are larger: {report.input.bytes} -> {report.output.bytes} bytes")
    opset, cap = report.output.opset.get("ai.onnx", 0), plan.target.opset_max
    if cap is not None and opset > cap:
        report.warnings.append(f"opset {opset} is newer than target {plan.target.name!r} reads (at most {cap})")
    if plan.target.ir_max is not None and report.output.ir_version > plan.target.ir_max:
        report.warnings.append(
            f"IR version {report.output.ir_version} is newer than target {plan.target.name!r} reads "
            f"(at most {plan.target.ir_max})"
        )
    report.warnings = list(dict.fromkeys(report.warnings))


def refuse(report: Report, plan: Plan, gates: Sequence[Instrument]) -> None:
    """Raise where the gates left nothing.

    Raises:
        GateRefused: a gate undid a pass and no pass is left, or the result misses a latency bound below 1.
    """
    applied = [r for r in report.passes if r.changed]
    undone = [r for r in report.passes if r.status == "undone"]
    problem = None
    if undone and not applied:
        problem = "; ".join(f"{r.name}: {r.reason}" for r in undone)
    elif plan.max_latency is not None and plan.max_latency < 1 and not report.dry_run:
        found = report.latency if applied else Latency(1.0)
        gate = next(g for g in gates if isinstance(g, LatencyGate))
        if found is not None and gate.exceeds(found):
            problem = (
                f"max-latency: the result takes {found.ratio:.3f}x the time of the input model, not {gate.limit:g}x"
            )
    if problem is not None:
        error = GateRefused(
            f"no result passed the gates, so the input model stands ({problem})",
            hint="loosen --max-drop or --max-latency, choose milder options, or add passes",
        )
        error.report = report
        raise error
