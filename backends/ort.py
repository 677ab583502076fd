"""ONNX Runtime: runs, measures and bundles ONNX models on every device it has an execution provider for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt import bundle
from graphopt.backend import Artefacts, BenchResult
from graphopt.backends import ort_format
from graphopt.backends.ort_providers import Settings, chosen, fell_back, missing_provider, needs, settings, unprofiled
from graphopt.backends.texts import text
from graphopt.errors import DataError, MissingBackendError
from graphopt.lowering.portable import beyond_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.executor import Session
    from graphopt.target import Target

TOGETHER = 256 << 20
"""Bytes of weights of all models that are timed interleaved; beyond, one is in memory at a time. A session holds about
twice the weights of its model: the runtime keeps them in the order that its kernels read, too.
"""

ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64", "aarch64": "aarch64"}
"""Target architectures by the name that the operating system gives the machine, lower case."""

ABOUT = {
    "model.onnx": "the model, portable ONNX",
    "run.py": "runs the model: numpy and onnxruntime, nothing else",
    "bench.py": "times the model; one line of JSON",
}
"""The files of every bundle."""

LOWER_SECONDS = 1.0
"""Time that `lower` spends on measuring, where the target can run here."""


class OrtBackend:
    """The backend `ort`: processors, and whatever execution providers a target names."""

    name: ClassVar[str] = "ort"

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run on this machine; None where they can."""
        reason = missing_provider(target)
        if reason is not None:
            return reason
        here = ARCHITECTURES.get(platform.machine().lower(), platform.machine().lower())
        if target.device == "cpu" and here != target.arch:
            return f"this machine is {here}, the target {target.arch}"
        return None

    def missing(self, target: Target) -> str | None:
        """Nothing: bundles are ONNX files."""
        return None

    def session(self, model: ir.Model | Path, target: Target, *, threads: int = 1) -> Session:
        """A session with all of the runtime's optimisations on, on the target's own device.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: the runtime refuses the model.
        """
        from graphopt.model import load

        of: Settings = {}
        if target.options:
            loaded = load(model, check_weights=False) if isinstance(model, Path) else model
            of = settings(loaded, target, None, bundled=False)
        return self._session(model, target, of, Path(), threads)

    def _session(self, model: ir.Model | Path, target: Target, of: Settings, folder: Path, threads: int) -> Session:
        from graphopt.executor import Session

        reason = self.unavailable(target)
        if reason is None:
            made = Session(model, optimize=True, threads=threads, providers=chosen(target, of, folder))
            reason = fell_back(made.session, target)
            if reason is None:
                return made
            made.close()
        raise MissingBackendError(
            reason, where=f"target {target.name!r}", hint="run it on such a device, or choose another target"
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
        """Measure the models, paired and interleaved, large ones in turns; see `graphopt.timing`.

        Args:
            models: the first is the reference of all ratios.
            target: where they run.
            feeds: one batch of inputs for all models; None: random inputs (`graphopt.data.random_feeds`), batch 1.
            threads: threads of one session.
            seconds: time to spend on measured rounds.

        Raises:
            MissingBackendError: the target cannot run here.
            ModelError: the runtime refuses a model.
            DataError: the feeds do not fit a model.
        """
        import onnxruntime as ort

        from graphopt.timing import in_turns, paired

        feeds = _random(models) if feeds is None else feeds
        inputs: list[Any] = []

        @contextmanager
        def ready(model: ir.Model | Path) -> Iterator[Callable[[], object]]:
            with self.session(model, target, threads=threads) as session:
                inputs[:] = session.inputs
                yield _call(session, feeds)

        if _weights(models) > TOGETHER:
            result = in_turns([partial(ready, model) for model in models], seconds)
        else:
            with ExitStack() as stack:
                result = paired([stack.enter_context(ready(model)) for model in models], seconds)
        return BenchResult(
            milliseconds=result.milliseconds,
            ratios=result.ratios,
            low=result.low,
            high=result.high,
            rounds=result.rounds,
            threads=threads,
            batch=_batch(inputs, feeds),
            details={
                "onnxruntime": ort.__version__,
                "providers": list(target.providers),
                "within_noise": list(result.within_noise),
                "shapes": {name: list(array.shape) for name, array in feeds.items()},
                **bundle.describe_machine(),
            },
        )

    def lower(
        self,
        model: ir.Model,
        target: Target,
        folder: Path,
        *,
        feeds: Mapping[str, Array] | None = None,
        compress: bool = False,
        ort: bool = False,
        sizes: str | None = None,
    ) -> Artefacts:
        """Write model.onnx, run.py and bench.py; model.ort and required_operators.config where they are wanted.

        The ONNX file stays portable: what the runtime makes of it when it loads it belongs to one machine and version.

        Args:
            model: what to deploy; not changed.
            target: what it is deployed on.
            folder: gets the files.
            feeds: one batch of real inputs for timing.
            compress: store weights with many zeros as values and positions, which the runtime unpacks when it loads.
            ort: also the file in ONNX Runtime's own format, which the target's `artefacts` may ask for as well.
            sizes: ranges of open dimensions for TensorRT: "batch=1:8:32,seq=1:64:512".

        Raises:
            ModelError: ONNX Runtime cannot load it.
            UsageError: the ranges do not fit the model.
        """
        from graphopt.executor import Session
        from graphopt.model import save

        of = settings(model, target, sizes, bundled=True)
        path = folder / "model.onnx"
        save(model, path, compress=compress)
        runs_here = self.unavailable(target) is None
        if runs_here:
            measured = self._measure(model, target, feeds)
        else:
            measured = None
            Session(path, optimize=True).close()  # that another processor can load it says much, if not all
        for name in ("run", "bench"):
            (folder / f"{name}.py").write_text(text(f"ort_{name}.txt"), encoding="utf-8")
        about, limits = dict(ABOUT), list(unprofiled(model, target, sizes))
        if ort or ort_format.MODEL in target.artefacts:
            limits += self._own_format(model, path, target, about)
        others = beyond_onnx(model)
        if others:
            limits.append(f"ONNX Runtime alone reads the file: it holds {', '.join(others)}.")
        return Artefacts(
            model="model.onnx",
            run=("python3", "run.py"),
            bench=("python3", "bench.py"),
            about=about,
            needs=needs(target),
            session={
                "device": target.device,
                "providers": list(target.providers),
                "provider_options": of,
                "graph_optimization_level": "ORT_ENABLE_ALL",
                "intra_op_num_threads": 1,
                "inter_op_num_threads": 1,
            },
            measured=measured,
            limits=tuple(limits),
        )

    def _own_format(self, model: ir.Model, path: Path, target: Target, about: dict[str, str]) -> list[str]:
        """Write the .ort file beside the ONNX file; the limits that come with it, or why there can be none."""
        from graphopt.model import weight_bytes

        if weight_bytes(model) > ort_format.LARGEST:
            return [f"No {ort_format.MODEL}: that format ends at 2 GB, and the weights are larger."]
        ort_format.write_ort(path, path.with_name(ort_format.MODEL), arm=target.arch == "aarch64")
        about |= ort_format.ABOUT
        return [ort_format.DIFFERS]

    def open(self, bundle: Bundle, *, threads: int = 1) -> Session:
        """A session of the bundle's model, set up as its manifest says."""
        of = bundle.manifest["session"].get("provider_options", {})
        return self._session(bundle.model, bundle.target, of, bundle.folder, threads)

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[Session, str]:
        """The same file on this machine's processor."""
        from graphopt.executor import Session

        here = ARCHITECTURES.get(platform.machine().lower(), platform.machine().lower())
        session = Session(bundle.model, optimize=True, threads=threads)
        return session, f"the bundle's model.onnx, by ONNX Runtime on this {here} processor"

    def _measure(self, model: ir.Model, target: Target, feeds: Mapping[str, Array] | None) -> dict[str, Any]:
        found = self.bench([model], target, feeds, seconds=LOWER_SECONDS)
        return bundle.measurement(found, real=feeds is not None)


def _call(session: Session, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """One run without the checks of `Session.run`, which would weigh on models of some microseconds."""
    session.run(feeds)
    run, names, ready = session.session.run, session.output_names, dict(feeds)
    return lambda: run(names, ready)


def _batch(inputs: Sequence[Any], feeds: Mapping[str, Array]) -> int | None:
    """Samples in one run: the common length of axis 0 of all inputs; None where there is none."""
    lengths = {feeds[spec.name].shape[:1] for spec in inputs}
    if len(lengths) != 1 or not (length := lengths.pop()):
        return None
    return int(length[0])


def _weights(models: Sequence[ir.Model | Path]) -> int:
    """Bytes of weights of all models; of files in other forms than ONNX, what they take."""
    import onnx_ir as ir

    from graphopt.model import weight_bytes

    total = 0
    for model in models:
        if isinstance(model, Path):
            total += weight_bytes(ir.load(model)) if model.suffix == ".onnx" else model.stat().st_size
        else:
            total += weight_bytes(model)
    return total


def _random(models: Sequence[ir.Model | Path]) -> dict[str, Array]:
    """Random feeds of the first model, which all models must take.

    Raises:
        DataError: the models have different inputs.
    """
    from graphopt import verify
    from graphopt.data.feeds import input_specs
    from graphopt.model import load

    loaded = [load(m, check_weights=False) if isinstance(m, Path) else m for m in models]
    first = input_specs(loaded[0])
    for other in loaded[1:]:
        have = {s.name: s.dtype for s in input_specs(other) if s.required}
        if have != {s.name: s.dtype for s in first if s.required}:
            raise DataError(
                "the models have different inputs, so they cannot be timed on the same data",
                where=", ".join(sorted(have)), hint="time them one by one",
            )  # fmt: skip
    return verify.random_feeds(loaded[0], 0, samples=1)[0]
