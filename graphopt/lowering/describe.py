"""The manifest of a bundle: one description for all backends, made of what is known and of what the backend tells.

Schema 2: `target` (its table), `source` (the model's file and hash), `model` (the file that is executed), `inputs` and
`outputs` (name, dtype, shape; free dimensions are names or null), `opset`, `ir_version`, `run` and `bench` (commands as
words), `about` (what each file is), `needs`, `guide`, `session`, `pipeline` (`optimize`: the spec that made the model,
`prepare`: what the target's own passes did), `calibration` (name, samples, sha256), `versions`, `measured` (a time on
this machine), `verified` (the difference to the model), `report` (accuracy, fidelity and latency of the run that made
the model), `limits`, `warnings`, `files` (sha256 and bytes of each file), and what only one backend has to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.bundle import describe_model, target_table
from graphopt.version import versions

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import Artefacts
    from graphopt.calibration import Calibration
    from graphopt.report.data import PassRecord
    from graphopt.target import Target

REPORTED = ("model", "pipeline", "seed", "input", "output", "latency", "fidelity", "accuracy", "gates", "warnings")
"""What of a report belongs into a manifest: where the model comes from, and its measured numbers."""


def describe(
    model: ir.Model,
    target: Target,
    made: Artefacts,
    *,
    source: Mapping[str, Any] | None,
    prepared: list[PassRecord],
    report: Mapping[str, Any] | None,
    calibration: Calibration | None,
    not_run: str | None,
) -> dict[str, Any]:
    """What the manifest says, but for `files` and `verified`.

    Args:
        model: as it was handed to the backend.
        target: what it is deployed on.
        made: what the backend says.
        source: name and hash of the file that the model comes from.
        prepared: what the target's own passes did.
        report: JSON form of the report that made the model.
        calibration: the data that was at hand.
        not_run: why nothing could be run here.
    """
    limits = [*target.limits, *made.limits]
    if not_run is not None:
        limits.insert(0, f"Made on a machine that cannot run it ({not_run}): no time was measured.")
    return {
        "target": target_table(target),
        "source": None if source is None else dict(source),
        "model": made.model,
        **describe_model(model),
        "opset": dict(sorted(model.opset_imports.items())),
        "ir_version": model.ir_version,
        "run": list(made.run),
        "bench": list(made.bench),
        "about": dict(made.about),
        "needs": list(made.needs),
        "guide": made.guide,
        "session": dict(made.session),
        "pipeline": {
            "optimize": None if report is None else report.get("pipeline"),
            "prepare": [_prepared(record) for record in prepared],
        },
        "calibration": None if calibration is None else _calibration(calibration),
        "versions": {**versions(), **made.versions},
        "measured": None if made.measured is None else dict(made.measured),
        "verified": None,
        "report": {} if report is None else _reported(report),
        "limits": limits,
        "warnings": [*_warnings(prepared), *made.warnings],
        **made.details,
    }


def _prepared(record: PassRecord) -> dict[str, Any]:
    outputs = record.verification.outputs if record.verification is not None else []
    return {
        "pass": record.spec,
        "status": record.status,
        "nodes": [stats.nodes for stats in (record.before, record.after) if stats is not None],
        "relative": max((output.rel_l2 for output in outputs), default=None),
        "notes": list(record.notes),
    }


def _warnings(prepared: list[PassRecord]) -> list[str]:
    """What the target's own passes warn of, once; whatever they say to warn is in their notes, marked."""
    mark = "warning: "
    told = (f"{r.name}: {note.removeprefix(mark)}" for r in prepared for note in r.notes if note.startswith(mark))
    return list(dict.fromkeys(told))


def _reported(report: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: report[key] for key in REPORTED if report.get(key) is not None}
    # Where a file lay on the machine that made the bundle is nobody else's business.
    return told | ({"model": Path(told["model"]).name} if "model" in told else {})


def _calibration(data: Calibration) -> dict[str, Any]:
    return {"name": Path(data.name).name, "samples": data.samples, "sha256": data.fingerprint()}
