"""What a runtime must offer to be a backend: tell whether it can run here, run, measure, and make what is deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from graphopt.bundle import Bundle
    from graphopt.target import Target


class RunnableSession(Protocol):
    """A model that is ready to run on a device."""

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for inputs by name."""


@dataclass(frozen=True)
class BenchResult:
    """Times of several models, run in turn (a, b, a, b, ...) so that drift of the machine hits all alike.

    Index i is the i-th model that was given; index 0 is the reference.

    Attributes:
        milliseconds: median time of one run, per model.
        ratios: median over rounds of time_i / time_0 of the same round; the first is 1.
        low, high: quartiles of the same paired ratios.
        rounds: number of interleaved rounds.
        threads: threads of one session.
        batch: samples per run; None where the model has no batch axis.
        details: whatever else the backend wants in the report (versions, providers), JSON-serialisable; under `runs`, a
            line for every model that says how it runs is shown beside the times.
    """

    milliseconds: tuple[float, ...]
    ratios: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    rounds: int
    threads: int
    batch: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artefacts:
    """What `Backend.lower` wrote into the folder of a bundle, and what its manifest and README tell of it.

    `run` and `bench` are commands as words; one that names a file of the bundle, or begins with "./", is a path in it.

    Attributes:
        model: the file that is executed.
        run: takes `in.npz out.npz`; prints errors, exits with 0 where it wrote the outputs.
        bench: what bench.sh calls; () where the backend wrote a bench.sh of its own.
        about: what each file is, one line, by name; `model` among them.
        needs: what must be on the device, a line each.
        guide: what to do on the device before the first run, in Markdown; "" for nothing.
        session: how the runtime is set up, for runner and reader.
        measured: `graphopt.bundle.measurement`, with whatever else was measured; None where it cannot run here.
        limits: what was not tried here or does not hold, a sentence each.
        warnings: what the user must be told at once.
        versions: of the tools that made it, beside `graphopt.version.versions`.
        details: more keys of the manifest, JSON-serialisable.
    """

    model: str
    run: tuple[str, ...]
    bench: tuple[str, ...]
    about: Mapping[str, str]
    needs: tuple[str, ...] = ()
    guide: str = ""
    session: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] | None = None
    limits: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """A runtime. One stateless instance serves all targets whose table names it."""

    name: str

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run on this machine ("no CUDA device"); None where they can."""

    def missing(self, target: Target) -> str | None:
        """What must be installed here to make bundles for `target`, with the package that has it; None for nothing."""

    def session(self, model: ir.Model | Path, target: Target, *, threads: int = 1) -> RunnableSession:
        """Make a session with the target's own optimisations on.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: the runtime refuses the model.
        """

    def bench(
        self,
        models: Sequence[ir.Model | Path],
        target: Target,
        feeds: Mapping[str, np.ndarray[Any, Any]] | None = None,
        *,
        threads: int = 1,
        seconds: float = 2.0,
    ) -> BenchResult:
        """Measure the models, paired and interleaved, for about `seconds` in all.

        Args:
            models: the first is the reference of all ratios.
            target: where they run.
            feeds: one batch of inputs; None: random inputs of the models' shapes, symbolic dimensions set to 1.
            threads: threads of one session.
            seconds: time to spend on measured rounds.

        Raises:
            MissingBackendError: the target cannot run here.
            ModelError: the runtime refuses a model.
        """

    def lower(
        self,
        model: ir.Model,
        target: Target,
        folder: Path,
        *,
        feeds: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Artefacts:
        """Write what is deployed into `folder`: the artefacts and the runner, but no manifest and no README.

        Further keyword parameters, annotated `bool`, `int`, `float` or `str` (or one of them `| None`), are options of
        this backend (`graphopt.lowering.options`); they are given only where the user asked for them.
        A backend that times its result beside another runtime may take `reference: ir.Model | None = None` as well: the
        model as it was before `prepare`, which is what the user would run otherwise.

        Args:
            model: what to deploy, as the target's `prepare` left it; not changed.
            target: what it is deployed on.
            folder: exists and is empty; it becomes the bundle, or is thrown away where this raises.
            feeds: one batch of real inputs; a backend that times the model uses it, else random inputs.

        Raises:
            MissingBackendError: a tool that the target's artefacts need is not installed.
            ModelError: the target cannot take the model; names the node, before anything is compiled.
        """

    def open(self, bundle: Bundle, *, threads: int = 1) -> RunnableSession:
        """A session of the bundle's own artefact.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: the runtime refuses it.
        """

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[RunnableSession, str] | None:
        """What computes on this machine what the bundle computes on a device that is not here, for `lower --verify`.

        Returns:
            a session and a line that says what it is ("the same file on x86-64"); None where there is nothing.
        """
