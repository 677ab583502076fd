"""A table of layer times: layer shape -> widths -> time, kept in a file for one machine, runtime and target.

Times are multiples of the time of a reference model that is measured in turn with everything else, so that entries of
different hours compare although the machine's speed drifts. Kernels are staircases over the widths; between measured
widths the next larger ones count, so that a width on a tread costs what the tread costs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import DataError
from graphopt.latency.shapes import LayerShape
from graphopt.target import Target

SCHEMA = 1

Widths = tuple[int, ...]
Point = tuple[LayerShape, Widths]


@dataclass
class LatencyTable:
    """Times of layers.

    Attributes:
        machine: what they were measured on and with: processor, runtime, threads, target.
        reference_ms: time of the reference model in milliseconds, when the table was begun; for people.
        entries: by the text of a layer shape and widths: multiples of the reference's time.
    """

    machine: dict[str, Any]
    reference_ms: float = 0.0
    entries: dict[str, dict[Widths, float]] = field(default_factory=dict)

    def time(self, shape: LayerShape, widths: Widths) -> float:
        """Time of a layer: of the smallest measured widths that hold these.

        Raises:
            KeyError: there are none.
        """
        known = self.entries.get(str(shape), {})
        if widths in known:
            return known[widths]
        if not all(widths):
            return 0.0
        above = [w for w in known if all(have >= wanted for have, wanted in zip(w, widths, strict=True))]
        if not above:
            raise KeyError(f"{shape} at {widths}")
        smallest = tuple(min(w[axis] for w in above) for axis in range(len(widths)))
        if smallest in known:
            return known[smallest]
        return max(known[w] for w in above if not any(_inside(v, w) for v in above))

    def missing(self, points: Iterable[Point]) -> list[Point]:
        """Those of these points that were not measured."""
        return [p for p in dict.fromkeys(points) if p[1] not in self.entries.get(str(p[0]), {})]

    def add(self, found: Mapping[Point, float]) -> None:
        """Take over measured times."""
        for (shape, widths), time in found.items():
            self.entries.setdefault(str(shape), {})[widths] = time

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "reference_ms": self.reference_ms,
            "layers": {
                shape: {"x".join(map(str, w)): time for w, time in sorted(times.items())}
                for shape, times in sorted(self.entries.items())
            },
        }

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all; what another process added to it meanwhile stays."""
        if path.is_file():
            for shape, times in load(path).entries.items():
                self.entries[shape] = {**times, **self.entries.get(shape, {})}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stage:
            try:
                json.dump(self.to_dict(), stage, indent=1)
                stage.flush()
                os.fsync(stage.fileno())
                Path(stage.name).replace(path)
            except BaseException:
                Path(stage.name).unlink(missing_ok=True)
                raise


def _inside(small: Widths, large: Widths) -> bool:
    return small != large and all(a <= b for a, b in zip(small, large, strict=True))


def load(path: Path) -> LatencyTable:
    """Read a table.

    Raises:
        DataError: the file is missing, damaged or of another version of graphopt.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, and this version reads {SCHEMA}")
        entries = {
            str(shape): {tuple(int(n) for n in w.split("x")): float(time) for w, time in times.items()}
            for shape, times in data["layers"].items()
        }
        return LatencyTable(dict(data["machine"]), float(data["reference_ms"]), entries)
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), hint="make one: graphopt bench MODEL --table") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"is no table of latencies: {error}", where=str(path), hint="delete it, or measure it anew (bench --table)"
        ) from error


def machine_of(target: Target, threads: int) -> dict[str, Any]:
    """What times depend on besides the layer."""
    from graphopt.bundle import describe_machine
    from graphopt.version import versions

    machine = describe_machine()
    return {
        "processor": machine["processor"],
        "architecture": machine["machine"],
        "onnxruntime": versions().get("onnxruntime", ""),
        "threads": threads,
        "target": target.name,
        "backend": target.backend,
        "providers": list(target.providers),
        "quant": None if target.quant is None else asdict(target.quant),
    }


def cache_folder() -> Path:
    """Where tables are kept: $GRAPHOPT_CACHE, else the user's cache folder."""
    given = os.environ.get("GRAPHOPT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def cache_path(machine: Mapping[str, Any]) -> Path:
    """The file of a machine: readable names, and a hash of everything that times depend on."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True, default=list).encode()).hexdigest()[:12]
    words = [str(machine["target"]), str(machine["processor"]), f"{machine['threads']}t"]
    slug = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-").lower() for word in words if word)
    return cache_folder() / "latency" / f"{slug}-{digest}.json"


def levels(size: int, multiple: int, most: int = 8) -> list[int]:
    """Widths at which an axis is measured: multiples of a power of two times `multiple`, and the whole axis."""
    step = multiple
    while size / step > most:
        step *= 2
    return sorted({*range(step, size, step), size})


def grid(widths: Sequence[int], shrinks: Sequence[bool], multiple: int) -> list[Widths]:
    """All combinations of levels of the axes that shrink."""
    found: list[Widths] = [()]
    for size, moves in zip(widths, shrinks, strict=True):
        found = [(*w, n) for w in found for n in (levels(size, multiple) if moves else [size])]
    return found
