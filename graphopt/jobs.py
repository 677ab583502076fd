"""The jobs beside `optimize` and `inspect`, one function each; the command line prints what they return."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import registry
from graphopt.errors import DataError, MissingBackendError, UsageError
from graphopt.given import called, check_same_inputs, one_batch, opened
from graphopt.pipeline.plan import as_target

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from graphopt.backend import BenchResult
    from graphopt.bundle import Bundle
    from graphopt.diagnosis.layers import LayerErrors
    from graphopt.latency.report import Measured
    from graphopt.target import Target
    from graphopt.verify import Comparison

    Array = np.ndarray[Any, Any]


def compare(
    a: ir.Model | str | os.PathLike[str],
    b: ir.Model | str | os.PathLike[str],
    *,
    calib: Any = None,
    seed: int = 0,
    samples: int = 4,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
) -> Comparison:
    """Run two models on the same data and measure how far their outputs are apart.

    Args:
        a: the reference.
        b: the other one.
        calib: whatever `graphopt.calibration.load` takes; None: random inputs in plausible ranges.
        seed: of the random inputs.
        samples: how many random inputs.
        dim: fixed sizes of symbolic input dimensions, in both.
        input_shape: fixed shapes of inputs by name, in both.

    Raises:
        VerificationError: the second model lacks an output, or one has another shape or type.
        ModelError, DataError: a model or the data is not valid, or the models have different inputs.
    """
    from graphopt import calibration, verify

    first, second = opened(a, dim, input_shape), opened(b, dim, input_shape)
    check_same_inputs([first, second], [called(a, "A"), called(b, "B")])
    if calib is None:
        feeds = verify.random_feeds(first, seed, samples=samples)
        return verify.compare(first, second, feeds)
    return verify.compare(first, second, calibration.load(calib, first, seed=seed).batches())


def compare_layers(
    a: ir.Model | str | os.PathLike[str],
    b: ir.Model | str | os.PathLike[str],
    *,
    calib: Any = None,
    seed: int = 0,
    samples: int = 4,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
) -> LayerErrors:
    """Find out which layers of a model make its error against the model it was made of, and what to leave in float.

    Args:
        a, b, calib, seed, samples, dim, input_shape: as in `compare`.

    Raises:
        VerificationError: the second model fails where the first one runs.
        ModelError, DataError: a model or the data is not valid, or the models have no input or tensor in common.
    """
    from graphopt import calibration, verify
    from graphopt.diagnosis.layers import layer_errors

    first, second = opened(a, dim, input_shape), opened(b, dim, input_shape)
    check_same_inputs([first, second], [called(a, "A"), called(b, "B")])
    given = verify.random_feeds(first, seed, samples=samples) if calib is None else calib
    found = layer_errors(first, second, calibration.load(given, first, seed=seed))
    if calib is None:
        found.notes.insert(0, "compared on random numbers, which says little about real inputs; give data with --calib")
    return found


def bench(
    models: Sequence[ir.Model | str | os.PathLike[str]],
    target: Target | str = "cpu",
    *,
    calib: Any = None,
    threads: int = 1,
    seconds: float = 2.0,
    batch: int = 1,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
) -> BenchResult:
    """Measure models in turn on a target; ratios are to the first.

    Args:
        models: ONNX files or loaded models with the same inputs.
        target: where to run; it must be able to run here.
        calib: data to take one batch of real inputs from; None: random inputs.
        threads: threads of one session.
        seconds: time to spend on measured rounds.
        batch: samples of real inputs per run, where the model leaves that open.
        dim: fixed sizes of symbolic input dimensions.
        input_shape: fixed shapes of inputs, by name.

    Raises:
        MissingBackendError: the target cannot run here.
        ModelError, DataError: a model or the data is not valid, or the models have different inputs.
        UsageError: no model was given.
    """
    if not models:
        raise UsageError("no model was given", hint="give one or more ONNX files")
    chosen = as_target(target)
    loaded = [opened(model, dim, input_shape) for model in models]
    check_same_inputs(loaded, [called(model, f"model {number}") for number, model in enumerate(models, 1)])
    feeds = None if calib is None else one_batch(calib, loaded[0], batch)
    return registry.backend(chosen.backend).bench(loaded, chosen, feeds, threads=threads, seconds=seconds)


def latency_table(
    model: ir.Model | str | os.PathLike[str],
    target: Target | str = "cpu",
    *,
    calib: Any = None,
    threads: int = 1,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
) -> Measured:
    """Measure the layers of a model at all widths that pruning can give them, and keep the times for this machine.

    Args:
        model: an ONNX file or a loaded model; not changed.
        target: where to run; it must be able to run here.
        calib: data whose first sample gives the sizes that the model leaves open; None: each of them is 1.
        threads: threads of one session.
        dim: fixed sizes of symbolic input dimensions.
        input_shape: fixed shapes of inputs, by name.

    Raises:
        MissingBackendError: the target cannot run here.
        ModelError, DataError: the model, the data or the file of the table is not valid.
    """
    from graphopt.latency.report import measured
    from graphopt.verify import random_feeds

    loaded = opened(model, dim, input_shape)
    feeds = random_feeds(loaded, 0, samples=1)[0] if calib is None else one_batch(calib, loaded, 1)
    return measured(loaded, as_target(target), feeds, threads)


def lower(
    model: ir.Model | str | os.PathLike[str],
    target: Target | str,
    folder: str | os.PathLike[str],
    *,
    calib: Any = None,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    verify: bool = False,
    tolerance: float | None = None,
    **options: Any,
) -> Bundle:
    """Write the deployable bundle of a target.

    Args:
        model: an ONNX file or a loaded model.
        target: what it is deployed on.
        folder: gets the bundle.
        calib: real inputs, for the time in the manifest, for `verify`, and for passes that prepare the model for the
            target; None: random inputs.
        dim: fixed sizes of symbolic input dimensions.
        input_shape: fixed shapes of inputs, by name.
        seed: of random inputs.
        verify: run the bundle beside the model; the difference goes into the manifest.
        tolerance: relative difference that `verify` allows; None: by the number formats on the way.
        **options: of the target's backend alone, such as `compress=True` or `tune=600`; `graphopt targets NAME` lists
            them. None and False mean: not given.

    Returns:
        the bundle; `files` lists what was written, `manifest` tells about it.

    Raises:
        MissingBackendError: a tool that the target needs is not installed.
        ModelError: the target cannot take the model; names the node.
        VerificationError: the bundle computes something else; nothing was written.
        UsageError: the folder cannot be used, or the backend has no such option.
    """
    from graphopt import calibration
    from graphopt.bundle import sha256
    from graphopt.lowering.options import check_options
    from graphopt.lowering.steps import check_tools
    from graphopt.lowering.steps import lower as make

    chosen = as_target(target)
    backend = registry.backend(chosen.backend)
    check_options(backend, options)
    check_tools(backend, chosen)
    loaded = opened(model, dim, input_shape)
    source = None
    if isinstance(model, (str, os.PathLike)):
        source = {"name": Path(model).name, "sha256": sha256(Path(model))}
    return make(
        loaded,
        chosen,
        Path(folder),
        source=source,
        calibration=None if calib is None else calibration.load(calib, loaded, seed=seed),
        verify=verify,
        tolerance=tolerance,
        seed=seed,
        options=options,
    )


def run(
    bundle: str | os.PathLike[str], inputs: str | os.PathLike[str] | Mapping[str, Array], *, threads: int = 1
) -> dict[str, Array]:
    """Execute a bundle on one batch of inputs.

    Args:
        bundle: folder that `lower` wrote; its files are checked against the manifest.
        inputs: arrays by input name, or an `.npz` file of them; labels may lie beside them.
        threads: threads of the session.

    Returns:
        the outputs by name.

    Raises:
        ModelError: the bundle is incomplete or damaged.
        MissingBackendError: its target cannot run here.
        DataError: the inputs do not fit.
    """
    from graphopt.bundle import read
    from graphopt.data.feeds import IGNORED_KEYS
    from graphopt.files.arrays import read_npz

    found = read(bundle)
    backend = registry.backend(found.target.backend)
    reason = backend.unavailable(found.target)
    if reason is not None:
        raise MissingBackendError(
            reason,
            where=f"target {found.target.name!r}",
            hint=f"copy the bundle to such a device and use {shlex.join(found.manifest['run'])}",
        )
    arrays = read_npz(Path(inputs)) if isinstance(inputs, (str, os.PathLike)) else dict(inputs)
    names = {value["name"] for value in found.manifest["inputs"]}
    calls = [key for key in arrays if key not in names and key.partition("|")[2] in names]
    if calls:
        raise DataError(
            f"its keys name samples and inputs, such as {calls[0]!r}, and a bundle runs one call",
            where="inputs" if isinstance(inputs, Mapping) else os.fspath(inputs),
            hint=f"store the arrays of one call under {', '.join(sorted(names))}",
        )
    given = {key: array for key, array in arrays.items() if key in names or key not in IGNORED_KEYS}
    return dict(backend.open(found, threads=threads).run(given))


def describe_target(name: str) -> dict[str, Any]:
    """The table of a target, and whether this machine can run it and write its bundles: True, or why not.

    Raises:
        UsageError: there is no such target.
    """
    from graphopt.bundle import target_table
    from graphopt.lowering.options import options_of

    target = registry.target(name)
    options: dict[str, str] = {}
    try:
        backend = registry.backend(target.backend)
        reason, missing = backend.unavailable(target), backend.missing(target)
        options = options_of(backend)
    except MissingBackendError as error:
        reason = missing = str(error)
    table = target_table(target)
    if not target.sparsity_2_4:
        del table["sparse"]
    return {
        **_flat(table),
        "lower options": [f"{name}: {kind}" for name, kind in options.items()],
        "runs here": reason is None,
        "why not": reason,
        "lowers here": missing is None,
        "why not lowered": missing,
    }


def _flat(table: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{head}{key}.") if isinstance(value, Mapping) else {f"{head}{key}": value}
    return found


def describe_passes() -> list[dict[str, Any]]:
    """A row for every installed pass; one that cannot be loaded says why and does not hide the others."""
    from graphopt.errors import GraphoptError
    from graphopt.pipeline.describe import describe

    rows: list[dict[str, Any]] = []
    for name in registry.passes():
        try:
            found = describe(registry.pass_class(name))
        except GraphoptError as error:
            rows.append({"pass": name, "effect": "", "calibration": None, "does": f"cannot be loaded: {error}"})
        else:
            rows.append(
                {
                    "pass": name,
                    "effect": found.effect,
                    "calibration": found.needs_calibration,
                    "does": found.summary,
                }
            )
    return rows


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Array]) -> None:
    """Write arrays as one `.npz` file, complete or not at all.

    Raises:
        DataError: an array cannot be stored without pickling.
        UsageError: the file cannot be written.
    """
    import tempfile
    import zipfile

    import numpy as np

    path = Path(path)
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise DataError("strings of free length cannot be stored", where=f"output {name!r}", hint="use Python")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", suffix=".npz", delete=False) as file:
            stage = Path(file.name)
            try:
                # Not np.savez, whose own arguments are names that outputs may have ("file").
                with zipfile.ZipFile(file, "w") as archive:
                    for name, array in arrays.items():
                        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
                stage.replace(path)
            except BaseException:
                stage.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path), hint="choose another file") from error
