"""Do two models compute the same? Numeric comparison on ONNX Runtime with graph optimisations off.

Sums are taken in float64 over all feeds. Models whose weights exceed `SLICE_BYTES` run in slices, so memory stays
bounded whatever their size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from graphopt.data.random_feeds import random_feeds
from graphopt.errors import DataError, GraphoptError, ModelError, VerificationError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.executor import Array

__all__ = ["Comparison", "OutputError", "compare", "random_feeds", "structure_check", "tolerance"]

SLICE_BYTES = 96 << 20
"""Weights that verification holds in memory at a time."""

FEEDS_AT_ONCE = 2
"""Feeds whose intermediate tensors are alive together in sliced execution."""

_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def tolerance(dtype: Any) -> float:
    """The relative L2 difference up to which outputs of this dtype count as equal after an exact rewrite.

    About 2000 units in the last place for float32: what reassociated sums over a few hundred layers leave in practice,
    and orders of magnitude below what a wrong rewrite does. Integers, booleans and strings must be equal.
    """
    return tolerance_of(np.dtype(dtype).name)


def tolerance_of(dtype: str) -> float:
    """As `tolerance`, by the name of the type, which numpy need not know ("bfloat16")."""
    return _TOLERANCE.get(dtype, 0.0)


@dataclass(frozen=True)
class OutputError:
    """How one output differs between two models, over all feeds.

    Attributes:
        name: of the output.
        dtype: of the output, as numpy names it.
        max_abs: largest absolute difference. Infinite where one side is not finite and the other differs.
        rel_l2: ||a - b|| / ||a||. For integers, booleans and strings: the fraction of elements that differ.
        cosine: cosine similarity of a and b, one value per sample, averaged over all samples.
        sqnr_db: signal to difference power in decibel; infinite where nothing differs.
        top1_agreement: fraction of rows with the same argmax along the last axis; None for outputs without rows.
        nonfinite: elements that are NaN or infinite in one model and different in the other.
        undefined: fraction of elements that are NaN in both; near 1 the comparison says nothing.
    """

    name: str
    dtype: str
    max_abs: float
    rel_l2: float
    cosine: float
    sqnr_db: float
    top1_agreement: float | None
    nonfinite: int
    undefined: float

    @property
    def tolerable(self) -> bool:
        """Whether the difference is rounding, by `tolerance` of the dtype."""
        return self.rel_l2 <= tolerance(self.dtype)


@dataclass(frozen=True)
class Comparison:
    """The differences of all outputs of two models.

    Attributes:
        outputs: one entry for each output, in the order of the first model.
        feeds: how many feeds were compared.
        notes: what the user should know about the comparison itself.
    """

    outputs: list[OutputError]
    feeds: int
    notes: list[str] = field(default_factory=list)

    @property
    def worst_relative(self) -> float:
        """The largest relative difference of any output; 0 without outputs."""
        return max((error.rel_l2 for error in self.outputs), default=0.0)

    @property
    def cosine(self) -> float:
        """Mean per-sample cosine similarity of the worst output; 1 without outputs."""
        return min((error.cosine for error in self.outputs), default=1.0)

    @property
    def equal(self) -> bool:
        """Whether every output is equal up to the rounding of its dtype."""
        return all(error.tolerable for error in self.outputs)

    def require_equal(self, where: str) -> None:
        """Raise unless the models are equal up to rounding.

        Raises:
            VerificationError: names the worst output, its difference and the tolerance.
        """
        bad = [error for error in self.outputs if not error.tolerable]
        if not bad:
            return
        worst = max(bad, key=lambda error: error.rel_l2)
        what = f"output {worst.name} differs by {worst.rel_l2:.3g} relative (tolerance {tolerance(worst.dtype):.0e})"
        if worst.nonfinite:
            what += f", {worst.nonfinite} elements are NaN or infinite in only one of the models"
        raise VerificationError(what, where=where)


class _Sums:
    """Accumulates the differences of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = ""
        self.max_abs = self.error = self.signal = 0.0
        self.cosines, self.samples = 0.0, 0
        self.agreed, self.rows = 0, 0
        self.elements = self.unequal = self.nonfinite = self.undefined = 0

    def add(self, a: Array, b: Array, samples: int) -> None:
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
            raise ModelError("only tensors can be compared, it is a sequence or a map", where=f"output {self.name}")
        if a.shape != b.shape:
            raise VerificationError(f"its shape is {list(a.shape)} and {list(b.shape)}", where=f"output {self.name}")
        if a.dtype != b.dtype:
            raise VerificationError(f"its type is {a.dtype} and {b.dtype}", where=f"output {self.name}")
        self.dtype = a.dtype.name if a.dtype.kind not in "UO" else "str"
        self.elements += a.size
        exact = a.dtype.kind in "biuUOS"
        if exact:
            self.unequal += int(np.count_nonzero(a != b))
        if a.dtype.kind in "UOS":
            # Words have no size: only equality counts, and it stands for the similarity too.
            self._add_cosines((a == b).astype(np.float64), np.ones(a.shape), samples)
            return
        x, y = self._finite(a.astype(np.float64), b.astype(np.float64))
        difference = x - y
        if difference.size:
            self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self.error += float(np.vdot(difference, difference))
        self.signal += float(np.vdot(x, x))
        self._add_cosines(x, y, samples)
        if not exact and a.ndim >= 2 and a.shape[-1] >= 2 and a.size:
            self.agreed += int(np.count_nonzero(x.argmax(-1) == y.argmax(-1)))
            self.rows += a.size // a.shape[-1]

    def _finite(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Both arrays with zeros where either is not finite; counts where they differ there."""
        odd = ~(np.isfinite(x) & np.isfinite(y))
        if not odd.any():
            return x, y
        undefined = np.isnan(x) & np.isnan(y)
        self.undefined += int(np.count_nonzero(undefined))
        self.nonfinite += int(np.count_nonzero(odd & ~undefined & (x != y)))
        return np.where(odd, 0.0, x), np.where(odd, 0.0, y)

    def _add_cosines(self, x: Array, y: Array, samples: int) -> None:
        """Axis 0 counts samples where it has their number; otherwise the output as a whole is one sample."""
        rows = samples if x.ndim and samples and x.shape[0] == samples else 1
        self.samples += rows
        for p, q in zip(x.reshape(rows, -1), y.reshape(rows, -1), strict=True):
            if np.array_equal(p, q):
                self.cosines += 1.0
                continue
            norm_p, norm_q = float(np.linalg.norm(p)), float(np.linalg.norm(q))
            # A vector that vanished is similar to nothing. Rounding may put the quotient a few units above 1.
            if norm_p > 0.0 and norm_q > 0.0:
                self.cosines += min(1.0, float((p / norm_p) @ (q / norm_q)))

    def result(self) -> OutputError:
        exact = tolerance(self.dtype) == 0.0
        if exact:
            relative = self.unequal / self.elements if self.elements else 0.0
        elif self.error == 0.0:
            relative = 0.0
        else:
            relative = math.sqrt(self.error / self.signal) if self.signal else math.inf
        if self.error == 0.0:
            sqnr = math.inf
        else:
            sqnr = 10 * math.log10(self.signal / self.error) if self.signal else -math.inf
        broken = self.nonfinite > 0
        return OutputError(
            name=self.name,
            dtype=self.dtype,
            max_abs=math.inf if broken else self.max_abs,
            rel_l2=math.inf if broken else relative,
            cosine=0.0 if broken else self.cosines / self.samples if self.samples else 1.0,
            sqnr_db=-math.inf if broken else sqnr,
            top1_agreement=self.agreed / self.rows if self.rows else None,
            nonfinite=self.nonfinite,
            undefined=self.undefined / self.elements if self.elements else 0.0,
        )


@runtime_checkable
class Candidate(Protocol):
    """What a model is compared with: anything with named outputs that runs on feeds."""

    output_names: list[str]

    def run_all(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """The outputs of every feed, by name."""


class Runner:
    """A model that runs whole where its weights are small, and in slices where they are not.

    Args:
        model: a model, or its file.
        threads: of one operator.
        slice_bytes: weights above this many bytes are executed in slices.
    """

    def __init__(self, model: ir.Model | Path, threads: int, slice_bytes: int) -> None:
        from graphopt.executor import Session
        from graphopt.model import load, weight_bytes
        from graphopt.slicing import SlicedSession

        if isinstance(model, Path):
            model = load(model, check_weights=False)
        self.output_names = [value.name or "" for value in model.graph.outputs]
        self._sliced = self._whole = None
        if weight_bytes(model) > slice_bytes:
            self._sliced = SlicedSession(model, budget=slice_bytes, threads=threads)
        else:
            self._whole = Session(model, threads=threads)

    def run_all(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """The outputs of every feed, by name."""
        if self._sliced is not None:
            return self._sliced.run_all(feeds)
        assert self._whole is not None
        return [self._whole.run(feed) for feed in feeds]


def compare(
    a: ir.Model | Path,
    b: ir.Model | Path | Candidate,
    feeds: Iterable[Mapping[str, Array]],
    *,
    threads: int = 1,
    slice_bytes: int = SLICE_BYTES,
) -> Comparison:
    """Run two models on the same feeds and measure how their outputs differ.

    Args:
        a: the reference.
        b: the candidate, a model or something that runs; outputs are matched by name.
        feeds: inputs, by name; read once.
        threads: threads of one operator.
        slice_bytes: weights above this many bytes are executed in slices.

    Raises:
        VerificationError: the candidate lacks an output, fails where the reference runs, or an output has another
            shape or type.
        ModelError, DataError: the reference does not run on the feeds.
    """
    first = Runner(a, threads, slice_bytes)
    second = b if isinstance(b, Candidate) else runner_of_candidate(b, threads, slice_bytes)
    missing = [name for name in first.output_names if name not in second.output_names]
    if missing:
        raise VerificationError(
            f"the second model has no output {missing[0]}", hint=f"it has {', '.join(second.output_names)}"
        )
    sums = [_Sums(name) for name in first.output_names]
    count = 0
    for batch in _batched(feeds, FEEDS_AT_ONCE):
        expected = run_reference(first, batch)
        found = run_candidate(second, batch)
        count += len(batch)
        for feed, left, right in zip(batch, expected, found, strict=True):
            samples = next((array.shape[0] for array in feed.values() if array.ndim), 1)
            for total in sums:
                total.add(left[total.name], right[total.name], samples)
    if count == 0:
        raise DataError("there are no feeds to compare on", hint="give data with --calib")
    outputs = [total.result() for total in sums]
    notes = [
        f"warning: {error.undefined:.0%} of output {error.name} is NaN in both models; give real data with --calib"
        for error in outputs
        if error.undefined > 0.5
    ]
    return Comparison(outputs, count, notes)


def _batched(feeds: Iterable[Mapping[str, Array]], size: int) -> Iterator[list[Mapping[str, Array]]]:
    source = iter(feeds)
    while batch := list(itertools.islice(source, size)):
        yield batch


def runner_of_candidate(model: ir.Model | Path, threads: int, slice_bytes: int) -> Runner:
    """A runner of the second model; that the runtime refuses it is its fault."""
    try:
        return Runner(model, threads, slice_bytes)
    except ModelError as error:
        raise VerificationError(error.what, where=error.where, hint=error.hint) from error


def run_reference(runner: Runner, batch: list[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Run the first model; where it fails, the data is asked for."""
    try:
        return runner.run_all(batch)
    except ModelError as error:
        raise ModelError(
            error.what, where=error.where, hint="give inputs that the model accepts with --calib"
        ) from error


def run_candidate(runner: Candidate, batch: list[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Run the second model; where it fails, the two do not compute the same."""
    try:
        return runner.run_all(batch)
    except GraphoptError as error:
        raise VerificationError(
            f"the second model fails where the first one runs: {error.what}", where=error.where
        ) from error


def structure_check(model: ir.Model) -> None:
    """Check that a rewrite left a valid graph; weights are not read.

    Raises:
        VerificationError: names the node or tensor and what is wrong with it.
    """
    from graphopt.model import check

    try:
        check(model, weights=False)
    except ModelError as error:
        raise VerificationError(error.what, where=error.where, hint=error.hint) from error
