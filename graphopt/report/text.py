"""Numbers and names as people read them. Names that come from a model pass through `clean` before they are shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that a terminal or browser acts on instead of showing: controls, bidirectional overrides, ..."""


def clean(text: object, limit: int = 200) -> str:
    """A name from a model, safe to print: what is not visible is written as an escape, the middle of a long one cut.

    A hostile file could otherwise move the cursor, recolour the terminal or reverse the reading direction.
    """
    shown = "".join(
        char if char == " " or unicodedata.category(char) not in _UNSAFE else char.encode("unicode_escape").decode()
        for char in str(text)
    )
    if len(shown) <= limit:
        return shown
    half = (limit - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"


def count(number: int | None) -> str:
    """1234567 -> '1,234,567'; None -> 'unknown'."""
    return "unknown" if number is None else f"{number:,}"


def short(number: float | None) -> str:
    """A large count with a unit: 1234567 -> '1.23 M'."""
    if number is None:
        return "unknown"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def size(number: float | None) -> str:
    """Bytes with a decimal unit: 1234567 -> '1.23 MB'."""
    return "unknown" if number is None else f"{short(number)}{'' if abs(number) >= 1e3 else ' '}B"


def duration(seconds: float) -> str:
    """0.0123 -> '12 ms'; 83.2 -> '83.2 s'; 130 -> '2 min 10 s'."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def ratio(value: float) -> str:
    """Time over reference time: 0.4312 -> '0.431x'."""
    return f"{value:.3g}x" if value < 10 else f"{value:.1f}x"


def moved(before: float, after: float) -> bool:
    """Whether a quantity changed by as much as one shows: 0.1 per cent."""
    return abs(after - before) >= 1e-3 * abs(before) and after != before


def change(before: float | None, after: float | None) -> str:
    """The relative change: (200, 100) -> '-50.0%'; empty where it says nothing."""
    if before is None or after is None or before == after:
        return ""
    if before == 0:
        return f"+{short(after)}"
    if not moved(before, after):
        return "<0.1%"
    percent = 100 * (after - before) / before
    return f"{percent:+.1f}%" if abs(percent) < 1000 else f"{after / before:.3g}x"


def score(metric: str, value: float) -> str:
    """A metric: shares as per cent, anything else with four digits."""
    return f"{value:.2%}" if metric in ("top1", "top5") else f"{value:.5g}"


def names(found: Iterable[str], most: int = 3, limit: int = 60) -> str:
    """The first few names, each of at most `limit` characters, and how many more there are."""
    every = list(found)
    shown = ", ".join(clean(name, limit) for name in every[:most])
    return shown if len(every) <= most else f"{shown} and {len(every) - most:,} more"


def cell(value: object) -> str:
    """One value of a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, (list, tuple)):
        return names(map(str, value), 6)
    return clean(value, 300)
