"""Where the weights of a model file may come from: only from regular files inside the model's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ModelError

if TYPE_CHECKING:
    import onnx

    from graphopt.files.weights import FileMap

HINT = "put the data file beside the model and refer to it by a plain relative name"


def resolve(folder: Path, location: str, where: str) -> Path:
    """The file that an external-data `location` names.

    Args:
        folder: the folder of the model file.
        location: what the model says.
        where: the tensor, for the error.

    Raises:
        ModelError: the location is empty, absolute, climbs with `..`, leads out of the folder through a symbolic link,
            or is not a readable regular file.
    """
    if not location or "\0" in location:
        raise ModelError(f"its external data has no usable file name ({location!r})", where=where, hint=HINT)
    # Windows separators and drives are refused on every system: a model file must not change meaning with the machine.
    parts = location.replace("\\", "/").split("/")
    if location.startswith(("/", "\\")) or (len(parts[0]) == 2 and parts[0][1] == ":") or Path(location).is_absolute():
        raise ModelError(f"its external data is at the absolute path {location!r}", where=where, hint=HINT)
    if ".." in parts:
        raise ModelError(
            f"its external data is at {location!r}, which leaves the model's folder", where=where, hint=HINT
        )
    try:
        return _inside(folder, location, where)
    except OSError as error:
        raise ModelError(
            f"its external data {location[:80]!r} cannot be used ({error.strerror})", where=where, hint=HINT
        ) from error


def _inside(folder: Path, location: str, where: str) -> Path:
    """The file with all links followed, if that is a regular file inside the folder."""
    base = Path(os.path.realpath(folder))
    path = folder / location
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(base):
        raise ModelError(
            f"its external data {location!r} is a symbolic link that leaves the model's folder", where=where, hint=HINT
        )
    if not real.exists():
        raise ModelError(f"its external data file {location!r} is missing from {base}", where=where, hint=HINT)
    if not real.is_file():
        raise ModelError(f"its external data {location!r} is not a regular file", where=where, hint=HINT)
    return real


class DataFiles:
    """The external data files of one model, each mapped once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[Path, FileMap] = {}

    def open(self, location: str, where: str) -> FileMap:
        """The map of the file that `location` names.

        Raises:
            ModelError: see `resolve`, or the file cannot be opened.
        """
        from graphopt.files.weights import FileMap

        path = resolve(self.folder, location, where)
        if path not in self._maps:
            try:
                self._maps[path] = FileMap(path)
            except OSError as error:
                raise ModelError(
                    f"its external data file {location!r} cannot be read ({error.strerror})", where=where
                ) from error
        return self._maps[path]

    def __iter__(self) -> Iterator[FileMap]:
        return iter(self._maps.values())


def external_fields(proto: onnx.TensorProto, where: str) -> tuple[str, int, int | None]:
    """Location, offset and length of an external tensor.

    Raises:
        ModelError: an offset or length that is not a non-negative integer.
    """
    fields: dict[str, Any] = {entry.key: entry.value for entry in proto.external_data}

    def number(key: str) -> int | None:
        text = fields.get(key)
        if text is None or text == "":
            return None
        if not (text.isascii() and text.isdigit()):
            raise ModelError(f"external data {key} {text!r} is not a byte count", where=where)
        return int(text)

    return fields.get("location", ""), number("offset") or 0, number("length")


def check_extent(file: FileMap, offset: int, length: int | None, nbytes: int, where: str) -> None:
    """Check that a tensor of `nbytes` lies inside its file.

    Raises:
        ModelError: the declared length contradicts the shape, or the range ends behind the end of the file.
    """
    if length is not None and length != nbytes:
        raise ModelError(
            f"external data length {length} contradicts its shape, which needs {nbytes} bytes", where=where
        )
    if offset + nbytes > file.size:
        raise ModelError(
            f"external data ends at byte {offset + nbytes}, but {file.path.name} has {file.size} bytes",
            where=where,
            hint="the data file is truncated or belongs to another model",
        )
