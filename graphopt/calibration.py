"""Calibration data: unlabelled samples on which passes measure, from any form in which users keep data.

Forms of DATA (`load`):

- `x.npz`: keys are input names, axis 0 counts samples. An input without a batch axis gets one more axis in front.
  Keys `<sample>|<input>` hold whole calls instead, one per sample, of any shapes.
- a folder of `.npz` files (each as above), or of `.npy` files: one file per input, named like it, or for a model with
  one input any number of files, each a batch or a single sample. Read one at a time, in natural order of the names.
- `module:function`: the function returns an iterable of feeds (a generator), or arrays as in `.npz`.
- `random`: random numbers, only if that very word is said.
- in Python also a mapping of arrays, a list of feeds, or a callable.

Everything is checked by name, dtype and shape before work starts; NaN and infinities are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.data.activations import activations, paired_activations
from graphopt.data.feeds import Array, Call, InputSpec, convert, input_specs
from graphopt.data.sources import Arrays, Feeds, Folder, Source, as_arrays, hash_block, rebatch
from graphopt.data.userfunc import is_function_spec, load_function
from graphopt.errors import DataError
from graphopt.files.arrays import natural, read_npy, read_npz

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Calibration", "Data", "activations", "load", "paired_activations"]

DEFAULT_BATCH = 32
RANDOM_FEEDS = 16
FINGERPRINT_BYTES = 1 << 30

Data = str | Path | Mapping[str, Any] | Iterable[Any] | Callable[[], Any]


class Calibration:
    """A re-iterable, deterministic stream of feeds that fit one model's inputs.

    The feeds fit every model with the same inputs, so one object serves a model and what passes make of it.

    Args:
        source: where the samples come from.
        specs: the model's inputs.
        batch_size: default batch size.
    """

    def __init__(self, source: Source, specs: tuple[InputSpec, ...], batch_size: int = DEFAULT_BATCH) -> None:
        self._source = source
        self.specs = specs
        self.batch_size = batch_size
        self._digest: str | None = None

    @property
    def name(self) -> str:
        """What the user gave, for messages and the report."""
        return self._source.name

    @property
    def samples(self) -> int | None:
        """Number of samples; None for a function's feeds before the first complete pass."""
        return self._source.samples

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how the data is read (ignored keys, conversions)."""
        return self._source.notes

    def batches(self, batch_size: int | None = None, limit: int | None = None) -> Iterator[Call]:
        """Feeds of successive calls of the model, the same at every pass.

        Args:
            batch_size: samples a call; where the model fixes its batch size that is taken. Feeds that the user made
                (lists, functions, `<sample>|<input>`) are cut where the model names its batch axis, and never merged.
            limit: stop once this many samples were given.

        Raises:
            DataError: a sample that is read only now does not fit, or holds NaN or infinities.
        """
        for feeds, _ in self.counted(batch_size, limit):
            yield feeds

    def counted(self, batch_size: int | None = None, limit: int | None = None) -> Iterator[tuple[Call, int]]:
        """As `batches`, each with the number of samples it holds."""
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size must be positive, not {size}")
        done = 0
        for feeds, count in rebatch(self._source, size, limit):
            fitting = convert(self.specs, feeds, self.name, (done, done + count))
            yield Call.of_samples(fitting, self.name, done, done + count), count
            done += count

    def fingerprint(self) -> str:
        """SHA-256 of names, dtypes, shapes and values of the first GiB, in hexadecimal; taken once, then remembered."""
        if self._digest is None:
            digest = hashlib.sha256()
            hashed = 0
            for block in self._source.blocks():
                hash_block(digest, block)
                hashed += sum(a.nbytes for a in block.arrays.values())
                # a bound, because a function may yield more than anybody wants to wait for, or never end
                if hashed > FINGERPRINT_BYTES:
                    break
            self._digest = digest.hexdigest()
        return self._digest


def load(data: Data, model: ir.Model, *, seed: int = 0, batch_size: int = DEFAULT_BATCH) -> Calibration:
    """Open calibration data for a model and check it.

    Args:
        data: see the module's head.
        model: gives the inputs' names, dtypes and shapes.
        seed: for `random` only.
        batch_size: default batch size.

    Raises:
        DataError: the data cannot be read or does not fit the model.
        UsageError: `module:function` names nothing that can be called.
    """
    specs = input_specs(model)
    source = open_source(data, specs, model, seed)
    calibration = Calibration(source, specs, batch_size)
    # what is at hand is looked through for NaN now rather than in the middle of the work
    if isinstance(source, Arrays):
        for _ in calibration.batches(batch_size=256):
            pass
    elif isinstance(source, Feeds):
        done = 0
        for block in source.prefetch():
            convert(specs, block.arrays, source.name, (done, done + block.layout.samples))
            done += block.layout.samples
    return calibration


def open_source(data: Data, specs: tuple[InputSpec, ...], model: ir.Model, seed: int) -> Source:
    """The source that `data` describes.

    Raises:
        DataError: see `load`.
        UsageError: see `load`.
    """
    if isinstance(data, (str, Path)):
        return _open_named(data, specs, model, seed)
    if isinstance(data, Mapping):
        return open_mapping(as_arrays(data), specs, "calibration arrays")
    if isinstance(data, np.ndarray):
        return open_mapping({_only_input(specs, "calibration array").name: data}, specs, "calibration array")
    if callable(data):
        return _open_function(data, specs, getattr(data, "__qualname__", type(data).__name__))
    if isinstance(data, Iterator):
        raise DataError(
            "a generator can be read only once, and calibration reads the data several times",
            where="calibration data",
            hint="pass the function that makes it, not its result",
        )
    return Feeds(type(data).__name__ + " of feeds", lambda: data, specs)


def _open_named(data: str | Path, specs: tuple[InputSpec, ...], model: ir.Model, seed: int) -> Source:
    path, text = Path(data), str(data)
    if text == "random":
        from graphopt.verify import random_feeds

        feeds = random_feeds(model, seed, samples=RANDOM_FEEDS)
        source = Feeds("random", lambda: feeds, specs)
        source.notes += ("warning: calibrated on random numbers: the result says nothing about real inputs",)
        return source
    if path.is_dir():
        return _open_folder(path, specs)
    if path.is_file():
        if path.suffix == ".npy":
            return open_mapping({_only_input(specs, text).name: read_npy(path)}, specs, text)
        if path.suffix != ".npz":
            raise DataError(
                f"a {path.suffix or 'nameless'} file is no calibration data",
                where=text,
                hint="give a .npz (keys are input names), a folder of .npy/.npz, or module:function",
            )
        return open_mapping(read_npz(path), specs, text)
    if isinstance(data, str) and is_function_spec(data):
        return _open_function(load_function(data), specs, data)
    raise DataError("no such file or folder", where=text, hint="give a .npz, a folder of .npy/.npz, or module:function")


def open_mapping(arrays: Mapping[str, Array], specs: tuple[InputSpec, ...], name: str) -> Source:
    """Arrays by input name, or by `<sample>|<input>`.

    Raises:
        DataError: they do not fit the model.
    """
    inputs = {s.name for s in specs}
    if not arrays:
        raise DataError("the data holds no arrays", where=name, hint="store one array per input, named like it")
    split = [k for k in arrays if k not in inputs and "|" in k]
    if not split:
        return Arrays.checked(arrays, specs, name)
    calls: dict[str, dict[str, Array]] = {}
    for key in split:
        sample, _, inner = key.partition("|")
        calls.setdefault(sample, {})[inner] = arrays[key]
    others = [k for k in arrays if k not in split]
    if others:
        raise DataError(
            f"keys of the form '<sample>|<input>' are mixed with {others[0]!r}",
            where=name,
            hint="use one form in a file",
        )
    order = sorted(calls, key=natural)
    source = Feeds(name, lambda: [calls[k] for k in order], specs)
    source.samples = sum(block.layout.samples for block in source.blocks())
    return source


def _open_function(function: Callable[[], Any], specs: tuple[InputSpec, ...], name: str) -> Source:
    try:
        result = function()
    except DataError:
        raise
    except Exception as error:
        what = f"raised {type(error).__name__}: {error}"
        raise DataError(what, where=name, hint="it is called without arguments and returns feeds") from error
    if isinstance(result, Mapping):
        return open_mapping(as_arrays(result), specs, name)
    if isinstance(result, np.ndarray):
        return open_mapping({_only_input(specs, name).name: result}, specs, name)
    if not isinstance(result, Iterable):
        raise DataError(
            f"returned {type(result).__name__}, not feeds", where=name, hint="yield mappings of input name to array"
        )
    # what was made to look at it is the first pass: making it may have been expensive
    made = [result]
    return Feeds(name, lambda: made.pop() if made else function(), specs)


def _open_folder(path: Path, specs: tuple[InputSpec, ...]) -> Source:
    files = sorted((f for f in path.iterdir() if f.suffix in {".npy", ".npz"}), key=lambda f: natural(f.name))
    kinds = {f.suffix for f in files}
    if not files:
        raise DataError(
            "holds no .npy or .npz file", where=str(path), hint="write samples with numpy.save or numpy.savez"
        )
    if len(kinds) > 1:
        raise DataError("mixes .npy and .npz files", where=str(path), hint="keep one kind in the folder")
    stems = {f.stem for f in files}
    named = {s.name for s in specs if s.required} <= stems
    if kinds == {".npy"} and named:
        return Arrays.checked({f.stem: read_npy(f) for f in files}, specs, str(path))
    if kinds == {".npy"}:
        _only_input(specs, str(path))
    return Folder(str(path), files, specs)


def _only_input(specs: tuple[InputSpec, ...], where: str) -> InputSpec:
    required = [s for s in specs if s.required]
    if len(required) != 1:
        names = ", ".join(repr(s.name) for s in required) or "none"
        raise DataError(
            f"arrays without names fit models with one input only, and this one has {names}",
            where=where,
            hint="give a .npz with one key per input, or files named like the inputs",
        )
    return required[0]
