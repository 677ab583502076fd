"""A choice of formats as text that chooses the same again: entries `WHAT=FORMAT`, of which the last that fits counts.

*=int8                  nodes by their names, a glob
op:MatMul=int8-dynamic  all nodes of an operator type
out:hidden=float        the node that writes a tensor
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import get_args

from graphopt.errors import UsageError
from graphopt.quantization.formats import Candidate, Format

FORMATS: tuple[Format, ...] = get_args(Format)


def entries(candidates: Iterable[Candidate], assignment: Mapping[str, Format]) -> tuple[str, ...]:
    """Text from which `resolve` makes the same assignment: a line for each operator type, then the exceptions."""
    listed = list(candidates)
    counts: dict[str, Counter[Format]] = {}
    for candidate in listed:
        counts.setdefault(candidate.op_type, Counter())[assignment.get(candidate.key, "float")] += 1
    usual = {op: found.most_common(1)[0][0] for op, found in counts.items()}
    labels = Counter(candidate.label for candidate in listed)
    others = [c for c in listed if assignment.get(c.key, "float") != usual[c.op_type]]
    lines = [f"op:{op}={format}" for op, format in usual.items() if format != "float"]
    for c in others:
        ambiguous = labels[c.label] > 1 or c.label.startswith(("op:", "out:"))
        what = f"out:{c.key}" if ambiguous else glob.escape(c.label)
        lines.append(f"{what}={assignment.get(c.key, 'float')}")
    return tuple(lines)


def resolve(candidates: Iterable[Candidate], given: Sequence[str]) -> dict[str, Format]:
    """The format of each node; float where no entry fits.

    Raises:
        UsageError: an entry is not of the form, fits no node, or asks for what a node that it names cannot be.
    """
    listed = list(candidates)
    found: dict[str, Format] = {c.key: "float" for c in listed}
    for entry in given:
        what, _, wanted = entry.rpartition("=")
        format = next((f for f in FORMATS if f == wanted), None)
        if not what or format is None:
            raise UsageError(
                f"{entry!r} is not WHAT=FORMAT", where="quantize.assignment",
                hint=f"write a glob over names of nodes, op:TYPE or out:TENSOR, '=' and one of {', '.join(FORMATS)}",
            )  # fmt: skip
        fitting = [c for c in listed if _fits(c, what)]
        if not fitting:
            raise UsageError(f"{entry!r} fits no layer", where="quantize.assignment", hint="see `graphopt inspect`")
        able = [c for c in fitting if format in c.formats]
        if not able:
            reason = fitting[0].reasons.get(format, "it has no such form")
            raise UsageError(f"{fitting[0].label} cannot be {format}: {reason}", where="quantize.assignment",
                             hint="give it another format")  # fmt: skip
        found.update((c.key, format) for c in able)
    return found


def _fits(candidate: Candidate, what: str) -> bool:
    if what.startswith("op:"):
        return candidate.op_type == what.removeprefix("op:")
    if what.startswith("out:"):
        return candidate.key == what.removeprefix("out:")
    return fnmatchcase(candidate.label, what)
