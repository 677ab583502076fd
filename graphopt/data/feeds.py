"""What a model wants to be fed, and whether given arrays fit: names, dtypes, shapes, and which axis counts samples.

All data that users give (calibration, evaluation, `graphopt run`) passes through here, so that a wrong array is refused
before work starts, by an error that names the input, what it expects, what it got and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from graphopt.errors import DataError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int | str | None, ...]

IGNORED_KEYS = frozenset({"labels", "label", "targets", "target", "y"})
"""Keys of labelled data sets that are no input: ignored, with a note, where the model has no input of that name."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: the input's name.
        dtype: numpy dtype (object for strings).
        shape: int for a fixed dimension, str for a named and None for an anonymous free one; None: rank unknown.
        required: False where the model holds a default (an initialiser of the same name).
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    required: bool = True

    def __str__(self) -> str:
        return f"{self.dtype.name} {format_shape(self.shape)}"


@dataclass(frozen=True)
class Layout:
    """How arrays become calls of the model.

    Attributes:
        kind: "rows": axis 0 of every array counts samples and is the model's batch axis: cut and merge at will.
            "stacked": axis 0 of the `stacked` inputs counts samples and is no axis of the model: one sample a call.
            "call": the arrays are the inputs of exactly one call.
        samples: how many samples the arrays hold.
        batch: the batch size that the model fixes; None where it is free.
        stacked: inputs whose axis 0 is not an axis of the model.
        alone: rows may be cut and not merged with those of other blocks.
    """

    kind: Literal["rows", "stacked", "call"]
    samples: int
    batch: int | None = None
    stacked: frozenset[str] = frozenset()
    alone: bool = False


class Call(dict[str, Array]):
    """Arrays of one call of a model, by input name.

    Attributes:
        origin: which samples of which data they are, for messages.
    """

    def __init__(self, arrays: Mapping[str, Array], origin: str) -> None:
        super().__init__(arrays)
        self.origin = origin

    @classmethod
    def of_samples(cls, arrays: Mapping[str, Array], source: str, start: int, stop: int) -> Call:
        """The samples from `start` up to, not including, `stop` of what the user calls `source`."""
        last = stop - 1
        return cls(arrays, f"{source}, sample {start}" if last <= start else f"{source}, samples {start} to {last}")

    def only(self, names: Iterable[str]) -> Call:
        """Some of the arrays, of the same origin."""
        return Call({name: self[name] for name in names}, self.origin)


def format_shape(shape: Iterable[int | str | None] | None) -> str:
    """`[batch,3,?]`, as error messages and tables show shapes."""
    if shape is None:
        return "[of unknown rank]"
    return "[" + ",".join("?" if d is None else str(d) for d in shape) + "]"


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs of the main graph, in order. An input that is also an initialiser (IR < 4) is optional.

    Raises:
        DataError: an input is no tensor, or has no type.
    """
    import onnx_ir as ir

    specs = []
    for value in model.graph.inputs:
        name = value.name or ""
        if value.dtype is None or not isinstance(value.type, ir.TensorType):
            raise DataError(
                "this input is not a tensor of known type",
                where=f"input {name!r}",
                hint="re-export the model with typed tensor inputs (sequences, maps and optionals are not supported)",
            )
        dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        required = name not in model.graph.initializers
        specs.append(InputSpec(name, np.dtype(value.dtype.numpy()), dims, required))
    return tuple(specs)


def declares_batch(specs: Iterable[InputSpec]) -> bool:
    """Whether the model says itself that axis 0 of all these inputs is one batch axis: free, and of one telling name.

    Only then may calls that a user made be cut: a free axis of another name may be time.
    """
    leading = {spec.shape[0] if spec.shape else None for spec in specs}
    name = leading.pop() if len(leading) == 1 else None
    return isinstance(name, str) and (name.lower() in {"n", "b", "bs"} or "batch" in name.lower())


def check_names(keys: Iterable[str], specs: tuple[InputSpec, ...], source: str) -> list[str]:
    """Check that `keys` are the model's inputs; return the known keys that are no input and are ignored.

    Raises:
        DataError: a required input is missing or a key is unknown; names the closest match.
    """
    given, names = list(keys), [s.name for s in specs]
    extra = [k for k in given if k not in names]
    unknown = [k for k in extra if k not in IGNORED_KEYS]
    missing = [s.name for s in specs if s.required and s.name not in given]
    wanted = ", ".join(f"{s.name!r} {s}" for s in specs if s.required) or "none"
    if missing:
        hint = f"the model's inputs are {wanted}"
        # a lone stranger beside a lone gap is the likeliest match, however it is spelt
        alone = len(unknown) == len(missing) == 1
        guess = unknown if alone else difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.4)
        if guess:
            hint += f"; rename {guess[0]!r} to {missing[0]!r} if that is what it holds"
        got = ", ".join(map(repr, given)) or "nothing"
        raise DataError(f"no data for input {missing[0]!r}: the keys are {got}", where=source, hint=hint)
    if unknown:
        guess = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.0)
        near = f" (closest: {guess[0]!r})" if guess else ""
        raise DataError(
            f"key {unknown[0]!r} is no input of the model{near}",
            where=source,
            hint=f"remove or rename it; the model's inputs are {wanted}",
        )
    return extra


def check_dtype(spec: InputSpec, dtype: np.dtype[Any], shape: Shape, source: str) -> str | None:
    """Check that data of `dtype` may be fed; return a note where it will be converted.

    Only conversions that keep every value are made, and float64 -> float32/float16, numpy's default to the model's.

    Raises:
        DataError: the dtype does not fit.
    """
    want = spec.dtype
    if dtype == want:
        return None
    if want.kind == "O":
        if dtype.kind in "US":
            return None
    elif (dtype.kind in "iu" and want.kind in "iu" and np.can_cast(dtype, want, "safe")) or (
        dtype.kind == "f" and want.kind == "f"
    ):
        return f"input {spec.name!r}: {dtype.name} data is converted to {want.name}"
    what = f"input {spec.name!r} expects {spec}, got {dtype.name} {format_shape(shape)}"
    raise DataError(what, where=source, hint=_dtype_hint(spec, dtype))


def _dtype_hint(spec: InputSpec, dtype: np.dtype[Any]) -> str:
    want = spec.dtype
    if dtype == np.uint8 and want.kind == "f":
        return (
            "these look like raw uint8 images; the model wants them preprocessed (scaled, mean and std): store the "
            "preprocessed array, or give a function as 'module:function' that yields preprocessed feeds"
        )
    if dtype.kind in "iu" and want.kind == "f":
        return f"preprocess it as in training and store it as {want.name}: integers are not turned into floats silently"
    if dtype.kind == "f" and want.kind in "iu":
        return f"store it as {want.name}, e.g. x.astype('{want.name}'), if the values are whole numbers"
    if dtype.kind in "iu" and want.kind in "iu":
        return f"store it as {want.name}: {dtype.name} holds values that {want.name} does not"
    if dtype.kind == "O":
        return "object arrays are not read; store a plain numeric array of one shape"
    return f"store it as {want.name}"


def fits(spec: InputSpec, shape: tuple[int, ...], *, skip_batch: bool = False) -> bool:
    """Whether an array of `shape` may be fed as it is; `skip_batch` leaves axis 0 out of the comparison."""
    if spec.shape is None:
        return True
    if len(spec.shape) != len(shape):
        return False
    start = 1 if skip_batch else 0
    pairs = zip(spec.shape[start:], shape[start:], strict=True)
    return all(not isinstance(want, int) or want == got for want, got in pairs)


def shape_error(spec: InputSpec, dtype: np.dtype[Any], shape: tuple[int, ...], source: str) -> DataError:
    """The error for an array that does not fit, with a guess at what happened."""
    what = f"input {spec.name!r} expects {spec}, got {dtype.name} {format_shape(shape)}"
    hint = "give arrays of the expected shape (axis 0 counts samples)"
    if spec.shape is not None:
        rank = len(spec.shape)
        if len(shape) == rank - 1 and fits(spec, (1, *shape), skip_batch=True):
            hint = "the batch axis is missing: add it, e.g. x[None]"
        elif len(shape) == rank and rank >= 3 and fits(spec, (shape[0], shape[-1], *shape[1:-1]), skip_batch=True):
            hint = "the channels stand last in the data and first in the model: use np.moveaxis(x, -1, 1)"
        elif len(shape) == rank and rank >= 3 and fits(spec, (shape[0], *shape[2:], shape[1]), skip_batch=True):
            hint = "the channels stand first in the data and last in the model: use np.moveaxis(x, 1, -1)"
    return DataError(what, where=source, hint=hint)


def arrange(
    specs: tuple[InputSpec, ...],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    source: str,
) -> Layout:
    """Find how arrays of these shapes become calls of the model.

    Raises:
        DataError: a shape does not fit, lengths differ, or there is no sample at all.
    """
    used = [s for s in specs if s.name in shapes]
    rank = {s.name: len(shapes[s.name]) if s.shape is None else len(s.shape) for s in used}
    for spec in used:
        shape, extra = shapes[spec.name], len(shapes[spec.name]) - rank[spec.name]
        inner = shape[1:] if extra == 1 else shape
        if extra not in {0, 1} or not fits(spec, inner, skip_batch=extra == 0):
            raise shape_error(spec, dtypes[spec.name], shape, source)
    stacked = frozenset(s.name for s in used if len(shapes[s.name]) > rank[s.name])
    if stacked:
        return _stacked(used, shapes, dtypes, stacked, source)
    leading = {s.name: None if s.shape is None else s.shape[0] for s in used if rank[s.name]}
    fixed = {d for d in leading.values() if isinstance(d, int)}
    common = len(leading) == len(used) > 0 and (not fixed or (len(fixed) == 1 and len(set(leading.values())) == 1))
    lengths = {shapes[s.name][0] for s in used if rank[s.name]}
    # nodes and edges of a graph, say: axes of different names and lengths count no samples
    common = common and (len(lengths) == 1 or len({d for d in leading.values() if isinstance(d, str)}) < 2)
    if not common and all(fits(s, shapes[s.name]) for s in used):
        return Layout("call", 1)
    if len(leading) < len(used) or len(fixed) > 1 or len(lengths) > 1:
        got = ", ".join(f"{s.name!r} {format_shape(shapes[s.name])} for {format_shape(s.shape)}" for s in used)
        raise DataError(
            f"cannot tell which axis counts the samples: {got}",
            where=source,
            hint="give all arrays the same length on axis 0; an input without a batch axis gets one more in front",
        )
    samples, batch = lengths.pop(), (fixed.pop() if fixed else None)
    _not_empty(samples, source)
    if batch is not None and samples < batch:
        raise DataError(
            f"the model fixes the batch size to {batch} and the data holds {samples} samples",
            where=source,
            hint=f"give at least {batch} samples, or export the model with a free batch axis",
        )
    return Layout("rows", samples, batch)


def _stacked(
    used: list[InputSpec],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    stacked: frozenset[str],
    source: str,
) -> Layout:
    lengths = {shapes[n][0] for n in stacked}
    for spec in used:
        if spec.name in stacked or not shapes[spec.name]:
            continue
        # one row of this array makes a call, so its batch axis must be free or 1
        if not fits(spec, (1, *shapes[spec.name][1:])):
            raise shape_error(spec, dtypes[spec.name], shapes[spec.name], source)
        lengths.add(shapes[spec.name][0])
    if len(lengths) > 1:
        got = ", ".join(f"{s.name!r} {format_shape(shapes[s.name])}" for s in used)
        raise DataError(f"the arrays differ in length on axis 0: {got}", where=source, hint="axis 0 counts samples")
    samples = lengths.pop()
    _not_empty(samples, source)
    return Layout("stacked", samples, None, stacked)


def _not_empty(samples: int, source: str) -> None:
    if samples == 0:
        raise DataError("the data holds no samples", where=source, hint="give at least one sample")


def convert(
    specs: tuple[InputSpec, ...], feeds: Mapping[str, Array], source: str, samples: tuple[int, int] | None = None
) -> dict[str, Array]:
    """The feeds of one call, contiguous and in the model's dtypes; keys that are no input are left out.

    Args:
        specs: the model's inputs.
        feeds: arrays by input name.
        source: what the user calls the data.
        samples: which samples of it these are, from the first up to, not including, the second.

    Raises:
        DataError: a float array holds NaN or infinities, also where only the model's type is too small for its numbers.
    """
    out = {}
    for spec in specs:
        if spec.name not in feeds:
            continue
        array = feeds[spec.name]
        with np.errstate(over="ignore"):  # what overflows is refused below
            converted = np.ascontiguousarray(array, dtype=spec.dtype).reshape(array.shape)
        if converted.dtype.kind == "f" and not np.isfinite(converted).all():
            raise _not_finite(spec, array, converted, source, samples)
        out[spec.name] = converted
    return out


def _not_finite(
    spec: InputSpec, given: Array, converted: Array, source: str, samples: tuple[int, int] | None
) -> DataError:
    bad = ~np.isfinite(converted)
    kind = "NaN" if np.isnan(converted).any() else "infinite"
    hint = "remove these samples: statistics of NaN would spoil every weight"
    if kind == "infinite":
        hint = "remove these samples, or where they are a mask write the lowest finite number the model takes, as -1e9"
        if np.isfinite(given).all():
            hint = f"the data is {given.dtype.name} and the model takes {spec.dtype.name}: scale it as in training"
    where = ""
    if samples is not None and samples[1] - samples[0] > 0:
        rows = samples[1] - samples[0]
        first = samples[0]
        if bad.ndim and len(bad) == rows:
            first += int(np.flatnonzero(bad.reshape(rows, -1).any(axis=1))[0])
        where = f", the first in sample {first}"
    return DataError(f"input {spec.name!r} holds {int(bad.sum())} {kind} values{where}", where=source, hint=hint)
