"""Large tensors that are computed here go to a temporary file, so that weights of gigabytes do not pile up in memory.

The file has no name any more once it is mapped: it goes with its last reader, however the process ends. It stands in
the folder for temporary files (`TMPDIR`).
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.files.weights import FileMap, MappedTensor

LARGE = 64 << 20
"""Bytes from which on a tensor goes to a file."""


class SpilledTensor(MappedTensor):
    """A tensor in a temporary file: nothing that the model was given with."""

    __slots__ = ()


def held(data: npt.NDArray[Any], dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """A tensor of these values, in memory or, if it is large, in a temporary file.

    Args:
        data: the values, in C order and in the numpy type of `dtype`; the tensor keeps the array where it is small.
        dtype: of the tensor.
        name: of the tensor.

    Raises:
        GraphoptError: the file cannot be written.
    """
    if data.nbytes < LARGE or dtype.bitwidth < 8:
        return ir.Tensor(data, dtype=dtype, name=name)
    little = data.astype(data.dtype.newbyteorder("<"), copy=False)
    try:
        descriptor, path = tempfile.mkstemp(prefix="graphopt-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(little.reshape(-1).view(np.uint8).data)
        mapped = FileMap(Path(path))
    except OSError as error:
        raise GraphoptError(
            f"a weight of {data.nbytes} bytes cannot be written to a temporary file ({error.strerror or error})",
            where=tempfile.gettempdir(),
            hint="make room there, or set TMPDIR to a folder with room",
        ) from error
    if os.name == "posix":
        Path(path).unlink()
    else:  # a file that is mapped cannot be deleted there
        weakref.finalize(mapped, _delete, path)
    place = ir.ExternalTensor("spilled", 0, data.nbytes, dtype, shape=ir.Shape(data.shape), name=name or "")
    return SpilledTensor(place, mapped)


def _delete(path: str) -> None:
    Path(path).unlink(missing_ok=True)
