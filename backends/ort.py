"""ONNX Runtime: runs, measures and bundles ONNX models on every device it has an execution provider for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt import bundle
from graphopt.backend import Artefacts, BenchResult
from graphopt.backends import ort_format
from graphopt.backends.ort_fusions import SLOW_FUSION, configuration
from graphopt.backends.ort_providers import Settings, chosen, fell_back, missing_provider, needs, settings, unprofiled
from graphopt.backends.texts import text
from graphopt.benching import bench_result, feeds_for
from graphopt.errors import MissingBackendError
from graphopt.lowering.portable import beyond_onnx
from graphopt.target import other_processor, this_architecture

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
        return other_processor(target) if target.device == "cpu" else None

    def missing(self, target: Target) -> str | None:
        """Nothing: bundles are ONNX files."""
        return None

    def session(
        self, model: ir.Model | Path, target: Target, *, threads: int = 1, config: Mapping[str, str] | None = None
    ) -> Session:
        """A session with all of the runtime's optimisations on, on the target's own device; `config` as in `executor`.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: the runtime refuses the model.
        """
        from graphopt.model import load

        of: Settings = {}
        if target.options:
            loaded = load(model, check_weights=False) if isinstance(model, Path) else model
            of = settings(loaded, target, None, bundled=False)
        return self._session(model, target, of, Path(), threads, config)

    def _session(
        self, model: ir.Model | Path, target: Target, of: Settings, folder: Path, threads: int,
        config: Mapping[str, str] | None,
    ) -> Session:  # fmt: skip
        from graphopt.executor import Session

        reason = self.unavailable(target)
        if reason is None:
            made = Session(model, optimize=True, threads=threads, providers=chosen(target, of, folder), config=config)
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
        config: Mapping[str, str] | None = None,
    ) -> BenchResult:
        """Measure the models, paired and interleaved, large ones in turns; see `graphopt.timing`.

        Args:
            models: the first is the reference of all ratios.
            target: where they run.
            feeds: one batch of inputs for all models; None: random inputs (`graphopt.data.random_feeds`), batch 1.
            threads: threads of one session.
            seconds: time to spend on measured rounds.
            config: entries of the sessions' configuration.

        Raises:
            MissingBackendError: the target cannot run here.
            ModelError: the runtime refuses a model.
            DataError: the feeds do not fit a model.
        """
        import onnxruntime as ort

        from graphopt.timing import in_turns, paired

        given = feeds_for(models, feeds)

        @contextmanager
        def ready(model: ir.Model | Path) -> Iterator[Callable[[], object]]:
            with self.session(model, target, threads=threads, config=config) as session:
                yield _call(session, given)

        if _weights(models) > TOGETHER:
            result = in_turns([partial(ready, model) for model in models], seconds)
        else:
            with ExitStack() as stack:
                result = paired([stack.enter_context(ready(model)) for model in models], seconds)
        return bench_result(
            result, given, threads=threads, onnxruntime=ort.__version__, providers=list(target.providers)
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
        config = configuration(model, feeds_for([model], feeds), LOWER_SECONDS) if target.device == "cpu" else {}
        runs_here = self.unavailable(target) is None
        if runs_here:
            measured = self._measure(model, target, feeds, config)
        else:
            measured = None
            Session(path, optimize=True).close()  # that another processor can load it says much, if not all
        for name in ("run", "bench"):
            (folder / f"{name}.py").write_text(text(f"ort_{name}.txt"), encoding="utf-8")
        about, limits = dict(ABOUT), list(unprofiled(model, target, sizes))
        if ort or ort_format.MODEL in target.artefacts:
            limits += self._own_format(model, path, target, about)
        if config:
            limits.append(SLOW_FUSION)
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
                "config": config,
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
        setup = bundle.manifest["session"]
        of, config = setup.get("provider_options", {}), setup.get("config")
        return self._session(bundle.model, bundle.target, of, bundle.folder, threads, config)

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[Session, str]:
        """The same file on this machine's processor."""
        from graphopt.executor import Session

        config = bundle.manifest["session"].get("config")
        session = Session(bundle.model, optimize=True, threads=threads, config=config)
        return session, f"the bundle's model.onnx, by ONNX Runtime on this {this_architecture()} processor"

    def _measure(
        self, model: ir.Model, target: Target, feeds: Mapping[str, Array] | None, config: Mapping[str, str]
    ) -> dict[str, Any]:
        found = self.bench([model], target, feeds, seconds=LOWER_SECONDS, config=config)
        return bundle.measurement(found, real=feeds is not None)


def _call(session: Session, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """One run without the checks of `Session.run`, which would weigh on models of some microseconds."""
    session.run(feeds)
    run, names, ready = session.session.run, session.output_names, dict(feeds)
    return lambda: run(names, ready)


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
