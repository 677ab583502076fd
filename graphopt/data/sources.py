"""Where samples come from: arrays in memory, `.npz` files, folders of `.npy`/`.npz`, user functions.

Every source is re-iterable and deterministic and yields `Block`s: arrays and how they become calls
(`graphopt.data.feeds`). Files are opened with `allow_pickle=False` and only inside the path that the user gave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graphopt.data.feeds import (
    Array,
    InputSpec,
    Layout,
    arrange,
    check_dtype,
    check_names,
    declares_batch,
    fits,
    format_shape,
)
from graphopt.errors import DataError, GraphoptError
from graphopt.files.arrays import read_npy, read_npz

CACHE_BYTES = 512 << 20
"""Feeds of a user function are kept after the first complete pass if they fit; else the function is called anew."""


@dataclass(frozen=True)
class Block:
    """Arrays by input name, and how they become calls of the model."""

    arrays: Mapping[str, Array]
    layout: Layout


class Source(Protocol):
    """A re-iterable, deterministic stream of blocks.

    Attributes:
        name: what the user gave, for messages.
        notes: what the user should know about how the data is read.
    """

    name: str
    notes: tuple[str, ...]

    @property
    def samples(self) -> int | None:
        """How many samples there are; None where only a pass can tell."""

    def blocks(self) -> Iterator[Block]:
        """Start a new pass."""


def as_arrays(feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Feeds as numpy arrays; anything with `__array__` (torch CPU tensors) is taken without a copy where it can be."""
    return {str(k): v if isinstance(v, np.ndarray) else np.asarray(v) for k, v in feeds.items()}


def examine(specs: tuple[InputSpec, ...], arrays: Mapping[str, Array], source: str) -> tuple[Layout, list[str]]:
    """Check names, dtypes and shapes; returns the layout and notes.

    Raises:
        DataError: see `graphopt.data.feeds`.
    """
    notes = [f"key {k!r} is no input and is ignored" for k in check_names(arrays, specs, source)]
    for spec in specs:
        if spec.name in arrays:
            note = check_dtype(spec, arrays[spec.name].dtype, arrays[spec.name].shape, source)
            notes += [note] if note else []
    shapes = {s.name: arrays[s.name].shape for s in specs if s.name in arrays}
    dtypes = {s.name: arrays[s.name].dtype for s in specs if s.name in arrays}
    return arrange(specs, shapes, dtypes, source), notes


@dataclass
class Arrays:
    """One set of arrays, in memory or memory-mapped."""

    name: str
    arrays: Mapping[str, Array]
    layout: Layout
    notes: tuple[str, ...] = ()

    @classmethod
    def checked(cls, arrays: Mapping[str, Array], specs: tuple[InputSpec, ...], name: str) -> Arrays:
        """Build from arrays that the user gave.

        Raises:
            DataError: they do not fit the model.
        """
        layout, notes = examine(specs, arrays, name)
        if layout.batch and layout.samples % layout.batch:
            rest = layout.samples % layout.batch
            notes.append(f"the model fixes the batch size to {layout.batch}: the last {rest} samples are left out")
        inputs = {s.name: arrays[s.name] for s in specs if s.name in arrays}
        return cls(name, inputs, layout, tuple(notes))

    @property
    def samples(self) -> int | None:
        """Samples in the arrays."""
        return self.layout.samples

    def blocks(self) -> Iterator[Block]:
        """The one block."""
        yield Block(self.arrays, self.layout)


@dataclass
class Folder:
    """Files of a folder, one block each, opened one at a time in natural order of their names."""

    name: str
    files: Sequence[Path]
    specs: tuple[InputSpec, ...]
    samples: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every file's names, dtypes and shapes (headers of `.npy` only; a `.npz` is decompressed)."""
        notes: dict[str, None] = {}
        total = 0
        for path in self.files:
            layout, found = examine(self.specs, self._open(path), str(path))
            notes.update(dict.fromkeys(found))
            total += layout.samples
        self.samples, self.notes = total, tuple(notes)

    def _open(self, path: Path) -> dict[str, Array]:
        if path.suffix == ".npz":
            return read_npz(path)
        array = read_npy(path)
        spec = next(s for s in self.specs if s.required)
        if (
            spec.shape is not None
            and array.ndim == len(spec.shape) - 1
            and fits(spec, (1, *array.shape), skip_batch=True)
        ):
            array = array[None]
        return {spec.name: array}

    def blocks(self) -> Iterator[Block]:
        """One block a file."""
        for path in self.files:
            arrays = self._open(path)
            layout, _ = examine(self.specs, arrays, str(path))
            yield Block(arrays, layout)


@dataclass
class Feeds:
    """Feeds of a user function, a list or another re-iterable.

    Each is one call of the model and passes as it is, unless the model declares a batch axis (`declares_batch`, or a
    fixed batch size): then feeds that are larger than the batch size asked for are cut. They are not merged: many a
    model declares a batch axis and yet holds a shape that was fixed when it was exported.
    """

    name: str
    open: Callable[[], Iterable[Any]]
    specs: tuple[InputSpec, ...]
    cache_bytes: int = CACHE_BYTES
    samples: int | None = None
    notes: tuple[str, ...] = ()
    _kept: list[Block] | None = field(default_factory=list, repr=False)
    _live: Iterator[Block] | None = field(default=None, repr=False)
    _bytes: int = 0
    _first: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Read and check the first feed, so that wrong data is refused before work starts."""
        first = next(self.blocks(), None)
        if first is None:
            raise DataError("yields no feeds", where=self.name, hint="yield at least one feed")
        self.notes = tuple(examine(self.specs, first.arrays, self.name)[1])

    def prefetch(self) -> list[Block]:
        """Read and check what surely fits into the memory for feeds, to the end if it all does; returns it.

        Raises:
            DataError: a feed does not fit, or the function failed.
        """
        while self._kept is not None and self._bytes <= self.cache_bytes // 2 and self._read_on() is not None:
            pass
        return list(self._kept or ())

    def blocks(self) -> Iterator[Block]:
        """One block a feed; what was read is kept while it fits, so that later passes need not call the function."""
        index = 0
        while self._kept is not None:
            if index == len(self._kept):
                block = self._read_on()
                if block is None:
                    return
                yield block
            else:
                yield self._kept[index]
            index += 1
        # too much to keep: the function starts anew, and what this pass has given already is skipped
        samples = 0
        for position, block in enumerate(self._fresh()):
            samples += block.layout.samples
            if position >= index:
                yield block
        self.samples = samples

    def _read_on(self) -> Block | None:
        """The next feed that no pass has read yet; None at the end."""
        if self._live is None:
            self._live = self._fresh()
        try:
            block = next(self._live, None)
        except DataError:
            # a generator that failed is over: asked again it would pretend that this was the end of the data
            self._kept, self._live, self._bytes = [], None, 0
            raise
        if block is None:
            # the exhausted iterator stays: asked again, it says again that this is the end
            self.samples = sum(b.layout.samples for b in self._kept or ())
            return None
        self._bytes += sum(a.nbytes for a in block.arrays.values())
        if self._bytes > self.cache_bytes:
            self._kept = self._live = None
            return block
        # copied: a generator may yield the same buffer again and again
        block = Block({k: v.copy() for k, v in block.arrays.items()}, block.layout)
        if self._kept is not None:
            self._kept.append(block)
        return block

    def _fresh(self) -> Iterator[Block]:
        """Call the function and check what it yields."""
        try:
            iterator = iter(self.open())
        except GraphoptError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        index = 0
        while True:
            try:
                item = next(iterator, None)
            except GraphoptError:
                raise
            except Exception as error:
                raise self._failed(error) from error
            if item is None:
                return
            block = self._block(item, f"{self.name}, feed {index}")
            if index == 0:
                self._same_again(block)
            yield block
            index += 1

    def _block(self, item: Any, where: str) -> Block:
        if not isinstance(item, Mapping):
            names = [s.name for s in self.specs if s.required]
            if len(names) != 1 or isinstance(item, (list, tuple)):
                raise DataError(
                    f"a feed must map input names to arrays, got {type(item).__name__}",
                    where=where,
                    hint="yield {" + ", ".join(f"{n!r}: array" for n in names) + "}",
                )
            item = {names[0]: item}
        arrays = as_arrays(item)
        layout, _ = examine(self.specs, arrays, where)
        if layout.kind == "stacked":
            name = min(layout.stacked)
            spec = next(s for s in self.specs if s.name == name)
            raise DataError(
                f"input {name!r} expects {spec}, got {arrays[name].dtype.name} {format_shape(arrays[name].shape)}",
                where=where,
                hint="a feed is one call of the model: yield the samples one by one",
            )
        used = [s for s in self.specs if s.name in arrays]
        if layout.kind == "rows" and layout.batch is None:
            layout = replace(layout, alone=True) if declares_batch(used) else Layout("call", layout.samples)
        return Block({s.name: arrays[s.name] for s in used}, layout)

    def _same_again(self, block: Block) -> None:
        digest = hashlib.sha256()
        hash_block(digest, block)
        if self._first is not None and digest.digest() != self._first:
            raise DataError(
                "gives other data each time it is called",
                where=self.name,
                hint="make it deterministic (fixed seed, no shuffling): calibration reads the data several times",
            )
        self._first = digest.digest()

    def _failed(self, error: Exception) -> DataError:
        return DataError(
            f"raised {type(error).__name__}: {error}", where=self.name, hint="mend the function that yields the data"
        )


def hash_block(digest: Any, block: Block) -> None:
    """Feed names, dtypes, shapes and bytes of a block to a hash, a few MB at a time."""
    for name in sorted(block.arrays):
        array = block.arrays[name]
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        if array.dtype == object:
            digest.update(repr(array.tolist()).encode())
            continue
        rows = max(1, (4 << 20) // max(1, array[:1].nbytes)) if array.ndim else 1
        parts = [array[i : i + rows] for i in range(0, len(array), rows)] if array.ndim else [array]
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())


def rebatch(source: Source, batch_size: int, limit: int | None) -> Iterator[tuple[dict[str, Array], int]]:
    """Calls of the model, each with its number of samples.

    Rows are cut and merged to `batch_size`, or to the size that the model fixes (what is left over is dropped); other
    blocks pass as they are. With `limit` the stream ends once that many samples were given.
    """
    done = 0
    pending: list[Mapping[str, Array]] = []
    rows = 0
    for block in source.blocks():
        arrays, layout = block.arrays, block.layout
        if pending and (layout.kind != "rows" or layout.alone or not _mergeable(pending[0], arrays)):
            if layout.batch is None:
                yield _merged(pending), rows
                done += rows
            pending, rows = [], 0
        if layout.kind != "rows":
            for call, count in _calls(block):
                if limit is not None and done >= limit:
                    return
                yield call, count
                done += count
            if limit is not None and done >= limit:
                return
            continue
        start = 0
        while start < layout.samples and (limit is None or done + rows < limit or layout.batch is not None):
            if limit is not None and done >= limit:
                return
            room = (layout.batch or batch_size) - rows
            if limit is not None and layout.batch is None:
                room = min(room, limit - done - rows)
            stop = min(layout.samples, start + room)
            pending.append({k: v[start:stop] for k, v in arrays.items()})
            rows += stop - start
            start = stop
            if rows == (layout.batch or batch_size):
                yield _merged(pending), rows
                done += rows
                pending, rows = [], 0
        if layout.batch is None and pending and (layout.alone or (limit is not None and done + rows >= limit)):
            yield _merged(pending), rows
            done += rows
            pending, rows = [], 0
        if limit is not None and done >= limit:
            return
    if pending and layout.batch is None:
        yield _merged(pending), rows


def _merged(parts: list[Mapping[str, Array]]) -> dict[str, Array]:
    if len(parts) == 1:
        return dict(parts[0])
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _mergeable(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape[1:] == b[k].shape[1:] and a[k].dtype == b[k].dtype for k in a)


def _calls(block: Block) -> Iterator[tuple[dict[str, Array], int]]:
    if block.layout.kind == "call":
        yield dict(block.arrays), block.layout.samples
        return
    for i in range(block.layout.samples):
        yield (
            {
                k: v[i] if k in block.layout.stacked else (v[i : i + 1] if v.ndim else v)
                for k, v in block.arrays.items()
            },
            1,
        )
