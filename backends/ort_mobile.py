"""Phones: ONNX Runtime's mobile builds, with the delegates that its execution providers are.

A target's `options`: `file` ("ort": its own format, "onnx"), `style` of the .ort file ("fixed" for the processor,
"runtime" where a delegate cuts the graph on the device), `provider` as the C++ runner names it, `soc` and `arch` for
Hexagon, `needs` of the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.backend import Artefacts, BenchResult
from graphopt.backends import ort_format
from graphopt.backends.ort_mobile_qnn import Compiled, compile_context
from graphopt.backends.ort_mobile_text import ABOUT, ABOUT_CONTEXT, QNN_LICENCE
from graphopt.backends.texts import text
from graphopt.errors import MissingBackendError, ModelError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.delegates import Report
    from graphopt.executor import Session
    from graphopt.target import Target

FILES = {
    "run.py": "ort_run.txt",
    "bench.py": "ort_bench.txt",
    "main.cc": "cpp/ort_main.cc",
    "npz.h": "cpp/npz.h",
    "CMakeLists.txt": "cpp/ort_CMakeLists.txt",
}
"""Files of every bundle, and where their text is."""

MOSTLY = 0.5
"""Share of the work below which the user is told that a delegate hardly takes the model."""


class OrtMobileBackend:
    """The backend `ort-mobile`."""

    name: ClassVar[str] = "ort-mobile"

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run here: always, since this is no phone."""
        return f"{target.name} needs a phone; the same file runs here with `graphopt lower --verify`"

    def missing(self, target: Target) -> None:
        """Nothing: onnxruntime, which graphopt needs anyway, writes all files."""

    def session(self, model: ir.Model | Path, target: Target, *, threads: int = 1) -> Session:
        """None is to be had here.

        Raises:
            MissingBackendError: always.
        """
        raise MissingBackendError(
            str(self.unavailable(target)), where=f"target {target.name!r}", hint="measure there with bench.sh"
        )

    def bench(
        self,
        models: Sequence[ir.Model | Path],
        target: Target,
        feeds: Mapping[str, Array] | None = None,
        *,
        threads: int = 1,
        seconds: float = 2.0,
    ) -> BenchResult:
        """No phone can be measured from here.

        Raises:
            MissingBackendError: always.
        """
        raise MissingBackendError(
            str(self.unavailable(target)), where=f"target {target.name!r}", hint="measure there with bench.sh"
        )

    def lower(
        self,
        model: ir.Model,
        target: Target,
        folder: Path,
        *,
        feeds: Mapping[str, Array] | None = None,
        context: bool = False,
        soc: int | None = None,
        arch: int | None = None,
        qnn_python: str | None = None,
    ) -> Artefacts:
        """Write the model, its runners in Python and C++, and what the delegates would take.

        Args:
            model: what to deploy; not changed.
            target: what it is deployed on.
            folder: gets the files.
            feeds: not used: nothing can be timed here.
            context: put the compiled Hexagon context into the bundle.
            soc: Qualcomm's number of the chip that Hexagon code is made for; None: the target's.
            arch: version of its Hexagon; None: the target's.
            qnn_python: a Python that has onnxruntime-qnn; None: this one, where it has it.

        Raises:
            ModelError: the file would be too large, or a compiler refuses the model.
            MissingBackendError: a Hexagon context is wanted and its compiler is not installed.
            UsageError: an option of Hexagon on a target without it.
        """
        own = target.options
        if own.get("soc") is None and (context or soc or arch or qnn_python):
            raise UsageError(
                f"target {target.name!r} has no Hexagon", where="context, soc, arch, qnn_python", hint="use android-qnn"
            )
        compiled = None
        if own.get("soc") is not None:
            compiled = compile_context(
                model, soc=soc or own["soc"], arch=arch or own["arch"], python=qnn_python,
                keep=folder if context else None,
            )  # fmt: skip
        file = self._write_model(model, target, folder)
        reports = write_reports(model, target.delegates, folder)
        for name, source in FILES.items():
            (folder / name).write_text(text(source), encoding="utf-8")
        (folder / "settings.h").write_text(_settings(file, target), encoding="utf-8")
        (folder / "bench.sh").write_text(text("ort_mobile_bench.txt").replace("{FILE}", file), encoding="utf-8")
        about = {name: line for name, line in ABOUT.items() if (folder / name).exists()}
        return Artefacts(
            model=file,
            run=("python3", "run.py"),
            bench=(),
            about={**about, **(dict.fromkeys(compiled.files, ABOUT_CONTEXT) if compiled else {})},
            needs=tuple(own["needs"]),
            guide=_guide(target, compiled),
            session={
                "device": "cpu",
                "providers": ["CPUExecutionProvider"],
                "provider_options": {},
                "graph_optimization_level": "ORT_ENABLE_ALL",
                "intra_op_num_threads": 1,
                "inter_op_num_threads": 1,
            },
            limits=_limits(target, compiled),
            warnings=_mostly_refused(reports, own["provider"]),
            versions=compiled.found.get("versions", {}) if compiled else {},
            details={
                "provider": own["provider"],
                "delegates": {report.delegate: _figures(report) for report in reports},
                **({"hexagon": {"checked": compiled.checked, **compiled.found}} if compiled else {}),
            },
        )

    def open(self, bundle: Bundle, *, threads: int = 1) -> Session:
        """None is to be had here.

        Raises:
            MissingBackendError: always.
        """
        return self.session(bundle.model, bundle.target, threads=threads)

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[Session, str]:
        """The bundle's own file on this machine's processor."""
        from graphopt.executor import Session

        said = f"the bundle's {bundle.model.name} by ONNX Runtime on this processor, without a delegate"
        return Session(bundle.model, optimize=True, threads=threads), said

    def _write_model(self, model: ir.Model, target: Target, folder: Path) -> str:
        from graphopt.model import save, weight_bytes

        if target.options["file"] == "onnx":
            save(model, folder / "model.onnx")
            return "model.onnx"
        size = weight_bytes(model)
        if size > ort_format.LARGEST:
            raise ModelError(
                f"its weights have {size / 1e9:.1f} GB, and .ort files end at 2 GB",
                hint="quantise it, or lower it with --target cpu-arm64, which keeps the ONNX file",
            )
        ort_format.write_ort(model, folder / "model.ort", style=target.options["style"])
        return "model.ort"


def write_reports(model: ir.Model, names: Sequence[str], folder: Path) -> list[Report]:
    """Write delegates.json and delegates.txt: what each delegate takes, and ONNX Runtime's own estimate beside it."""
    from graphopt.delegates import report
    from graphopt.delegates.ort_checker import CHECKED, estimate
    from graphopt.delegates.text import as_text

    found = [report(model, name) for name in names]
    estimates = {name: estimate(model, name) for name in names if name in CHECKED}
    table = {r.delegate: {**r.as_dict(), "onnxruntime_estimate": None} for r in found}
    shown = []
    for each in found:
        shown.append(as_text(each))
        if each.delegate in estimates:
            other = estimates[each.delegate]
            table[each.delegate]["onnxruntime_estimate"] = other.as_dict()
            shown[-1] += (
                f"  ONNX Runtime's own checker, by operators and ranks alone: {other.taken} of {other.nodes} nodes, "
                f"{other.partitions} parts ({other.advice})\n"
            )
    (folder / "delegates.json").write_text(json.dumps(table, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "delegates.txt").write_text("\n".join(shown), encoding="utf-8")
    return found


def _figures(report: Report) -> dict[str, Any]:
    return {
        "nodes": report.nodes,
        "taken": report.taken,
        "parts": len(report.parts),
        "macs": report.macs,
        "would_help": [change.change for change in report.changes],
        "date": report.date,
    }


def _settings(file: str, target: Target) -> str:
    replay = int(file.endswith(".ort") and target.options["style"] == "runtime")
    return (
        f'#define MODEL "{file}"\n#define PROVIDER "{target.options["provider"]}"\n'
        f"#define RUNTIME_OPTIMIZATIONS {replay}\n"
    )


def _guide(target: Target, compiled: Compiled | None) -> str:
    system = "ios" if target.options["provider"] == "CoreML" else "android"
    guide = text(f"ort_mobile_{system}.txt").strip()
    parts = [guide.replace("{provider}", target.options["provider"]).replace("{operators}", ort_format.OPERATORS)]
    if compiled is not None:
        parts.append(compiled.message)
        if compiled.files:
            parts.append(QNN_LICENCE)
    return "\n\n".join(parts)


def _mostly_refused(reports: Sequence[Report], provider: str) -> tuple[str, ...]:
    """What the user must be told of a model that its delegate hardly takes."""
    best = max(reports, key=lambda report: report.macs)
    if provider == "CPU" or best.macs >= MOSTLY:
        return ()
    return (
        f"{best.title} takes {best.macs:.0%} of the {best.measure}, the processor the rest: "
        "delegates.txt says why and what would help (integers of another target: `dequantize`, then `quantize`)",
    )


def _limits(target: Target, compiled: Compiled | None) -> tuple[str, ...]:
    limits = ["What delegates take is known from tables (delegates.txt); what the device's driver makes of it is not."]
    if target.options["file"] == "ort":
        limits.append(ort_format.DIFFERS)
    if compiled is not None and compiled.checked:
        limits.append("Compiled for Hexagon, not run on one.")
    return tuple(limits)
