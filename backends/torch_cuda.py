"""torch: NVIDIA GPUs whose tensor cores skip the zeros of 2:4 weights, and the same module, dense, on any processor.

A model goes through `to_torch`, its 2:4 layers become products on sparse tensor cores
(`graphopt.fx.semi_structured`), and what runs is a recorded graph of CUDA kernels. A target's `device` is 'gpu' or
'cpu'; its `dtype` is that of the products. What a bundle holds is the ONNX model: packed weights belong to one device
and library, and `run.py` makes them anew.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt import bundle
from graphopt.backend import Artefacts, BenchResult
from graphopt.backends.texts import text
from graphopt.benching import bench_result, feeds_for
from graphopt.errors import DataError, MissingBackendError, ModelError
from graphopt.extras import how_to_install
from graphopt.fx.extra import require_torch, torch_threads

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.fx.semi_structured.lower import Lowered
    from graphopt.fx.semi_structured.replay import Runner
    from graphopt.target import Target

LOWER_SECONDS = 1.0
"""Time that `lower` spends on measuring, where the target can run here."""

NEEDS = ("Python 3.11 with graphopt and its extra `torch`", "an NVIDIA GPU of compute capability 8.0 or newer")


class TorchSession:
    """A lowered model behind names and numpy arrays.

    Args:
        model: what `runner` was made of.
        runner: ready to run.
        threads: of operators on the CPU.
    """

    def __init__(self, model: ir.Model, runner: Runner, threads: int = 1) -> None:
        from graphopt.data.feeds import input_specs
        from graphopt.executor import TensorSpec

        specs = [spec for spec in input_specs(model) if spec.required]
        self._inputs = [TensorSpec(s.name, s.dtype, s.shape) for s in specs if s.shape is not None]
        self._kinds = {v.name: v.dtype.numpy() for v in model.graph.outputs if v.dtype is not None}
        self.runner, self._threads = runner, threads

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in the types that the model declares.

        Raises:
            DataError: a feed is missing, unknown, or has a wrong type or shape, or the model fails on these values.
        """
        import torch

        from graphopt.executor import check_feeds
        from graphopt.fx.semi_structured.replay import to_device

        check_feeds(feeds, self._inputs)
        lowered = self.runner.lowered
        with torch_threads(self._threads):
            try:
                found = self.runner(*to_device(feeds, lowered))
            except (RuntimeError, IndexError, ValueError) as error:
                raise DataError(
                    f"torch cannot run the model on these inputs: {str(error).partition(chr(10))[0]}",
                    hint="run it with --target cpu: if that works, the operator's torch function differs",
                ) from error
        if lowered.device.type == "cuda":
            torch.cuda.synchronize(lowered.device)
        return {name: self._array(name, value) for name, value in zip(lowered.outputs, found, strict=True)}

    def _array(self, name: str, value: torch.Tensor) -> Array:
        from graphopt.fx.from_torch import as_array

        array: Array = as_array(value.detach().cpu().clone())
        kind: np.dtype[Any] | None = self._kinds.get(name)
        return array if kind is None else array.astype(kind, copy=False)


def _cuda_available() -> bool:
    """Asked of torch, whose import takes seconds."""
    import torch

    return bool(torch.cuda.is_available())


class TorchBackend:
    """The backend `torch`."""

    name: ClassVar[str] = "torch"

    def unavailable(self, target: Target) -> str | None:
        """Why models for `target` cannot run on this machine; None where they can."""
        missing = self.missing(target)
        if missing is not None:
            return missing
        version = importlib.metadata.version("torch")
        if target.device == "cpu" or (not version.endswith("+cpu") and _cuda_available()):
            return None
        return f"torch {version} finds no CUDA device here; target torch-cpu runs the same module densely"

    def missing(self, target: Target) -> str | None:
        """Torch: whether it covers a model is found out by making its module."""
        if importlib.util.find_spec("torch") is None:
            return f"torch is not installed ({how_to_install('torch')})"
        return None

    def session(self, model: ir.Model | Path, target: Target, *, threads: int = 1) -> TorchSession:
        """A session; the module is made now, kernels are recorded at the first run of each set of input sizes.

        Raises:
            MissingBackendError: it cannot run here.
            ModelError: `to_torch` does not cover the model.
        """
        from graphopt.fx.semi_structured.replay import Runner
        from graphopt.model import load

        reason = self.unavailable(target)
        if reason is not None:
            raise MissingBackendError(reason, where=f"target {target.name!r}", hint="run it on such a device")
        loaded = load(model) if isinstance(model, Path) else model
        return TorchSession(loaded, Runner(_lowered(loaded, target)), threads)

    def bench(
        self,
        models: Sequence[ir.Model | Path],
        target: Target,
        feeds: Mapping[str, Array] | None = None,
        *,
        threads: int = 1,
        seconds: float = 2.0,
    ) -> BenchResult:
        """Measure the models, paired and interleaved, inputs on the device, to the end of their last kernel.

        Args:
            models: the first is the reference of all ratios.
            target: where they run.
            feeds: one batch of inputs for all models; None: random inputs, batch 1.
            threads: of operators on the CPU.
            seconds: time to spend on measured rounds.

        Raises:
            MissingBackendError: the target cannot run here.
            ModelError: `to_torch` does not cover a model.
            DataError: the feeds do not fit a model.
        """
        require_torch(f"target {target.name!r}")
        import torch

        from graphopt.fx.semi_structured.lower import fate_rows, summary
        from graphopt.model import load
        from graphopt.timing import paired

        loaded = [load(model) if isinstance(model, Path) else model for model in models]
        given = feeds_for(loaded, feeds)
        sessions = [self.session(model, target, threads=threads) for model in loaded]
        with torch_threads(threads):
            result = paired([_call(session, given) for session in sessions], seconds)
        runners = [session.runner for session in sessions]
        return bench_result(
            result,
            given,
            threads=threads,
            torch=torch.__version__,
            device=_device_name(runners[0].lowered.device),
            dtype=target.dtype,
            runs=[f"{runner.describe()}; {summary(runner.lowered.fates)}" for runner in runners],
            layers=[fate_rows(runner.lowered.fates) for runner in runners],
        )

    def lower(
        self,
        model: ir.Model,
        target: Target,
        folder: Path,
        *,
        feeds: Mapping[str, Array] | None = None,
        compress: bool = False,
    ) -> Artefacts:
        """Write model.onnx and run.py.

        Args:
            model: what to deploy; not changed.
            target: what it is deployed on.
            folder: gets the files.
            feeds: one batch of real inputs for timing.
            compress: store weights with many zeros as values and positions.

        Raises:
            MissingBackendError: torch is not installed.
            ModelError: `to_torch` does not cover the model.
        """
        require_torch(f"target {target.name!r}")
        from graphopt.fx.semi_structured.lower import fate_rows
        from graphopt.model import save

        runs_here = self.unavailable(target) is None
        made = _lowered(model, target if runs_here else on_cpu(target))
        save(model, folder / "model.onnx", compress=compress)
        (folder / "run.py").write_text(text("torch_cuda_run.txt"), encoding="utf-8")
        return Artefacts(
            model="model.onnx",
            run=("python3", "run.py"),
            bench=("graphopt", "bench", "model.onnx", "--target", target.name),
            about={
                "model.onnx": "the model, portable ONNX, its zeros in place: the packed form of 2:4 weights belongs to "
                "one device and its libraries, and is made there",
                "run.py": "runs the model; where there is no GPU, densely on the CPU, and says so",
            },
            needs=NEEDS if target.device == "gpu" else NEEDS[:1],
            session={"device": target.device, "dtype": target.dtype},
            measured=self._measure(model, target, feeds) if runs_here else None,
            versions={"torch": _torch_version()},
            details={"layers": fate_rows(made.fates)},
        )

    def open(self, bundle: Bundle, *, threads: int = 1) -> TorchSession:
        """A session of the bundle's model."""
        return self.session(bundle.model, bundle.target, threads=threads)

    def stand_in(self, bundle: Bundle, *, threads: int = 1) -> tuple[TorchSession, str] | None:
        """The same module, dense, on this processor, in the model's own types."""
        session = self.session(bundle.model, on_cpu(bundle.target), threads=threads)
        return session, "the bundle's module, dense, by torch on this processor"

    def _measure(self, model: ir.Model, target: Target, feeds: Mapping[str, Array] | None) -> dict[str, Any]:
        found = self.bench([model], target, feeds, seconds=LOWER_SECONDS)
        told = bundle.measurement(found, real=feeds is not None)
        return {key: value for key, value in told.items() if key != "layers"}  # the manifest has them


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def on_cpu(target: Target) -> Target:
    """The same target without its device: the module runs densely on the CPU, in the model's own types."""
    return dataclasses.replace(target, name=f"{target.name} on the CPU", device="cpu", dtype="model")


def _lowered(model: ir.Model, target: Target) -> Lowered:
    """The module of a model for a target.

    Raises:
        ModelError: `to_torch` does not cover the model, or its strings have no tensor.
    """
    import onnx_ir as ir
    import torch

    from graphopt.fx.semi_structured.lower import lower

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.STRING:
            raise ModelError("torch has no strings", where=str(value.name), hint="use a target of ONNX Runtime")
    device = torch.device("cpu" if target.device == "cpu" else "cuda")
    return lower(model, device, None if target.dtype == "model" else getattr(torch, target.dtype))


def _call(session: TorchSession, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """One run to the end of its last kernel, without copies between host and device."""
    import torch

    from graphopt.fx.semi_structured.replay import to_device

    session.run(feeds)
    runner = session.runner
    inputs = to_device(feeds, runner.lowered)
    if runner.lowered.device.type == "cpu":
        return lambda: runner(*inputs)

    def call() -> None:
        runner(*inputs)
        torch.cuda.synchronize(runner.lowered.device)

    return call


def _device_name(device: torch.device) -> str:
    import torch

    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_name(device))
