"""Arrays in `.npy` and `.npz` files, as untrusted input: no Python objects, memory-mapped where the format allows."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

from graphopt.data.feeds import Array
from graphopt.errors import DataError


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts sample 2 before sample 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def read_npy(path: Path) -> Array:
    """Memory-map a `.npy` file.

    Raises:
        DataError: not readable, or it holds Python objects.
    """
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(array, np.ndarray):
        raise _unreadable(path, ValueError("not a .npy array"))
    return array


def read_npz(path: Path) -> dict[str, Array]:
    """Arrays of a `.npz`: members stored without compression are memory-mapped, others read once.

    Raises:
        DataError: not readable, or it holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            if not isinstance(data, np.lib.npyio.NpzFile):
                raise ValueError("not a .npz archive")
            mapped = _mapped_members(path)
            return {k: mapped[k] if k in mapped else data[k] for k in data.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # zlib.error, lzma.LZMAError: the decompressors have no common base
        raise _unreadable(path, error) from error


def _mapped_members(path: Path) -> dict[str, Array]:
    """Memory maps of the members that are stored uncompressed."""
    out: dict[str, Array] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or not info.filename.endswith(".npy"):
                continue
            # a local header is 30 bytes, then the name and the extra field, whose lengths it states itself
            file.seek(info.header_offset + 26)
            name_length, extra_length = np.frombuffer(file.read(4), "<u2")
            file.seek(info.header_offset + 30 + int(name_length) + int(extra_length))
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(f"member {info.filename!r} holds Python objects")
            key = info.filename.removesuffix(".npy")
            if 0 in shape or not shape:
                continue
            order: Literal["C", "F"] = "F" if fortran else "C"
            out[key] = np.memmap(path, dtype, "r", file.tell(), shape, order)
    return out


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error)
    if isinstance(error, FileNotFoundError):
        return DataError("there is no such file", where=str(path), hint="check the path")
    if "pickle" in reason:
        # numpy takes every file it does not know for a pickle, and advises to load that unsafely.
        reason = "it is neither .npy nor .npz, or holds Python objects"
    return DataError(
        f"cannot be read as arrays: {reason}",
        where=str(path),
        hint="write it with numpy.savez (plain numeric arrays; Python objects are never loaded)",
    )
