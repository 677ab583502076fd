"""TensorRT: bundles that become an engine on the device, every rule of its parser checked before.

TensorRT is not needed to make them, and cannot be installed where graphopt is built. Options of a target say:

    tensorrt        the oldest version that has to take the file
    typing          "strong": networks compute in the types of the file (TensorRT 10 and newer); "weak": a float32 file
                    is built with --fp16 --int8 (up to TensorRT 10)
    jetpack         the system that has it
    strong_target   the target to take where weak typing is gone
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.backend import Artefacts, BenchResult
from graphopt.backends.tensorrt_profiles import Profiles, profiles, quoted, spec
from graphopt.backends.tensorrt_session import SCRIPTS, EngineSession, has_trtexec, runner_module
from graphopt.backends.texts import text
from graphopt.benching import bench_result, feeds_for
from graphopt.errors import MissingBackendError
from graphopt.tensorrt.versions import version_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import RunnableSession
    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.executor import Session
    from graphopt.sparsity.verdicts import Eligibility
    from graphopt.target import Target
    from graphopt.tensorrt import Finding

ENGINE = "model.engine"
SAMPLE = "sample"
NARROW = {"int64": "int32", "float64": "float32"}
"""Types of inputs that TensorRT before 9.0 casts down; float64 in every version."""

GUIDE = """\
Build the engine on the device, once for each device and version of TensorRT (minutes; the timing cache makes it faster
when it is done again):

    sh build_engine.sh

Further words are options of trtexec (`--verbose` names the layers that run sparsely). Shapes are in `engine.conf`,
which may be edited. Without Python on the device, trtexec runs the engine on raw files: see `--loadInputs` in
`bench.sh`.

"""

TYPINGS = {
    "strong": """\
The file is strongly typed: layers compute in its types, float16 where it says so, integers between Q/DQ. TensorRT 10
builds it with `--stronglyTyped`, TensorRT 11 without a flag (it has no other networks). For TensorRT 8.6 (JetPack 6.0),
which cannot read Q/DQ of float16, take target `jetson-orin-trt8`.
""",
    "weak": """\
The file is float32, with Q/DQ where it is quantised, built with `--fp16 --int8`: TensorRT takes float16 where that is
faster. That is for TensorRT 8.6 to 10; weak typing is deprecated since 10.12 and gone from 11: there take target
`jetson-orin` or `tensorrt`.
""",
}
"""How a bundle is typed, and which versions that fits, for its reader."""


class TensorRtBackend:
    """The backend `tensorrt`."""

    name: ClassVar[str] = "tensorrt"

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run on this machine; None where they can."""
        runner = runner_module(Path())
        engine, provider = runner.why_no_engine(), runner.why_no_onnxruntime()
        if engine is None:
            return (
                None
                if has_trtexec()
                else "trtexec, which builds the engine, is not here (JetPack: apt install libnvinfer-bin)"
            )
        if provider is None:
            return None
        return f"TensorRT is not here: missing {engine}, or {provider}; it runs on the device alone"

    def missing(self, target: Target) -> str | None:
        """Nothing: engines are built on the device."""
        return None

    def session(self, model: ir.Model | Path, target: Target, *, threads: int = 1) -> EngineSession:
        """Build an engine of the model and load it.

        Raises:
            MissingBackendError: TensorRT is not on this machine, or refuses the model.
            ModelError: it breaks a rule of TensorRT.
        """
        from graphopt.lowering.steps import lower
        from graphopt.model import load

        self._require(target)
        loaded = load(model) if isinstance(model, Path) else model
        with tempfile.TemporaryDirectory() as folder:
            return self.open(lower(loaded, target, Path(folder) / "bundle"), threads=threads)

    def bench(
        self,
        models: Sequence[ir.Model | Path],
        target: Target,
        feeds: Mapping[str, Array] | None = None,
        *,
        threads: int = 1,
        seconds: float = 2.0,
    ) -> BenchResult:
        """Measure the models, paired and interleaved, copies to and from the device included.

        Args:
            models: the first is the reference of all ratios.
            target: where they run.
            feeds: one batch of inputs; None: random inputs.
            threads: not used: the GPU computes.
            seconds: time to spend on measured rounds.

        Raises:
            MissingBackendError: TensorRT is not on this machine.
            ModelError: a model breaks a rule of TensorRT.
        """
        from graphopt.model import load
        from graphopt.timing import paired

        self._require(target)
        loaded = [load(model) if isinstance(model, Path) else model for model in models]
        ready = feeds_for(loaded, feeds)
        sessions = [self.session(model, target) for model in loaded]
        try:
            result = paired([partial(session.run, ready) for session in sessions], seconds)
        finally:
            for session in sessions:
                session.close()
        return bench_result(result, ready, threads=threads)

    def lower(
        self,
        model: ir.Model,
        target: Target,
        folder: Path,
        *,
        feeds: Mapping[str, Array] | None = None,
        sizes: str | None = None,
    ) -> Artefacts:
        """Write model.onnx, the scripts that build and time an engine, and a runner.

        Args:
            model: what to deploy; not changed.
            target: what it is deployed on.
            folder: gets the files.
            feeds: one real input: written as raw files, on which bench.sh runs.
            sizes: ranges of open dimensions: "batch=1:8:32,seq=1:64:512".

        Raises:
            ModelError: it breaks a rule of TensorRT; names the nodes and what to do.
            UsageError: `sizes` is wrong.
        """
        from graphopt.model import save
        from graphopt.quantization.back.recognised import holds_quantised
        from graphopt.sparsity.eligibility import eligibility
        from graphopt.sparsity.marks import declared_pattern
        from graphopt.tensorrt import validate
        from graphopt.tensorrt.validate import parts, require_valid

        least = str(target.options.get("tensorrt", "10.3"))
        found = validate(model, target, least)
        require_valid(found, target, parts(model))
        sample = feeds_for([model], feeds)
        shapes = profiles(model, sizes or "", sample)
        sparse = eligibility(model, target).sparse()
        session = {
            "typing": target.options.get("typing", "strong"),
            "tensorrt": least,
            "int8": bool(holds_quantised(model)),
            "sparse_layers": sum(row.verdict != "not" for row in sparse.layers),
            "profiles": shapes.inputs,
            "sample": {},
        }
        save(model, folder / "model.onnx")
        if feeds is not None:
            session["sample"] = _write_sample(folder, sample, narrow=version_of(least) < (9, 0))
        _write_scripts(folder, session, target)
        return Artefacts(
            model="model.onnx",
            run=("python3", "run.py"),
            bench=(),
            about=_about(folder),
            needs=_needs(target),
            guide=GUIDE + TYPINGS[session["typing"]],
            session=session,
            limits=tuple(f.sentence() for f in found),
            warnings=_warnings(shapes, sparse, meant=any(declared_pattern(n) for n in model.graph.all_nodes())),
            details={"tensorrt": {"findings": [_row(f) for f in found], "sparsity": sparse.to_dict()}},
        )

    def open(self, bundle: Bundle, *, threads: int = 1) -> EngineSession:
        """Build the engine of a bundle and load it.

        Of the bundle only the model and what the manifest says are used: its scripts are programs, these here are ours.

        Raises:
            MissingBackendError: TensorRT is not on this machine, or refuses the model.
        """
        self._require(bundle.target)
        folder = Path(tempfile.mkdtemp(prefix="graphopt-tensorrt-"))
        for path in bundle.files:
            if path.suffix not in (".sh", ".py", ".conf", ".md") and path.parent == bundle.folder:
                shutil.copy(path, folder / path.name)
        _write_scripts(folder, {**bundle.manifest["session"], "sample": {}}, bundle.target)
        return EngineSession(bundle, runner_module(folder), folder)

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[RunnableSession, str]:
        """The same file on this machine's processor, every Q and DQ computed as the standard says."""
        from graphopt.executor import Session

        session: Session = Session(bundle.model, optimize=False, threads=threads)
        return (
            session,
            "the bundle's model.onnx by ONNX Runtime on this processor, Q/DQ computed in float; not by TensorRT",
        )

    def _require(self, target: Target) -> None:
        reason = self.unavailable(target)
        if reason is not None:
            raise MissingBackendError(
                reason, where=f"target {target.name!r}", hint="copy the bundle to the device; its README says the rest"
            )


def _write_scripts(folder: Path, session: Mapping[str, Any], target: Target) -> None:
    for name, source in SCRIPTS.items():
        (folder / name).write_text(text(source), encoding="utf-8")
    (folder / "engine.conf").write_text(_settings(session, target), encoding="utf-8")


def _settings(session: Mapping[str, Any], target: Target) -> str:
    """engine.conf: settings of the scripts, quoted for the shell."""
    shapes = {kind: spec({name: p[kind] for name, p in session["profiles"].items()}) for kind in ("min", "opt", "max")}
    sample = session["sample"]
    timed = spec({name: sample[name]["shape"] for name in session["profiles"]}) if sample else shapes["opt"]
    major, minor = version_of(session["tensorrt"])
    values = {
        "ENGINE": ENGINE,
        "TYPING": session["typing"],
        "INT8": int(session["int8"]),
        "SPARSE_LAYERS": session["sparse_layers"],
        "TENSORRT_LEAST": major * 100 + minor,
        "JETPACK": target.options.get("jetpack", ""),
        "STRONG_TARGET": target.options.get("strong_target", target.name),
        "MIN_SHAPES": shapes["min"],
        "OPT_SHAPES": shapes["opt"],
        "MAX_SHAPES": shapes["max"],
        "BENCH_SHAPES": timed,
        "LOAD_INPUTS": ",".join(f"{quoted(name)}:{entry['file']}" for name, entry in sample.items()),
    }
    lines = ["# Settings of build_engine.sh and bench.sh; shapes of free dimensions may be changed."]
    return "\n".join([*lines, *(f"{key}={shlex.quote(str(value))}" for key, value in values.items())]) + "\n"


def _write_sample(folder: Path, sample: Mapping[str, Array], *, narrow: bool) -> dict[str, dict[str, Any]]:
    """One input as raw files for trtexec --loadInputs, in the types that the engine takes."""
    import numpy as np

    made: dict[str, dict[str, Any]] = {}
    (folder / SAMPLE).mkdir()
    for number, (name, array) in enumerate(sample.items()):
        kind = NARROW.get(array.dtype.name) if narrow or array.dtype.name == "float64" else None
        file = f"{SAMPLE}/{number}.bin"
        (folder / file).write_bytes(np.ascontiguousarray(array, dtype=kind).tobytes())
        made[name] = {"file": file, "shape": list(array.shape), "dtype": kind or array.dtype.name}
    return made


def _about(folder: Path) -> dict[str, str]:
    about = {
        "model.onnx": "the model; the engine is made of it on the device",
        "build_engine.sh": "builds model.engine with trtexec",
        "bench.sh": "times the engine with trtexec; one line of JSON",
        "trt_common.sh": "what both scripts share: they find trtexec and ask its version",
        "engine.conf": "settings of the scripts: typing, sparsity, shapes",
        "run.py": "runs the engine: numpy, tensorrt and cuda-python, or onnxruntime with TensorRT",
    }
    for path in sorted((folder / SAMPLE).glob("*.bin")) if (folder / SAMPLE).is_dir() else ():
        about[f"{SAMPLE}/{path.name}"] = "an input of the calibration data, raw, for trtexec --loadInputs"
    return about


def _needs(target: Target) -> tuple[str, ...]:
    least, jetpack = target.options.get("tensorrt", "10.3"), target.options.get("jetpack", "")
    last = " to 10.x" if target.options.get("typing") == "weak" else " or newer"
    return (
        f"TensorRT {least}{last} with trtexec" + (f" ({jetpack})" if jetpack else ""),
        "for run.py: Python 3.8 or newer with numpy, and tensorrt with cuda-python, or onnxruntime with TensorRT",
    )


def _warnings(shapes: Profiles, sparse: Eligibility, *, meant: bool) -> tuple[str, ...]:
    told = []
    if shapes.guessed:
        named = ", ".join(shapes.guessed)
        told.append(
            f"nobody gave a range for the open dimensions {named}: the engine takes one size only; give one "
            f"(--set sizes={shapes.guessed[0]}=LEAST:USUAL:LARGEST), or edit engine.conf before it is built"
        )
    if meant and sparse.layers and not any(row.verdict == "may" for row in sparse.layers):
        told.append(f"{sparse.summary()}: TensorRT will hardly choose sparse kernels")
    return tuple(told)


def _row(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule, "severity": finding.severity, "nodes": list(finding.nodes), "text": finding.text,
        "hint": finding.hint, "source": finding.source,
    }  # fmt: skip
