"""What the report tells of a measured choice of formats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from graphopt.quantization.formats import Format
from graphopt.quantization.search.choice import Search
from graphopt.quantization.search.classes import LayerClass
from graphopt.quantization.search.sensitivity import decibel


def counted(formats: Iterable[Format]) -> str:
    """How many layers have which format: `int8 for 53 layers, float for 2`."""
    counts = Counter(formats).most_common()
    first = f"{counts[0][0]} for {counts[0][1]} layers" if counts else "nothing"
    return ", ".join([first, *(f"{format} for {count}" for format, count in counts[1:])])


def stays_in_float(seen: Search, refusals: Sequence[str], where: str) -> str:
    """Why the model was left as it is, with what was measured."""
    if not seen.starts:
        return "the model stays in float: no layer has another format on the target"
    measured = ", ".join(f"{name} {ratio}" for name, ratio in seen.starts.items())
    text = f"the model stays in float; time in other formats, of its time in float, on {where}: {measured}"
    if seen.trials:
        text += (
            f"; of {len(seen.trials)} changes of one class of layers, none led to a mixture that was shown to be faster"
        )
    return "; ".join([text, *refusals])


def replayed(entries: Collection[str]) -> str:
    """How to repeat a choice."""
    quoted = ",".join(f"'{entry}'" for entry in entries) + ("," if len(entries) == 1 else "")
    spec = f"quantize{{scheme=auto,assignment=({quoted})}}"
    return f"timing decided, and another run may decide otherwise; the same again: {spec}"


def class_rows(
    groups: Sequence[LayerClass], seen: Search, noise: Mapping[tuple[str, Format], float], chosen: Mapping[str, Format]
) -> list[dict[str, Any]]:
    """A row for each class and format that was tried.

    Args:
        groups: the classes.
        seen: what was timed.
        noise: power of the noise of each class in each format alone.
        chosen: the format of each node.
    """
    rows = []
    for group in groups:
        counts = Counter(chosen.get(key, "float") for key in group.keys)
        for format in group.formats:
            trial = next((t for t in seen.trials if (t.group, t.format) == (group.name, format)), None)
            power = noise.get((group.name, format))
            rows.append(
                {
                    "class": group.name,
                    "layers": len(group.keys),
                    "format": format,
                    "time ratio, changed alone": None if trial is None else str(trial.ratio),
                    "from": None if trial is None else trial.before,
                    "SQNR dB, alone": None if power is None else _rounded(decibel(power)),
                    "chosen for": counts[format],
                }
            )
    return rows


def _rounded(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None
