"""`graphopt.optimize`: the whole road from a model to a smaller one and a report. The command line is this call.

Errors are those of `graphopt.errors`; their `exit_code` is what the command line exits with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import registry
from graphopt.base import Context, Pass
from graphopt.errors import UsageError
from graphopt.given import called, opened
from graphopt.manager import PassManager, stats
from graphopt.pipeline import verdict
from graphopt.pipeline.gates import DropGate, LatencyGate, Regressions
from graphopt.pipeline.instruments import BisectLimit, Clock, DumpIR, Instrument, PrintIR, ShowProgress
from graphopt.pipeline.measure import Measures
from graphopt.pipeline.plan import Plan, as_target, make_plan
from graphopt.pipeline.recipe import Recipe
from graphopt.pipeline.verify_each import Level, VerifyEach
from graphopt.progress import Progress, Silent
from graphopt.report.data import PassRecord, Report
from graphopt.spec import to_spec
from graphopt.target import Target
from graphopt.version import versions

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.bundle import Bundle
    from graphopt.files.stored import Storage


@dataclass
class Result:
    """An optimised model and the report of how it came about.

    Attributes:
        model: the result; the input model itself where nothing was changed.
        report: what every pass did, and what was measured.
        recipe: what to save to get the same again.
    """

    model: ir.Model
    report: Report
    recipe: Recipe
    target: Target
    context: Context = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, compress: bool = False, name: str = "model.onnx") -> list[Path]:
        """Write the model to a file, or to a folder the model, `report.json`, `report.html` and `recipe.toml`.

        Args:
            path: a `.onnx` file, a `.safetensors` archive, or a folder.
            compress: store weights with many zeros as values and positions (`graphopt.save`); `report.storage` tells
                what that did.
            name: of the model's file in a folder.

        Returns:
            The files written.

        Raises:
            GraphoptError: something cannot be written.
        """
        from graphopt.model import save
        from graphopt.pipeline.destination import is_model_file

        path = Path(path)
        if is_model_file(path):
            self._note_storage(save(self.model, path, compress=compress))
            return [path]
        _make_folder(path)
        self._note_storage(save(self.model, path / name, compress=compress))
        return [path / name, *self._write_reports(path)]

    def lower(
        self,
        path: str | os.PathLike[str],
        target: Target | str | None = None,
        *,
        compress: bool = False,
        verify: bool = False,
        tolerance: float | None = None,
        **options: Any,
    ) -> Bundle:
        """Write the deployable bundle of a target (default: the one the model was made for) into a folder.

        Args:
            path: the folder.
            target: whose bundle.
            compress: as `save`, where the backend writes ONNX files; else the report has a warning.
            verify, tolerance, **options: as in `graphopt.lower`.

        Returns:
            The bundle; what it warns of is in the report as well.

        Raises:
            MissingBackendError: a tool that the target needs is not installed.
            ModelError: the target cannot take the model; names the node.
            VerificationError: the bundle computes something else; nothing was written.
            GraphoptError: something cannot be written.
        """
        from graphopt.bundle import sha256
        from graphopt.lowering.options import options_of
        from graphopt.lowering.steps import lower

        chosen = self.target if target is None else as_target(target)
        if compress and "compress" in options_of(registry.backend(chosen.backend)):
            options["compress"] = True
        elif compress:
            self.report.warnings.append(f"the bundle is not compressed: backend {chosen.backend!r} cannot")
        origin = Path(self.report.model)
        made = lower(
            self.model,
            chosen,
            Path(path),
            source={"name": origin.name, "sha256": sha256(origin)} if origin.is_file() else None,
            report=self.report.to_dict(),
            calibration=self.context.calibration,
            verify=verify,
            tolerance=tolerance,
            seed=self.context.seed,
            options=options,
        )
        self.report.warnings += made.manifest["warnings"]
        return made

    def deploy(self, folder: str | os.PathLike[str], *, compress: bool = False) -> list[Path]:
        """Save the model with its reports, and the bundle of its target, into one folder.

        Args:
            folder: gets all of it; model and reports stay where the bundle cannot be made.
            compress: as `save` and `lower`.

        Returns:
            The files written. Where the target prepares models for itself, what the passes made is `optimized.onnx`.

        Raises:
            GraphoptError: as `save` and `lower`.
        """
        from graphopt.pipeline.destination import MODEL, PREPARED_FROM

        written = self.save(folder, compress=compress, name=PREPARED_FROM if self.target.prepare else MODEL)
        made = self.lower(folder, compress=compress)
        self._write_reports(Path(folder))  # again, with what the bundle warns of
        return [*written, *made.files]

    def _note_storage(self, storage: Storage | None) -> None:
        self.report.storage = storage
        if storage is not None and not storage.tensors:
            self.report.warnings.append(f"--compress: {storage.summary()}")

    def _write_reports(self, folder: Path) -> list[Path]:
        from graphopt.report.html import render

        texts = {
            "report.json": self.report.to_json() + "\n",
            "report.html": render(self.report),
            "recipe.toml": self.recipe.to_toml(),
        }
        for name, text in texts.items():
            try:
                (folder / name).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UsageError(
                    f"cannot be written: {error.strerror}", where=str(folder / name), hint="choose another folder"
                ) from error
        return [folder / name for name in texts]


def optimize(
    model: ir.Model | str | os.PathLike[str],
    passes: str | Sequence[Pass] | None = None,
    *,
    preset: str | int | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    target: Target | str | None = None,
    calib: Any = None,
    evaluate: Any = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    max_latency: float | str | None = None,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    seed: int | None = None,
    jobs: int = 1,
    verify_each: Level = "numeric",
    instruments: Iterable[Instrument] = (),
    print_ir_after: Sequence[str] = (),
    dump_ir: str | os.PathLike[str] | None = None,
    bisect_limit: int | None = None,
    dry_run: bool = False,
    units: bool = True,
    bench: bool = True,
    bench_seconds: float = 1.0,
    bundles: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], object] | None = None,
    command: str | None = None,
) -> Result:
    """Make a trained model smaller and faster, and tell what that did.

    Args:
        model: an ONNX file, or a model from `graphopt.load`; never changed.
        passes: a pipeline as text (`'fold,prune{macs=0.5}'`) or pass objects. Without `passes`, `preset` and `recipe`
            it is the preset -O1.
        preset: "O0" to "O3".
        recipe: a recipe, or the path of one; arguments given beside it go before what it says.
        target: name of a target, or a target; default "cpu".
        calib: unlabelled inputs: whatever `graphopt.calibration.load` takes.
        evaluate: labelled data or a function: whatever `graphopt.evaluation.load` takes.
        metric: for evaluation data.
        max_drop: gate on accuracy (or on fidelity without `evaluate`); 0.01, "1%", inf; None: off, except for presets.
        max_latency: gate on the latency ratio to the input model; None: off, except for presets. Refuses what is slower
            beyond the noise measured; for a bound of 1, up to 1.02 counts as equal.
        dim: fixed sizes of symbolic input dimensions.
        input_shape: fixed shapes of inputs, by name; dimensions of other inputs that have the same names follow.
        seed: of every random choice; default 0.
        jobs: threads that passes may use.
        verify_each: "numeric", "structure" or "off".
        instruments: more of them, called after verification and before the gates.
        print_ir_after: names of passes, or "all": print the model to stderr after them.
        dump_ir: folder for the model's text before and after every pass.
        bisect_limit: run only so many passes.
        dry_run: check everything and plan; run no pass.
        units: find out what could be pruned, for the report.
        bench: measure latency for the report and its warnings, where the target runs here. Gates measure regardless.
        bench_seconds: time of one latency measurement.
        bundles: folder for reproducer bundles; default: the folder for temporary files.
        progress: sink for progress.
        say: gets lines the user should see while it runs (what a preset expands to).
        command: how the run was started, for the report.

    Raises:
        GateRefused: every result broke a gate; its attribute `report` tells more. The input model stands.
        GraphoptError: see `graphopt.errors`.
    """
    start = time.perf_counter()
    plan = make_plan(
        passes, preset, recipe, target, calib, evaluate, metric, max_drop, max_latency, dim, input_shape, seed
    )
    if jobs < 1:
        raise UsageError(f"{jobs} is less than 1", where="jobs", hint="give the number of threads")
    for line in plan.notes:
        (say or _ignore)(line)
    name = called(model, "model")
    loaded = opened(model, plan.dim, plan.input_shape)
    ctx = _context(loaded, plan, jobs, progress)
    about_data = _about_data(ctx)
    for line in about_data:
        (say or _ignore)(line)
    measures = Measures(loaded, ctx, seconds=bench_seconds)
    gates = _gates(plan, measures, bench)
    chain: list[Instrument] = [Clock(), ShowProgress(len(plan.passes))]
    if bisect_limit is not None:
        chain.append(BisectLimit(bisect_limit))
    if print_ir_after:
        _check_names(print_ir_after, plan.passes)
        chain.append(PrintIR(print_ir_after))
    if dump_ir is not None and not dry_run:
        chain.append(DumpIR(Path(dump_ir)))
    chain += [VerifyEach(verify_each), *instruments, *gates]
    manager = PassManager(
        plan.passes,
        chain,
        bundles=None if bundles is None else Path(bundles),
        command=command,
        structure=verify_each != "off",
    )
    report = Report(
        model=name,
        target=plan.target.name,
        pipeline=to_spec(plan.passes),
        seed=plan.seed,
        input=stats(loaded),
        output=stats(loaded),
        gates={"max-drop": plan.max_drop, "max-latency": plan.max_latency},
        preset=plan.preset,
        calibration=ctx.calibration.name if ctx.calibration is not None else None,
        evaluation=ctx.evaluation.name if ctx.evaluation is not None else None,
        notes=[*plan.notes, *about_data, *plan.fixed_sizes()],
        versions=versions(),
        command=command,
        dry_run=dry_run,
    )
    if units:
        report.units = verdict.prunable(loaded)
    if dry_run:
        manager.check(ctx)
        report.passes = [PassRecord(p.name, to_spec([p]), p.effect.value, "planned") for p in plan.passes]
        result = loaded
    else:
        manager.check(ctx)
        if ctx.evaluation is not None:
            # First of all: labels or a function that do not fit are found before the work, and are no pass's fault.
            measures.baseline()
        result = manager.run(loaded, replace(ctx, drop=measures.drop))
        report.passes = manager.records
        report.output = stats(result)
        report.sparsity = verdict.sparsity(result, plan.target)
        verdict.measure(report, result, measures, bench, verify_each)
    verdict.warn(report, plan, ctx)
    report.seconds = time.perf_counter() - start
    verdict.refuse(report, plan, gates)
    return Result(result, report, plan.recipe(), plan.target, ctx)


def _context(model: ir.Model, plan: Plan, jobs: int, progress: Progress | None) -> Context:
    from graphopt import calibration, evaluation

    data = None if plan.calib is None else calibration.load(plan.calib, model, seed=plan.seed)
    if plan.metric is not None and plan.evaluate is None:
        raise UsageError("a metric without evaluation data", where="metric", hint="give --eval DATA as well")
    score = None if plan.evaluate is None else evaluation.load(plan.evaluate, plan.metric, model)
    return Context(
        target=plan.target,
        calibration=data,
        evaluation=score,
        seed=plan.seed,
        jobs=jobs,
        progress=progress or Silent(),
        resolve=registry.pass_class,
        max_drop=plan.max_drop,
        max_latency=plan.max_latency,
    )


def _about_data(ctx: Context) -> list[str]:
    """How calibration data is read, where that is not as it stands; what it warns of comes with the other warnings."""
    data = ctx.calibration
    return [] if data is None else [f"{data.name}: {n}" for n in data.notes if not n.startswith("warning: ")]


def _gates(plan: Plan, measures: Measures, bench: bool) -> list[Instrument]:
    gates: list[Instrument] = []
    if plan.max_drop is not None:
        gates.append(DropGate(plan.max_drop, measures))
    gates.append(Regressions(measures, drop=plan.max_drop is None, latency=plan.max_latency is None and bench))
    if plan.max_latency is not None:
        # Last, because it remembers how fast the model has become: a later veto would make that wrong.
        gates.append(LatencyGate(plan.max_latency, measures))
    return gates


def _check_names(names: Sequence[str], passes: Sequence[Pass]) -> None:
    known = {p.name for p in passes}
    for name in names:
        if name not in known and name != "all":
            raise UsageError(
                f"{name!r} is not in the pipeline",
                where="print-ir-after",
                hint=f"name one of {', '.join(sorted(known)) or 'no passes'}, or all",
            )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot be made: {error.strerror}", where=str(path), hint="choose another folder, or a .onnx file"
        ) from error


def _ignore(line: str) -> None:
    """For callers who do not listen; the report keeps the lines."""
