"""Models in and out: load, check, save. The IR is `onnx_ir.Model`; weights stay on disk until somebody looks at them.

A model file is untrusted input. Everything in it is checked before it is used, and whatever is wrong ends in one
`ModelError` that names the node, the tensor or the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.files import archive, checks, compression, input_sizes, writer
from graphopt.files import shape_inference as shapes
from graphopt.files.external_data import DataFiles
from graphopt.files.proto_checks import check_proto
from graphopt.files.stored import Storage
from graphopt.files.stored_shapes import strip_value_info
from graphopt.files.weights import MappedTensor, exchange_tensors, model_tensors

if TYPE_CHECKING:
    import onnx


def load(path: str | os.PathLike[str], *, check_weights: bool = True) -> ir.Model:
    """Load and check an ONNX model: an `.onnx` file, or a `.safetensors` archive that `save` wrote.

    Compressed weights are brought back, bit by bit. External weights are memory-mapped, and only from regular files
    inside the model's folder. Stored shapes of intermediate tensors are dropped (exporters leave stale ones) and
    inferred again; nodes are brought into topological order where they are not.

    Args:
        path: a binary ONNX file, or an archive.
        check_weights: also read all weights once, streamed, and refuse a model that contains NaN.

    Raises:
        ModelError: the file is missing, damaged, hostile or unsupported; says what and where.
    """
    path = Path(path)
    try:
        # An archive may be reached through a link (caches of downloads); its weights are in the file that it leads to.
        source = path.resolve() if path.suffix == archive.SUFFIX else path
        proto = _parse(source)
        files = DataFiles(source.parent)
        check_proto(proto, files)
        strip_value_info(proto)
        model = _build(proto, files)
        compression.decompress(model)
        checks.sort_nodes(model)
        checks.check_graphs(model)
        if check_weights:
            checks.check_values(model)
        infer_shapes(model)
        # Once more, now that the types of intermediate tensors are known.
        checks.check_graphs(model)
    except ModelError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise ModelError(_one_line(error.what), where=_one_line(where), hint=error.hint) from error
    return model


def _one_line(text: str) -> str:
    """Names in a hostile file may hold line breaks and terminal codes, and be of any length."""
    shown = text if len(text) <= 400 else f"{text[:300]} ... {text[-60:]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if path.is_dir():
            raise ModelError("it is a folder, not an ONNX file", hint="name the .onnx file in it")
        if path.suffix == archive.SUFFIX:
            return archive.parse(path)
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"it cannot be read ({error.strerror or error})", hint="check the path") from error
    except ValueError as error:
        raise ModelError(f"it is no usable path ({error})") from error
    if not data:
        raise ModelError("the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
        raise ModelError(
            "it is not an ONNX protobuf, or it is truncated", hint="check that the download or export is complete"
        ) from error
    return proto


def _build(proto: onnx.ModelProto, files: DataFiles) -> ir.Model:
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        # onnx_ir reports what it cannot represent with a wide range of types; the innermost one holds the reason.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())
        raise ModelError(f"the graph cannot be represented ({reason[:300]})") from error

    def mapped(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        location = os.fspath(tensor.location)
        tensor.base_dir = files.folder
        return MappedTensor(tensor, files.open(location, f"tensor {tensor.name}"))

    exchange_tensors(model, mapped, mapped)
    return model


def save(
    model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None, compress: bool = False
) -> Storage | None:
    """Save a model: complete or not at all, and byte-identical for an identical model.

    The file is written beside its destination, synced and renamed; a failure leaves no file and no part of one. Saving
    over the file the model was loaded from, or over its data file, is safe. Shapes of intermediate tensors are
    inferred anew, and those stored that readers do not infer themselves, because runtimes choose their fusions by
    them. External data goes to one file beside the model, named like it with `.data` appended.

    Args:
        model: the model; not changed.
        path: the destination; its folder must exist.
        external: whether weights go to a data file; None: where the model came with one, or would not fit otherwise.
        compress: store weights with many zeros as values and positions; `load` brings them back bit by bit.

    Returns:
        How the weights are stored; None without `compress`.

    Raises:
        UsageError: the destination is a folder, or its folder does not exist.
        ModelError: the model does not fit into one file without external data.
        GraphoptError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError("the destination is a folder", where=str(path), hint="name a .onnx file")
    if not path.parent.is_dir():
        raise UsageError("its folder does not exist", where=str(path), hint="create the folder first")
    return writer.write(model, path, external, compress)


def check(model: ir.Model, *, weights: bool = True) -> None:
    """Check that a model is valid.

    Args:
        model: the model; not changed.
        weights: also look for NaN in every weight, which reads them all once.

    Raises:
        ModelError: names the node or tensor and what is wrong with it.
    """
    checks.check_graphs(model)
    if weights:
        checks.check_values(model)


def infer_shapes(model: ir.Model) -> None:
    """Forget the shapes of intermediate tensors and infer them again, in place (`graphopt.files.shape_inference`)."""
    shapes.infer_shapes(model)


def fix_dims(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Give named input dimensions a fixed size, in place.

    Raises:
        UsageError: a name that no input has, or a size below 1.
    """
    input_sizes.fix_sizes(model, sizes, {})


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all stored tensors, each counted once however often it is used."""
    return sum({id(t): t.nbytes for _, t in model_tensors(model) if t.dtype != ir.DataType.STRING}.values())
