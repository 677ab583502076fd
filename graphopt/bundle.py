"""Bundles: a folder with a model as it is deployed, its runner, and a manifest that vouches for every file.

`manifest.json` (schema 2; `graphopt.lowering.describe` says what it holds) is written last, so that a bundle with a
manifest is complete. Hashes guard against damage and mix-ups; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError, ModelError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import BenchResult
    from graphopt.target import Target

MANIFEST = "manifest.json"
SCHEMA = 2
"""Version of the manifest; raised when a field changes its meaning or goes away."""

FORM = {"inputs": list, "outputs": list, "session": dict, "run": list}
"""What a manifest must hold besides, for whoever opens the bundle."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were checked.

    Attributes:
        folder: where it lies.
        manifest: the parsed manifest.
        model: path of the file that is executed.
        target: the target it was made for, as the manifest holds it.
    """

    folder: Path
    manifest: dict[str, Any]
    model: Path
    target: Target

    @property
    def files(self) -> list[Path]:
        """Every file of the bundle, the manifest last."""
        return [self.folder / name for name in (*self.manifest["files"], MANIFEST)]


def read(folder: str | os.PathLike[str]) -> Bundle:
    """Open a bundle and check every file that its manifest lists.

    Raises:
        ModelError: no bundle, a file is missing, outside the folder, or differs from its hash.
    """
    from graphopt.target import parse_target

    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(
            f"is no bundle: it has no {MANIFEST}", where=str(folder), hint="make one with `graphopt lower`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path), hint="lower the model again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        got = manifest.get("schema") if isinstance(manifest, dict) else None
        older = isinstance(got, int) and got < SCHEMA
        raise ModelError(
            f"has schema {got!r}, and this version of graphopt reads {SCHEMA}",
            where=str(path),
            hint=f"lower the model again{'' if older else ', or run it with the version that made the bundle'}",
        )
    for key, kind in FORM.items():
        if not isinstance(manifest.get(key), kind):
            raise ModelError(f"lacks {key!r}", where=str(path), hint="lower the model again")
    files, name = manifest.get("files"), manifest.get("model")
    if not isinstance(files, dict) or not isinstance(name, str) or name not in files:
        raise ModelError("lists no model file", where=str(path), hint="lower the model again")
    for key, entry in files.items():
        _verify(folder, key, entry)
    table = manifest.get("target")
    table = dict(table) if isinstance(table, dict) else {}
    try:
        target = parse_target(str(table.pop("name", "")), table, str(path))
    except UsageError as error:
        raise ModelError(str(error), where=str(path), hint="lower the model again") from error
    return Bundle(folder, manifest, folder / name, target)


def _verify(folder: Path, name: str, entry: object) -> None:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\\" in name:
        raise ModelError("the manifest lists a file outside the bundle", where=name, hint="do not trust this bundle")
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise ModelError("file of the bundle is missing", where=str(path), hint="copy the bundle again, completely")
    expected = entry.get("sha256") if isinstance(entry, dict) else None
    if sha256(path) != expected:
        raise ModelError(
            "differs from what the manifest vouches for (sha256)", where=str(path),
            hint="copy the bundle again, or lower the model again if you changed it on purpose",
        )  # fmt: skip


def measurement(found: BenchResult, *, real: bool) -> dict[str, Any]:
    """A bench of the model alone, as manifests tell it; `real`: not on random inputs."""
    return {
        "latency_ms": found.milliseconds[0],
        "rounds": found.rounds,
        "threads": found.threads,
        "batch": found.batch,
        "inputs": "real" if real else "random",
        **found.details,
    }


def write(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> Bundle:
    """Make a bundle: complete or not at all.

    The files are made in a temporary folder beside the destination, or in the nearest folder above it that exists.
    A destination that does not exist appears with one rename, folders above it with it; into one that exists the files
    are moved one by one, the manifest last, and what an earlier bundle left there unchanged and this one does not have
    is removed.

    Args:
        folder: the destination.
        fill: writes the files into the folder that it is given, and returns the manifest without `schema` and `files`,
            with `model` (the name of a file) and `target` (`target_table`) in it.

    Raises:
        UsageError: the destination is a file.
        GraphoptError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError("the destination is a file", where=str(folder), hint="name a folder")
    nearest = next(above for above in folder.resolve().parents if above.exists())
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.resolve().name}-", dir=nearest))
    except OSError as error:
        raise GraphoptError(
            f"cannot be written: {error.strerror}", where=str(folder), hint="check its rights"
        ) from error
    try:
        manifest = {"schema": SCHEMA, **fill(stage)}
        manifest["files"] = _hashes(stage)
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (stage / MANIFEST).write_text(text, encoding="utf-8")
        for path in stage.rglob("*"):
            _settle(path)
        _place(stage, folder, [*manifest["files"], MANIFEST])
    except OSError as error:
        raise GraphoptError(f"cannot be written: {error}", where=str(folder), hint="check space and rights") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return read(folder)


def _hashes(stage: Path) -> dict[str, dict[str, Any]]:
    names = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
    return {name: {"sha256": sha256(stage / name), "bytes": (stage / name).stat().st_size} for name in names}


def _settle(path: Path) -> None:
    """Readable for others, and on the disk before it is renamed."""
    if path.is_dir():
        path.chmod(0o755)
        return
    path.chmod(0o755 if path.suffix == ".sh" else 0o644)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(stage: Path, folder: Path, names: list[str]) -> None:
    if not folder.exists():
        stage.chmod(0o755)
        folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        stage.rename(folder)
        return
    stale = [name for name in _left_by_us(folder) if name not in names]
    # an old manifest must not vouch for a mixture of old and new files
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink()


def _left_by_us(folder: Path) -> list[str]:
    """Files that the manifest of a folder vouches for and that nobody changed since."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [name for name, entry in listed.items() if _vouched(folder, name, entry)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # no bundle of ours: nothing in there is ours to remove


def _vouched(folder: Path, name: str, entry: object) -> bool:
    try:
        _verify(folder, name, entry)
    except ModelError:
        return False
    return True


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def target_table(target: Target) -> dict[str, Any]:
    """A target as the manifest holds it: the fields that are set, as `parse_target` reads them."""
    table = {k: v for k, v in asdict(target).items() if v is not None}
    if target.quant is None:
        table["quant"] = False
    return table


def describe_values(values: Any) -> list[dict[str, Any]]:
    """Name, dtype and shape of graph inputs or outputs; free dimensions are names or null."""
    out = []
    for value in values:
        shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
        dtype = None if value.dtype is None else _dtype_name(value.dtype)
        out.append({"name": value.name, "dtype": dtype, "shape": shape})
    return out


def _dtype_name(dtype: ir.DataType) -> str:
    import onnx_ir as ir

    return "string" if dtype == ir.DataType.STRING else str(dtype.numpy().name)


def describe_model(model: ir.Model) -> dict[str, Any]:
    """Inputs and outputs of a model for the manifest; inputs that have a default are left out."""
    required = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return {"inputs": describe_values(required), "outputs": describe_values(model.graph.outputs)}


def describe_machine() -> dict[str, Any]:
    """The machine that numbers were measured on."""
    import platform

    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.lower().startswith(("model name", "hardware"))), name
        )
    return {"machine": platform.machine(), "processor": name, "cores": os.cpu_count(), "system": platform.platform()}
