"""Apache TVM: models compiled ahead to a shared object, for this machine or for a device.

A model goes through TVM's ONNX importer into Relax (`tvm_build`), kernels get schedules (`tvm_schedules`, or those that
tuning found, `tvm_tune`), and LLVM makes code for the processor that the target's options name (`tvm_target`). On a GPU
target the kernels are CUDA C (`tvm_cuda`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt import bundle
from graphopt.backend import Artefacts, BenchResult
from graphopt.backends.texts import text
from graphopt.backends.tvm_build import why_unavailable
from graphopt.backends.tvm_cpp import ABOUT as CPP_FILES
from graphopt.backends.tvm_cpp import guide, write_runner
from graphopt.backends.tvm_target import device_target, linker
from graphopt.benching import batch_of, bench_result, feeds_for, shapes_of
from graphopt.errors import MissingBackendError, ModelError, UsageError
from graphopt.target import other_processor

if TYPE_CHECKING:
    import onnx_ir as ir
    from tvm import IRModule
    from tvm.relax import VMExecutable

    from graphopt.backends.tvm_session import TvmSession
    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.target import Target

PACKAGES = ("apache-tvm", "apache-tvm-ffi")

LOWER_SECONDS = 2.0
"""Time that `lower` spends on measuring, where the target can run here."""

THREADS = 1
"""Threads that a bundle uses where nobody says otherwise."""

TUNING = "tuning"
TUNING_FILES = ("database_workload.json", "database_tuning_record.json")
"""Folder of a bundle with the schedules that it was compiled with."""

UNCHECKED = (
    "Indices (Gather and the like) are not checked against the sizes of what they look up: the kernels read outside of "
    "it, where ONNX Runtime would raise an error."
)


class TvmBackend:
    """The backend `tvm`."""

    name: ClassVar[str] = "tvm"

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run on this machine; None where they can."""
        missing = why_unavailable()
        if missing is not None:
            return missing
        if target.device == "gpu":
            return "bundles for GPUs are cross-compiled, and run on the device alone"
        return other_processor(target)

    def missing(self, target: Target) -> str | None:
        """TVM, or a compiler that links for the target."""
        missing = why_unavailable()
        if missing is None and linker(target) is None:
            wanted, package = target.options.get("linker", "g++"), target.options.get("package", "g++")
            return f"{wanted}, which links for it, is not installed (apt install {package})"
        return missing

    def session(self, model: ir.Model | Path, target: Target, *, threads: int = 1) -> TvmSession:
        """Prepare and compile a model for this machine.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: TVM does not take the model.
        """
        from graphopt.backends.tvm_build import compiled
        from graphopt.lowering.steps import prepare, refuse_quantised
        from graphopt.model import load

        reason = self.unavailable(target)
        if reason is not None:
            raise MissingBackendError(reason, where=f"target {target.name!r}", hint="run it on such a device")
        loaded = load(model) if isinstance(model, Path) else model
        refuse_quantised(loaded, target)
        ready, _ = prepare(loaded, target)
        return _session_of(compiled(ready, target).jit(), bundle.describe_model(ready), threads)

    def bench(
        self,
        models: Sequence[ir.Model | Path],
        target: Target,
        feeds: Mapping[str, Array] | None = None,
        *,
        threads: int = 1,
        seconds: float = 2.0,
    ) -> BenchResult:
        """Measure the models, paired and interleaved.

        Args:
            models: the first is the reference of all ratios.
            target: where they run.
            feeds: one batch of inputs for all models; None: random inputs, batch 1.
            threads: that kernels may be split over.
            seconds: time to spend on measured rounds.

        Raises:
            MissingBackendError: the target cannot run here.
            ModelError: TVM does not take a model.
            DataError: the feeds do not fit a model.
        """
        from graphopt.model import load
        from graphopt.timing import paired

        loaded = [load(model) if isinstance(model, Path) else model for model in models]
        given = feeds_for(loaded, feeds)
        sessions = [self.session(model, target, threads=threads) for model in loaded]
        result = paired([session.ready(given) for session in sessions], seconds)
        return bench_result(result, given, threads=threads, **_versions())

    def lower(
        self,
        model: ir.Model,
        target: Target,
        folder: Path,
        *,
        feeds: Mapping[str, Array] | None = None,
        reference: ir.Model | None = None,
        tune: float | None = None,
        database: str | None = None,
    ) -> Artefacts:
        """Write model.so, run.py and bench.py; for a device that is not this machine model.onnx as well.

        Args:
            model: what to deploy, as `target.prepare` left it.
            target: what it is deployed on.
            folder: gets the files.
            feeds: one batch of real inputs for timing.
            reference: what ONNX Runtime runs beside it; None: `model`.
            tune: seconds to search for better schedules of its kernels, measured here; kernels that were searched for
                as long before are not searched again.
            database: folder of what was found (`tvm_tune`); None: graphopt's cache, with `tune` alone.

        Raises:
            MissingBackendError: TVM or the linker is not installed, or what tuning needs.
            ModelError: TVM does not take the model; names the node.
            UsageError: the target cannot be tuned for here.
        """
        from graphopt.backends.tvm_build import built, relaxed
        from graphopt.model import save

        runs_here = self.unavailable(target) is None
        if tune is not None and not runs_here:
            raise UsageError(
                f"schedules are measured on the processor that code is made for, and {self.unavailable(target)}",
                where="tune", hint="tune there, copy the folder of the database, and name it with `database`",
            )  # fmt: skip
        module, device = relaxed(model, target), device_target(target)
        details: dict[str, Any] = {}
        best = None
        if tune is not None or database is not None:
            best = folder / TUNING
            details["tuning"] = _tuned(module, device, target, tune, database, best)
        plain: dict[str, str] = {}
        executable = built(module, device, best, plain=plain)
        if plain:
            details["plain_loops"] = plain
        about = {"model.so": f"the compiled model, weights included ({_code_for(target)})"}
        export(executable, folder / "model.so", target)
        if not runs_here:
            save(model, folder / "model.onnx")
            about["model.onnx"] = "what was compiled; not needed on the device"
        if best is not None:
            about |= {f"{TUNING}/{name}": "the schedules that tuning found, TVM's format" for name in TUNING_FILES}
        if target.device == "gpu":
            from graphopt.backends.tvm_cuda import write_source

            details["cuda"] = write_source(executable, target, folder)
            about["kernels.cu"] = "the kernels in CUDA C, to read; model.so holds them too"
        for name in ("run", "bench"):
            (folder / f"{name}.py").write_text(text(f"tvm_{name}.txt"), encoding="utf-8")
        about["run.py"] = "runs the model: numpy and TVM's runtime, nothing else"
        about["bench.py"] = "times the model; one line of JSON"
        how = ""
        if target.device == "cpu":
            write_runner(folder, "model.so", bundle.describe_model(model), THREADS)
            about |= CPP_FILES
            how = guide(_versions(), target)
        measured = self._measure(model, reference or model, folder / "model.so", feeds) if runs_here else None
        return Artefacts(
            model="model.so",
            run=("python3", "run.py"),
            bench=("python3", "bench.py"),
            about=about,
            needs=_needs(target),
            guide=how,
            session={"device": target.device, "threads": THREADS, "target": _text(device_target(target))},
            measured=measured,
            limits=_limits(model, plain),
            warnings=_slower(measured),
            versions=_versions(),
            details=details,
        )

    def open(self, bundle: Bundle, *, threads: int = 1) -> TvmSession:
        """A session of the bundle's shared object.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: it cannot be loaded.
        """
        from graphopt.backends.tvm_session import loaded

        reason = self.unavailable(bundle.target)
        if reason is not None:
            raise MissingBackendError(reason, where=f"target {bundle.target.name!r}", hint="run it on such a device")
        return _session_of(loaded(bundle.model), bundle.manifest, threads)

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[TvmSession, str] | None:
        """The same Relax program, compiled for this machine's processor."""
        from graphopt.backends.tvm_build import compiled
        from graphopt.model import load
        from graphopt.registry import target

        source = bundle.folder / "model.onnx"
        if not source.is_file():
            return None
        module = compiled(load(source), target("tvm-cpu")).jit()
        session = _session_of(module, bundle.manifest, threads)
        return session, "the bundle's model.onnx, compiled by TVM for this machine's processor"

    def _measure(
        self, model: ir.Model, reference: ir.Model, library: Path, feeds: Mapping[str, Array] | None
    ) -> dict[str, Any]:
        """Time of the compiled model beside ONNX Runtime on the same processor, one thread each.

        What ONNX Runtime runs is the model as the user has it: `prepare` writes out operators that it has kernels for.
        """
        import onnxruntime as ort

        from graphopt.backends.tvm_session import loaded
        from graphopt.executor import Session
        from graphopt.timing import paired

        given = feeds_for([model], feeds)
        session = _session_of(loaded(library), bundle.describe_model(model), THREADS)
        with Session(reference, optimize=True, threads=THREADS) as other:
            run, names = other.session.run, other.output_names
            result = paired([lambda: run(names, given), session.ready(given)], LOWER_SECONDS)
        return {
            "latency_ms": result.milliseconds[1],
            "rounds": result.rounds,
            "threads": THREADS,
            "batch": batch_of(given),
            "inputs": "random" if feeds is None else "real",
            "ratio_to_onnxruntime": result.ratios[1],
            "ratio_quartiles": [result.low[1], result.high[1]],
            "onnxruntime": ort.__version__,
            "onnxruntime_ms": result.milliseconds[0],
            "shapes": shapes_of(given),
            **bundle.describe_machine(),
        }


def _tuned(
    module: IRModule, device: Any, target: Target, seconds: float | None, database: str | None, into: Path
) -> dict[str, Any]:
    """Search (where asked), and put the best schedules of a module into the bundle; what the manifest tells of it."""
    from graphopt.backends.tvm_build import fused
    from graphopt.backends.tvm_tune import best, default_folder, tune

    source = Path(database) if database is not None else default_folder(f"{target.name}-{device.attrs.get('mcpu', '')}")
    kernels = fused(module, device)
    told = {"database": str(source)}
    if seconds is not None:
        told |= tune(kernels, device, source, seconds)
    return told | best(kernels, device, source, into)


def export(executable: VMExecutable, path: Path, target: Target) -> None:
    """Link the compiled model to a shared object.

    Raises:
        MissingBackendError: the linker is not installed.
        ModelError: it fails.
    """
    found = linker(target)
    if found is None:
        wanted, package = target.options.get("linker", "g++"), target.options.get("package", "g++")
        raise MissingBackendError(
            f"{wanted} is not installed", where=f"target {target.name!r}", hint=f"apt install {package}"
        )
    try:
        executable.export_library(str(path), cc=found)
    except RuntimeError as error:
        raise ModelError(
            f"linking failed: {str(error).strip().splitlines()[-1]}", where=f"target {target.name!r}",
            hint=f"check that {found} links shared objects",
        ) from error  # fmt: skip


def _session_of(module: Any, described: Mapping[str, Any], threads: int) -> TvmSession:
    import numpy as np

    from graphopt.backends.tvm_session import TvmSession
    from graphopt.executor import TensorSpec

    inputs = [TensorSpec(v["name"], np.dtype(v["dtype"]), tuple(v["shape"])) for v in described["inputs"]]
    return TvmSession(module, inputs, [v["name"] for v in described["outputs"]], threads)


DIFFERS = "With open sizes TVM orders the expressions of sizes anew each time: model.so is not the same bytes."
"""What the reader of a bundle with open sizes must know."""


def _limits(model: ir.Model, plain: Mapping[str, str]) -> tuple[str, ...]:
    """What does not hold of a bundle."""
    limits = [UNCHECKED] if any(node.op_type.startswith("Gather") for node in model.graph.all_nodes()) else []
    if any(not isinstance(d, int) for value in model.graph.inputs for d in value.shape or ()):
        limits.append(DIFFERS)
    if plain:
        limits.append(f"No schedule fits {len(plain)} of its kernels, which run as plain loops: {', '.join(plain)}.")
    return tuple(limits)


def _slower(measured: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What the user must be told of a build that ONNX Runtime beats."""
    if measured is None or measured["ratio_quartiles"][0] <= 1:
        return ()
    ratio = measured["ratio_to_onnxruntime"]
    return (
        f"slower than ONNX Runtime on this processor: {ratio:.2f} times its time on the model as given (target cpu)",
    )


def _needs(target: Target) -> tuple[str, ...]:
    versions = _versions()
    packages = " ".join(f"{name}=={versions[name]}" for name in PACKAGES if name in versions)
    lines = [f"Python 3.10 or newer with numpy and TVM's runtime (`pip install numpy {packages}`)"]
    if target.device == "cpu":
        lines.append("or, for the C++ runner, `libtvm_runtime.so` and `libtvm_ffi.so` of these packages")
    else:
        lines.append(f"CUDA with NVRTC or nvcc, and a GPU that runs {target.arch}: kernels are compiled when loaded")
    return tuple(lines)


def _code_for(target: Target) -> str:
    processor = target.options.get("processor", "generic")
    host = f"{target.options.get('triple', 'this system')}, {'this processor' if processor == 'host' else processor}"
    return f"{host}; kernels for {target.arch}" if target.device == "gpu" else host


def _text(device: Any) -> dict[str, str]:
    """A TVM target for the manifest."""
    return {key: str(value) for key, value in {"kind": device.kind.name, **dict(device.attrs)}.items()}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
