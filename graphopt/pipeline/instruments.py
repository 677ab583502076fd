"""Instruments watch a pipeline: they time it, print it, dump it, check it, and may veto the result of a pass."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.base import Context, Pass, PassResult
from graphopt.errors import UsageError
from graphopt.report.data import PassRecord

if TYPE_CHECKING:
    import onnx_ir as ir


class Instrument:
    """Does nothing; subclasses override what they need.

    The model given to `before` stays as it is while the pass works on a private clone, so that an instrument may keep
    it to compare with what `after` gets.
    """

    def begin(self, model: ir.Model, ctx: Context) -> None:
        """Called once, with the input model."""

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Called before each pass; a reason returned here keeps the pass from running."""
        return None

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Called after each pass that changed the model; a reason returned here undoes the pass.

        Raises:
            GraphoptError: the pipeline must stop.
        """
        return None

    def fill(self, record: PassRecord) -> None:
        """Called last for each pass, also for one that was undone or did not run: write what was found."""


class Clock(Instrument):
    """Seconds and peak resident memory of each pass, checks included."""

    def __init__(self) -> None:
        self._start = 0.0
        self._memory: _PeakMemory | None = None

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Start the clock."""
        self._memory = _PeakMemory()
        self._start = time.perf_counter()
        return None

    def fill(self, record: PassRecord) -> None:
        """Write seconds and bytes."""
        if self._memory is not None:
            record.seconds = time.perf_counter() - self._start
            record.peak_memory = self._memory.stop()
            self._memory = None


class BisectLimit(Instrument):
    """Passes beyond the first `limit` do not run: halve the number until the pass that breaks a model is found."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise UsageError(f"{limit} is negative", where="--bisect-limit", hint="give the number of passes to run")
        self.limit = limit
        self._seen = 0

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Refuse passes beyond the limit."""
        self._seen += 1
        return f"beyond the bisect limit of {self.limit}" if self._seen > self.limit else None


class PrintIR(Instrument):
    """Print the model as ONNX text after the passes named, or after every pass for "all"."""

    def __init__(self, names: Collection[str], write: Callable[[str], object] = sys.stderr.write) -> None:
        self.names = frozenset(names)
        self._write = write

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Print."""
        if pass_.name in self.names or "all" in self.names:
            self._write(f"# after {pass_.name}\n{model_text(model)}\n")
        return None


class DumpIR(Instrument):
    """Write the model as ONNX text before the first and after each pass: 000_input.onnxtext, 001_fold.onnxtext, ..."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._count = 0

    def begin(self, model: ir.Model, ctx: Context) -> None:
        """Make the folder and write the input model."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot be made: {error.strerror}", where=f"--dump-ir {self.folder}", hint="choose another folder"
            ) from error
        self._count = 0
        self._write("input", model)

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Count the pass."""
        self._count += 1
        return None

    def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
        """Write the model that the pass made."""
        self._write(pass_.name, model)
        return None

    def _write(self, name: str, model: ir.Model) -> None:
        path = self.folder / f"{self._count:03d}_{name}.onnxtext"
        try:
            path.write_text(model_text(model), encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"cannot be written: {error.strerror}", where=str(path), hint="choose another --dump-ir folder"
            ) from error


class ShowProgress(Instrument):
    """Tell the progress sink which pass is at work."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._done = 0
        self._ctx: Context | None = None

    def begin(self, model: ir.Model, ctx: Context) -> None:
        """Remember the sink."""
        self._ctx = ctx

    def before(self, pass_: Pass, model: ir.Model) -> str | None:
        """Tell which pass starts."""
        if self._ctx is not None:
            self._ctx.progress.step(f"pass {pass_.name}", self._done, self.total)
        self._done += 1
        return None


LONGEST_TENSOR = 16
"""Initializers with more elements than this are printed by name, type and shape alone."""


def model_text(model: ir.Model) -> str:
    """The model as ONNX text; large initializers are left out and listed by name, type and shape.

    What is left out is appended as comment lines, so that the whole stays readable by `onnx.parser` up to the weights.
    """
    import onnx
    import onnx_ir as ir

    slim = model.clone()
    left_out = []
    for graph in slim.graphs():
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.size > LONGEST_TENSOR:
                kind = f"{tensor.dtype} {tensor.shape}" if tensor is not None else f"{value.dtype} {value.shape}"
                left_out.append(f"# initializer {name}: {kind}")
                graph.initializers.pop(name)
        for node in graph:
            for key, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    tensor = attribute.as_tensor()
                    if tensor.size > LONGEST_TENSOR:
                        node.attributes[key] = ir.AttrString(key, f"{tensor.dtype} {tensor.shape}, left out")
    text = onnx.printer.to_text(ir.to_proto(slim))
    return "\n".join([text.rstrip(), *left_out, ""])


class _PeakMemory:
    """Peak resident memory of this process between construction and `stop`, in bytes.

    The kernel's own high-water mark cannot be reset without disturbing whoever watches the process from outside, so
    resident memory is sampled; the mark serves where it rose, and then it is exact.
    """

    PERIOD = 0.01

    def __init__(self) -> None:
        self._mark = _high_water()
        self._peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(self.PERIOD):
            self._peak = max(self._peak, _resident())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        mark = _high_water()
        return max(self._peak, _resident(), mark if mark > self._mark else 0)


def _resident() -> int:
    try:
        with Path("/proc/self/statm").open("rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:  # not Linux: the high-water mark is all there is
        return _high_water()


def _high_water() -> int:
    """The kernel's high-water mark of resident memory, bytes; 0 on systems that do not keep one."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_PAGE = mmap.PAGESIZE
