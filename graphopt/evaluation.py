"""How good a model is, measured by the user's own data or function, on the model as it would be deployed.

- `x.npz` with the inputs (as for calibration) and `labels`, and a metric: `top1`, `top5` (share of right answers;
  labels are class indices, negative ones are left out), `mse`, `cosine` (labels are reference outputs).
  `labels` belong to the model's first output; name another as `labels|<output>`.
- `module:function`: called with an `onnxruntime.InferenceSession` of the model, returns a float. Two attributes of the
  function are honoured: `higher_is_better` (default True) and `metric` (default: the function's name).

Models run with ONNX Runtime's optimisations on. Equal data, versions and threads give equal scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from graphopt.data.feeds import Array, Call, InputSpec, convert, format_shape, input_specs
from graphopt.data.sources import Arrays, Source, as_arrays
from graphopt.data.userfunc import is_function_spec, load_function
from graphopt.errors import DataError, UsageError
from graphopt.files.arrays import read_npz

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_BATCH = 250


class Evaluation(Protocol):
    """Scores a model.

    Attributes:
        metric: name of the score, for the report.
        higher_is_better: False for errors.
        name: where the score comes from, for the report.
    """

    metric: str
    higher_is_better: bool
    name: str

    def score(self, model: ir.Model | Path) -> float:
        """The model's score.

        Raises:
            DataError: the model does not fit the data, or the function failed.
        """


Data = str | Path | Mapping[str, Any] | Callable[[Any], float]


def load(
    data: Data, metric: str | None, model: ir.Model, *, threads: int = 1, batch_size: int = DEFAULT_BATCH
) -> Evaluation:
    """Open an evaluation and check it against a model.

    Args:
        data: `.npz` path, mapping of arrays, `module:function` or a function.
        metric: one of `METRICS`, for arrays; None: top1 where the labels are integers.
        model: gives inputs and outputs.
        threads: of ONNX Runtime.
        batch_size: samples a call where the model leaves that free.

    Raises:
        DataError: the data cannot be read or does not fit.
        UsageError: unknown metric, or a metric for a function.
    """
    if isinstance(data, str) and not Path(data).exists() and is_function_spec(data):
        return _function(load_function(data), data, metric, threads)
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_file() or path.suffix != ".npz":
            raise DataError(
                "no such .npz file" if not path.is_file() else "is no .npz file",
                where=str(data),
                hint="give a .npz with the inputs and `labels`, or module:function",
            )
        return LabelledArrays(read_npz(path), metric, model, str(path), threads, batch_size)
    if isinstance(data, Mapping):
        return LabelledArrays(as_arrays(data), metric, model, "evaluation arrays", threads, batch_size)
    return _function(data, getattr(data, "__qualname__", type(data).__name__), metric, threads)


def _function(function: Callable[[Any], float], name: str, metric: str | None, threads: int) -> Evaluation:
    if metric is not None:
        raise UsageError(
            f"metric {metric!r} is for .npz data",
            where=name,
            hint="leave --metric out; a function names its own in its attribute `metric`",
        )
    return UserFunction(function, name, threads)


class UserFunction:
    """A score computed by the user's function of a session."""

    def __init__(self, function: Callable[[Any], float], name: str, threads: int = 1) -> None:
        self.function = function
        self.name = name
        self.threads = threads
        self.metric = str(getattr(function, "metric", getattr(function, "__name__", "score")))
        self.higher_is_better = bool(getattr(function, "higher_is_better", True))

    def score(self, model: ir.Model | Path) -> float:
        """Call the function.

        Raises:
            DataError: it raised, or did not return a finite number.
        """
        from graphopt.executor import Session

        with Session(model, optimize=True, threads=self.threads) as session:
            try:
                result = self.function(session.session)
            except Exception as error:
                raise DataError(
                    f"raised {type(error).__name__}: {error}",
                    where=self.name,
                    hint="it is called with an onnxruntime.InferenceSession and returns a float",
                ) from error
        return _finite(result, self.name)


class LabelledArrays:
    """A metric over arrays of inputs and labels."""

    def __init__(
        self,
        arrays: Mapping[str, Array],
        metric: str | None,
        model: ir.Model,
        name: str,
        threads: int = 1,
        batch_size: int = DEFAULT_BATCH,
    ) -> None:
        specs = input_specs(model)
        outputs = [v.name or "" for v in model.graph.outputs]
        self.name, self.threads, self.batch_size = name, threads, batch_size
        self.output, key = _label_key(arrays, outputs, name)
        self.labels = np.asarray(arrays[key])
        self.metric = _metric(metric, self.labels, name)
        self.higher_is_better = self.metric != "mse"
        inputs = {k: v for k, v in arrays.items() if k != key}
        self._source = Arrays.checked(inputs, specs, name)
        self._specs = specs
        self.notes = self._source.notes
        count = self._source.layout.samples
        if self._source.layout.kind == "call" or self.labels.ndim == 0 or len(self.labels) != count:
            raise DataError(
                f"{key!r} has shape {format_shape(self.labels.shape)} for {count} samples",
                where=name,
                hint="axis 0 of the labels and of every input counts the same samples",
            )

    def score(self, model: ir.Model | Path) -> float:
        """The metric over all samples.

        Raises:
            DataError: the model's inputs or outputs do not fit the data.
        """
        from graphopt.executor import Session

        with Session(model, optimize=True, threads=self.threads) as session:
            if self.output not in session.output_names:
                raise DataError(
                    f"the model has no output {self.output!r}",
                    where=self.name,
                    hint=f"its outputs are {', '.join(session.output_names)}",
                )
            totals = np.zeros(2)
            for feeds, start, stop in padded_calls(self._source, self._specs, self.batch_size, self.name):
                out = session.run(feeds)[self.output]
                totals += METRICS[self.metric](_rows(out, stop - start, self), self.labels[start:stop], self.name)
        if totals[1] == 0:
            raise DataError(
                "all labels are negative, so there is nothing to score", where=self.name, hint="give labels"
            )
        return _finite(totals[0] / totals[1], self.name)


def padded_calls(source: Source, specs: tuple[InputSpec, ...], batch_size: int, name: str) -> Any:
    """Feeds over all samples with the range of samples; the last call is filled up where the batch size is fixed."""
    block = next(iter(source.blocks()))
    layout, arrays = block.layout, block.arrays
    size = 1 if layout.kind == "stacked" else (layout.batch or batch_size)
    for start in range(0, layout.samples, size):
        stop = min(start + size, layout.samples)
        rows = np.arange(start, start + size if layout.batch else stop).clip(max=stop - 1)
        feeds = {}
        for key, array in arrays.items():
            if key in layout.stacked:
                feeds[key] = array[start]
            elif not array.ndim:
                feeds[key] = array
            else:
                # a plain slice is no copy; only a padded last batch needs the index array
                feeds[key] = array[start:stop] if len(rows) == stop - start else array[rows]
        yield Call.of_samples(convert(specs, feeds, name, (start, stop)), name, start, stop), start, stop


def _rows(out: Array, count: int, evaluation: LabelledArrays) -> Array:
    if out.ndim == 0 or len(out) < count:
        raise DataError(
            f"output {evaluation.output!r} has shape {format_shape(out.shape)} for {count} samples",
            where=evaluation.name,
            hint="axis 0 of the output must count samples; write a module:function evaluation otherwise",
        )
    return out[:count]


def _label_key(arrays: Mapping[str, Array], outputs: list[str], name: str) -> tuple[str, str]:
    keys = [k for k in arrays if k == "labels" or k.startswith("labels|")]
    if len(keys) != 1:
        got = ", ".join(map(repr, arrays))
        raise DataError(
            f"needs exactly one array of labels, and the keys are {got}",
            where=name,
            hint="add `labels` (or `labels|<output>`): class indices for top1/top5, reference outputs for mse/cosine",
        )
    output = keys[0].partition("|")[2] or outputs[0]
    if output not in outputs:
        raise DataError(f"the model has no output {output!r}", where=name, hint=f"its outputs are {', '.join(outputs)}")
    return output, keys[0]


def _metric(metric: str | None, labels: Array, name: str) -> str:
    if metric is None:
        if labels.dtype.kind in "iu":
            return "top1"
        raise UsageError(
            "labels are no class indices, so the metric must be named", where=name, hint="give --metric mse or cosine"
        )
    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}", where=name, hint=f"choose one of {', '.join(METRICS)}")
    if metric in {"top1", "top5"} and labels.dtype.kind not in "iu":
        raise DataError(
            f"metric {metric} wants integer class indices, the labels are {labels.dtype.name}",
            where=name,
            hint="store class indices, or use --metric mse or cosine",
        )
    return metric


def _class_axis(out: Array, labels: Array, name: str) -> tuple[Array, Array]:
    """Scores with classes last, and labels of the shape before them."""
    squeezed = out.reshape(*out.shape[:2], *(d for d in out.shape[2:] if d != 1)) if out.ndim > 2 else out
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 and squeezed.ndim == 2 else labels
    # images keep their classes on axis 1, sequences on the last
    axes = (1, squeezed.ndim - 1) if squeezed.ndim >= 4 else (squeezed.ndim - 1, 1)
    for axis in axes:
        if 0 < axis < squeezed.ndim and squeezed.shape[:axis] + squeezed.shape[axis + 1 :] == labels.shape:
            return np.moveaxis(squeezed, axis, -1), labels
    raise DataError(
        f"labels of shape {format_shape(labels.shape)} do not fit the output of shape {format_shape(out.shape)}",
        where=name,
        hint="labels are class indices, of the output's shape without its class axis",
    )


def _top(k: int) -> Callable[[Array, Array, str], Array]:
    def metric(out: Array, labels: Array, name: str) -> Array:
        if out.dtype.kind in "iu" and out.size == labels.size and k == 1:
            scores, truth = None, labels
            right = out.reshape(labels.shape) == labels
        else:
            scores, truth = _class_axis(out, labels, name)
            used = truth[truth >= 0]
            if used.size and used.max() >= scores.shape[-1]:
                raise DataError(
                    f"label {int(used.max())} for {scores.shape[-1]} classes", where=name, hint="labels count from 0"
                )
            true_score = np.take_along_axis(scores, np.maximum(truth, 0)[..., None].astype(np.int64), -1)
            # the first class wins a tie, as in argmax; NaN is never right
            index = np.arange(scores.shape[-1])
            ahead = (scores > true_score) | ((scores == true_score) & (index < truth[..., None])) | np.isnan(scores)
            right = (ahead.sum(-1) < k) & ~np.isnan(true_score[..., 0])
        return np.array([float(right[truth >= 0].sum()), float((truth >= 0).sum())])

    return metric


def _mse(out: Array, labels: Array, name: str) -> Array:
    _same_shape(out, labels, name)
    difference = out.astype(np.float64) - labels
    return np.array([float((difference**2).sum()), float(difference.size)])


def _cosine(out: Array, labels: Array, name: str) -> Array:
    _same_shape(out, labels, name)
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (out, labels))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(1)
    # two zero vectors agree, one zero vector agrees with nothing
    both = (np.abs(a).sum(1) == 0) & (np.abs(b).sum(1) == 0)
    cosines = np.where(norms > 0, dots / np.where(norms > 0, norms, 1), both)
    return np.array([float(cosines.sum()), float(len(cosines))])


def _same_shape(out: Array, labels: Array, name: str) -> None:
    if out.shape != labels.shape:
        raise DataError(
            f"labels of shape {format_shape(labels.shape)} for an output of shape {format_shape(out.shape)}",
            where=name,
            hint="for mse and cosine the labels are reference outputs",
        )


METRICS: dict[str, Callable[[Array, Array, str], Array]] = {
    "top1": _top(1),
    "top5": _top(5),
    "mse": _mse,
    "cosine": _cosine,
}
"""(output rows, label rows, source) -> [sum, weight]; the score is the ratio of the totals."""


def _finite(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"gave {type(value).__name__}, not a number", where=name, hint="return a float") from error
    if not math.isfinite(number):
        raise DataError(f"the score is {number}", where=name, hint="look for NaN or overflow in the model's outputs")
    return number
