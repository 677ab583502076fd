"""What the report tells of number formats within a budget: a row a layer, and a sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from graphopt.quantization.formats import Candidate
from graphopt.quantization.search.budget import Choice, Table
from graphopt.quantization.search.sensitivity import decibel

BITS = {"float": 32, "int8": 8, "int8-dynamic": 8, "int8-weights": 8, "int4-weights": 4}


def layer_table(
    found: Mapping[str, Candidate],
    table: Table,
    formats: Mapping[str, str],
    recovered: Mapping[str, float],
    *,
    timed: bool,
) -> list[dict[str, Any]]:
    """A row for every layer that has a choice, in graph order.

    Args:
        found: names and operators.
        table: costs of formats; times in seconds.
        formats: what was chosen.
        recovered: by how much the noise of the whole falls with a layer in float, of some.
        timed: whether times were measured, and not guessed.
    """
    rows = []
    for key, costs in table.items():
        cost, in_float = costs[formats[key]], costs["float"]
        rows.append(
            {
                "layer": found[key].label,
                "op": found[key].op_type,
                "type": formats[key],
                "bits": BITS[formats[key]],
                "output SQNR dB, alone": None if cost.noise <= 0 else _short(decibel(cost.noise)),
                "noise recovered in float": _short(recovered.get(key)),
                "time us": _short(1e6 * cost.time) if timed else None,
                "time us in float": _short(1e6 * in_float.time) if timed else None,
                "bytes": round(cost.bytes),
                "bytes in float": round(in_float.bytes),
            }
        )
    return rows


def told(choice: Choice, table: Table, size: float, ratio: float | None) -> str:
    """How many layers have which format, and what that comes to."""
    counts = Counter(choice.formats[key] for key in table)
    text = "formats within the budget: " + ", ".join(f"{f} for {n} layers" for f, n in counts.items())
    text += f"; {size:.3f} of the bytes of weights"
    text += "" if ratio is None else f", {ratio:.3f} of the time"
    if choice.drop is not None:
        text += f", a drop of {choice.drop:.4g} after {choice.measured} measurements"
    return text


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")
