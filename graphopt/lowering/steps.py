"""The road from a model to a bundle: refuse, prepare, make, compare, describe, put in place; the last step writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import bundle, registry
from graphopt.errors import GraphoptError, MissingBackendError, ModelError, UsageError
from graphopt.lowering.describe import describe
from graphopt.lowering.options import check_options, takes_reference
from graphopt.lowering.portable import check_caps, refuse_free_sizes, refuse_private, strip_unused_imports
from graphopt.lowering.readme import write_bench, write_readme
from graphopt.lowering.verified import verify_bundle

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import Backend
    from graphopt.bundle import Bundle
    from graphopt.calibration import Calibration
    from graphopt.data.feeds import Array
    from graphopt.report.data import PassRecord
    from graphopt.target import Target

VERIFY_SAMPLES = 4
"""Inputs on which a bundle is compared with its model."""


def lower(
    model: ir.Model,
    target: Target,
    folder: Path,
    *,
    source: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    verify: bool = False,
    tolerance: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Bundle:
    """Make the bundle of a target: complete, or not at all.

    Args:
        model: what to deploy; not changed.
        target: what it is deployed on.
        folder: the destination.
        source: `name` and `sha256` of the file that the model comes from.
        report: JSON form of the report that made the model.
        calibration: real inputs: for the time in the manifest, for `prepare` and `verify`.
        verify: run the bundle, or what stands in for it here, beside the model; the difference goes into the manifest.
        tolerance: relative difference that `verify` allows; None: what counts as rounding.
        seed: of random inputs.
        options: of the backend alone (`graphopt.lowering.options`).

    Raises:
        MissingBackendError: a tool that the target needs is not installed.
        ModelError: the target cannot take the model; names the node.
        VerificationError: the bundle computes something else; nothing was written.
        UsageError: the folder or the tolerance cannot be used, or the backend has no such option.
    """
    if tolerance is not None and not (verify and 0 <= tolerance < math.inf):
        what = f"{tolerance} is no difference" if verify else "says how far --verify may differ, and it was not given"
        raise UsageError(what, where="tolerance", hint="give --verify and a number from 0 on")
    backend = registry.backend(target.backend)
    own = check_options(backend, options or {})
    check_tools(backend, target)
    refuse_private(model)
    refuse_free_sizes(model, target)
    refuse_quantised(model, target)
    ready, prepared = prepare(model, target, calibration, seed)
    ready = strip_unused_imports(ready)
    check_caps(ready, target)
    feeds = None if calibration is None else next(iter(calibration.batches(batch_size=1, limit=1)), None)

    if takes_reference(backend):
        own["reference"] = model

    def fill(stage: Path) -> dict[str, Any]:
        made = backend.lower(ready, target, stage, feeds=feeds, **own)
        manifest = describe(
            ready, target, made, source=source, prepared=prepared, report=report, calibration=calibration,
            not_run=backend.unavailable(target),
        )  # fmt: skip
        if verify:
            draft = bundle.Bundle(stage, manifest, stage / made.model, target)
            kind, batches = _inputs(ready, calibration, seed)
            rounded = any(record.changed and record.effect == "lossy" for record in prepared)
            manifest["verified"] = verify_bundle(
                backend, draft, model, ready, batches, inputs=kind, rounded=rounded, tolerance=tolerance
            )
        write_bench(stage, manifest)
        write_readme(stage, manifest)
        return manifest

    return bundle.write(folder, fill)


def check_tools(backend: Backend, target: Target) -> None:
    """Refuse a target whose bundles cannot be made on this machine.

    Raises:
        MissingBackendError: names what to install.
    """
    reason = backend.missing(target)
    if reason is not None:
        raise MissingBackendError(
            reason, where=f"target {target.name!r}", hint="install it, or choose another target (`graphopt targets`)"
        )


def refuse_quantised(model: ir.Model, target: Target) -> None:
    """Refuse a quantised model where the target takes none.

    Raises:
        ModelError: names the first node, and why.
    """
    from graphopt.quantization.back.recognised import is_quantised

    if not target.quant_refusal:
        return
    for node in model.graph.all_nodes():
        if is_quantised(node):
            raise ModelError(
                f"target {target.name!r} takes no quantised model: {target.quant_refusal}",
                where=f"node {node.name or '(unnamed)'} ({node.op_type})",
                hint="lower the float model, or take it back with `graphopt optimize --passes dequantize`",
            )


def prepare(
    model: ir.Model, target: Target, calibration: Calibration | None = None, seed: int = 0
) -> tuple[ir.Model, list[PassRecord]]:
    """Run the target's own pipeline on a copy of the model, with the checks that every run has.

    Returns:
        the model as the backend takes it (itself where the target has no pipeline), and what each pass did.

    Raises:
        VerificationError: a pass changed what the model computes.
        GraphoptError: a pass refused; says that it belongs to the target.
    """
    if not target.prepare:
        return model, []
    from graphopt.base import Context
    from graphopt.manager import PassManager
    from graphopt.pipeline.verify_each import VerifyEach
    from graphopt.progress import Silent
    from graphopt.spec import parse

    ctx = Context(target, calibration, None, seed, jobs=1, progress=Silent())
    manager = PassManager(parse(target.prepare), [VerifyEach("numeric")])
    try:
        return manager.run(model, ctx), manager.records
    except GraphoptError as error:
        error.where = f"preparing for target {target.name!r}: {error.where or 'the model'}"
        raise


def _inputs(model: ir.Model, calibration: Calibration | None, seed: int) -> tuple[str, list[Mapping[str, Array]]]:
    from graphopt.verify import random_feeds

    if calibration is None:
        return "random", list(random_feeds(model, seed, samples=VERIFY_SAMPLES))
    return "calibration", list(calibration.batches(batch_size=1, limit=VERIFY_SAMPLES))
