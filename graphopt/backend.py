"""What a runtime must offer to be a backend: tell whether it can run here, run, measure, and write a bundle."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

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


@runtime_checkable
class Backend(Protocol):
    """A runtime. One stateless instance serves all targets whose table names it."""

    name: str

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run on this machine ("no CUDA device"); None where they can."""

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
        report: Mapping[str, Any] | None = None,
        feeds: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> list[Path]:
        """Write the deployable bundle of the target into `folder` and return its files.

        A backend whose bundle holds an ONNX file may take one more option, `compress: bool = False`, which it hands to
        `graphopt.save`; it is given only where the user asked for it.

        Args:
            model: what to deploy.
            target: what it is deployed on.
            folder: created where it does not exist.
            report: JSON form of the report that made the model; its measured numbers go into the manifest.
            feeds: one batch of real inputs; a backend that times the model uses it, else random inputs.

        Raises:
            MissingBackendError: a tool that the target's artefacts need is not installed.
        """


def compresses(backend: Backend) -> bool:
    """Whether `lower` of a backend takes `compress`."""
    return "compress" in inspect.signature(backend.lower).parameters
