"""Tuning: MetaSchedule searches schedules for the kernels of a model, measured on this machine.

What it finds stays in a folder that all models of a processor share: MetaSchedule's database (`database_workload.json`
and `database_tuning_record.json`, appended to after each round, so that an interrupted search keeps what it found) and
`searched.json`, the seconds that were searched for each kernel by its hash. A kernel that was searched for as long as
is asked is not searched again. `best` takes out of it what one model needs.

MetaSchedule's own builder starts its worker processes anew for every round, and each of them imports TVM's tensor
intrinsics for 14 to 29 seconds of processor time before the default timeout of 30 s ends it. Kernels are built in
threads of this process instead; only what is measured runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError, MissingBackendError

if TYPE_CHECKING:
    from tvm import IRModule

FFI = "0.1.14.post1"
"""apache-tvm-ffi from 0.1.15 on dies of a segmentation fault where TVM 0.27 writes a database."""

SEARCHED = "searched.json"

TRIALS_A_ROUND = 16
"""Schedules of a kernel that are built and measured before the search turns to the next."""
PATIENCE = 0.6
"""What a kernel weighs after a round that found nothing better, relative to before."""
GIVE_UP = 6
"""The search is over where so many rounds in a row found nothing better, for every kernel."""
RUN_SECONDS = 60.0
"""A measured schedule that takes longer is given up."""


def missing_for_tuning() -> str | None:
    """What must be installed to tune; None where all is there."""
    version = importlib.metadata.version("apache-tvm-ffi")
    if version != FFI:
        return f"apache-tvm-ffi {version} crashes when TVM writes a tuning database (pip install apache-tvm-ffi=={FFI})"
    absent = [name for name in ("cloudpickle", "psutil", "xgboost") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (pip install {' '.join(absent)})" if absent else None


def require_tuning() -> None:
    """Check what tuning needs before work starts.

    Raises:
        MissingBackendError: something is missing.
    """
    reason = missing_for_tuning()
    if reason is not None:
        raise MissingBackendError(reason, where="tune", hint="install it, or lower without tuning")


def default_folder(key: str) -> Path:
    """Where results are kept: $GRAPHOPT_CACHE/tvm, else the user's cache folder; `key` names the processor."""
    from graphopt.latency.table import cache_folder

    return cache_folder() / "tvm" / key


def tune(mod: IRModule, device: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """Search schedules for the kernels of a fused module for so long; what is found goes into `folder`.

    Args:
        mod: from `tvm_build.fused`.
        device: the `tvm.target.Target`, of this machine.
        folder: of the database; made where it does not exist.
        seconds: for the search; the round that runs when they are over is finished.

    Returns:
        what was done: `kernels`, `searched` (kernels that were searched now), `seconds` and `trials`.

    Raises:
        MissingBackendError: the search needs a package that is not installed.
        GraphoptError: the folder cannot be written.
    """
    require_tuning()
    _skip_intrinsics()

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraphoptError(
            f"cannot be made: {error.strerror}", where=str(folder), hint="name another folder"
        ) from error
    ledger = _read_ledger(folder)
    tasks = kernels(mod, device)
    todo = [task for task in tasks if ledger.get(key_of(task), 0.0) < seconds]
    told = {"kernels": len(tasks), "searched": len(todo), "seconds": 0.0, "trials": 0}
    if not todo:
        return told
    budget = seconds - min(ledger.get(key_of(task), 0.0) for task in todo)
    start = time.perf_counter()
    trials = 0
    try:
        with _silent(), _interrupts_kept() as stop_if_asked:
            own = own_times(mod, todo, device)
            trials = _search(todo, own, device, folder, start + budget, stop_if_asked)
    finally:
        spent = time.perf_counter() - start
        ledger |= {key_of(task): ledger.get(key_of(task), 0.0) + spent for task in todo}
        (folder / SEARCHED).write_text(json.dumps(ledger, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return {**told, "seconds": round(spent, 1), "trials": trials}


def _search(
    tasks: Sequence[Any],
    own: Sequence[float | None],
    device: Any,
    folder: Path,
    end: float,
    stop_if_asked: Callable[[], None],
) -> int:
    """Rounds of trials until the clock shows `end`, each for the kernel that has most to gain; how many trials.

    `own` is what our own schedules take (`own_times`); `stop_if_asked` is called between rounds.

    TVM's own scheduler gives every kernel a round first, learns the results of a round when it comes to the same kernel
    again, and knows no clock. Here a round ends with its records on the disk.
    """
    import tvm.s_tir.meta_schedule as ms

    contexts, _ = ms.relax_integration.extracted_tasks_to_tune_contexts(
        tasks, str(folder), space=_space(ms), strategy=_strategy(ms), num_threads=os.cpu_count() or 1, seed=0
    )
    database = ms.database.JSONDatabase(work_dir=str(folder))
    model = ms.cost_model.CostModel.create("xgb", num_tuning_cores=os.cpu_count() or 1, tree_method="auto")
    callbacks = [ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()]
    callbacks.append(ms.measure_callback.RemoveBuildArtifact())
    builder, runner = _builder(), _runner(ms)
    # Seconds of the best schedule known, and rounds since it was found.
    known = [_best(database, task, device, seconds) for task, seconds in zip(tasks, own, strict=True)]
    stale = [0] * len(tasks)
    trials = 0
    while time.perf_counter() < end and min(stale) < GIVE_UP:
        stop_if_asked()
        at = max(range(len(tasks)), key=lambda k: float(tasks[k].weight) * known[k] * PATIENCE ** stale[k])
        ms.tune.tune_tasks(
            tasks=[contexts[at]], task_weights=[1.0], work_dir=str(folder), max_trials_global=TRIALS_A_ROUND,
            num_trials_per_iter=TRIALS_A_ROUND, builder=builder, runner=runner, database=database, cost_model=model,
            measure_callbacks=callbacks,
        )  # fmt: skip
        trials += TRIALS_A_ROUND
        found = _best(database, tasks[at], device, known[at])
        stale[at] = 0 if found < 0.99 * known[at] else stale[at] + 1
        known[at] = found
    stop_if_asked()
    return trials


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the function that this gives is called: an exception that passes through TVM's C++ crashes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))

    def stop_if_asked() -> None:
        if asked:
            raise KeyboardInterrupt

    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)


def _best(database: Any, task: Any, device: Any, known: float | None) -> float:
    """Seconds of the fastest schedule of a kernel, in the database or known otherwise; infinite where there is none."""
    record = database.query_tuning_record(task.dispatched[0], device, task.task_name)
    seconds = [float(second) for second in record.run_secs] if record is not None and record.run_secs else []
    return min([*seconds, math.inf if known is None else known])


def kernels(mod: IRModule, device: Any) -> list[Any]:
    """The kernels of a fused module that MetaSchedule can schedule, each once."""
    import tvm.s_tir.meta_schedule as ms

    return [
        task
        for task in ms.relax_integration.extract_tasks(mod, device)
        if not any(
            int(function.attrs.get("tirx.is_scheduled", 0)) for function in task.dispatched[0].functions.values()
        )
    ]


def key_of(task: Any) -> str:
    """A name of a kernel that is the same in every process."""
    import tvm_ffi

    return f"{tvm_ffi.structural_hash(task.dispatched[0]) & (2**64 - 1):016x}"


def best(mod: IRModule, device: Any, folder: Path, into: Path) -> dict[str, Any]:
    """Copy the best record of each kernel of a module into a database of its own, where it beats our schedules.

    Returns:
        `tuned`: kernels of the module whose record was taken; `kept`: those where our own schedule is as fast.
    """
    import tvm.s_tir.meta_schedule as ms

    with _silent():
        source = ms.database.JSONDatabase(work_dir=str(folder))
        into.mkdir(parents=True, exist_ok=True)
        sink = ms.database.JSONDatabase(work_dir=str(into))
        taken = kept = 0
        tasks = kernels(mod, device)
        own = own_times(mod, tasks, device)
        for task, ours in zip(tasks, own, strict=True):
            record = source.query_tuning_record(task.dispatched[0], device, task.task_name)
            if record is None or not record.run_secs:
                continue
            if ours is not None and ours <= min(float(second) for second in record.run_secs):
                kept += 1
                continue
            workload = sink.commit_workload(task.dispatched[0])
            sink.commit_tuning_record(
                ms.database.TuningRecord(record.trace, workload, record.run_secs, record.target, record.args_info)
            )
            taken += 1
    return {"tuned": taken, "kept": kept}


def own_times(mod: IRModule, tasks: Sequence[Any], device: Any) -> list[float | None]:
    """Seconds that each kernel takes as our rules compile it within `mod`; None where they do not or it cannot run.

    Within the module, since a product is another kernel where its weight is a constant that is packed ahead.
    """
    import tvm
    import tvm.s_tir.meta_schedule as ms

    from graphopt.backends import tvm_schedules
    from graphopt.backends.tvm_schedules.weights import packed_name

    builder, runner = _builder(), _runner(ms)
    found: list[float | None] = []
    scheduled = {name.name_hint: f for name, f in tvm_schedules.schedule(mod, device).functions_items()}
    for task in tasks:
        kernel = scheduled.get(packed_name(task.task_name)) or scheduled[task.task_name]
        module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
        is_ours = int(kernel.attrs.get("tirx.is_scheduled", 0))
        (built,) = builder.build([ms.builder.BuilderInput(module, device)]) if is_ours else (None,)
        if built is None or built.artifact_path is None:
            found.append(None)
            continue
        info = ms.arg_info.ArgInfo.from_entry_func(module)
        (running,) = runner.run([ms.runner.RunnerInput(built.artifact_path, "cpu", info)])
        result = running.result()
        found.append(min(float(s) for s in result.run_secs) if result.run_secs else None)
    return found


def _skip_intrinsics() -> None:
    """Spare the import of TVM's tensor intrinsics, minutes on a busy machine: the rules for processors use none.

    Every context of the search imports them, for rules of GPUs and of integer dot products.
    """
    name = "tvm.s_tir.tensor_intrin"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)


def _space(ms: Any) -> Any:
    """Schedules for processors; TVM would take those with integer dot products where the processor has them."""
    return ms.space_generator.PostOrderApply(sch_rules="llvm", postprocs="llvm", mutator_probs="llvm")


def _strategy(ms: Any) -> Any:
    """A search that spends less on a round than on measuring it: TVM's own evolves 512 schedules four times for 64."""
    return ms.search_strategy.EvolutionarySearch(population_size=128, init_min_unmeasured=32, genetic_num_iters=2)


def _runner(ms: Any) -> Any:
    return ms.runner.LocalRunner(
        timeout_sec=RUN_SECONDS, evaluator_config=ms.runner.EvaluatorConfig(number=1, repeat=1, min_repeat_ms=20)
    )


@functools.cache
def _builder() -> Any:
    """Builds kernels in threads of this process, one a core."""
    import tvm.s_tir.meta_schedule as ms
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.builder import PyBuilder

    @derived_object  # type: ignore[untyped-decorator,unused-ignore]
    class ThreadBuilder(PyBuilder):  # type: ignore[misc]
        """MetaSchedule's interface to a builder."""

        def build(self, build_inputs: Sequence[Any]) -> list[Any]:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                return [ms.builder.BuilderResult(*made) for made in pool.map(_build, build_inputs)]

    return ThreadBuilder()


def _build(wanted: Any) -> tuple[str | None, str | None]:
    """Path of a compiled kernel, or what went wrong."""
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
    from tvm.support.tar import tar

    path = Path(tempfile.mkdtemp(prefix="graphopt-tvm-")) / f"kernel.{tar.output_format}"
    try:
        module = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(wanted.mod)
        tvm.tirx.build(module, target=wanted.target).export_library(str(path), fcompile=tar)
    except Exception as error:  # whatever the compiler raises is the verdict on this schedule alone
        return None, f"{type(error).__name__}: {error}"
    return str(path), None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without MetaSchedule's log of every round."""
    from graphopt.backends.tvm_build import quiet

    loggers = [logging.getLogger("tvm"), logging.getLogger("tvm.s_tir.meta_schedule")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _read_ledger(folder: Path) -> dict[str, float]:
    path = folder / SEARCHED
    if not path.is_file():
        return {}
    try:
        return {str(k): float(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise GraphoptError(f"cannot be read: {error}", where=str(path), hint="delete the folder") from error
