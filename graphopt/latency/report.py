"""Tables of latencies for people: one row a kind of layer, with the stairs of its widths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.analysis.units import analyse
from graphopt.latency.measure import Feeds, fill, table_of
from graphopt.latency.shapes import Site, sites
from graphopt.latency.table import LatencyTable, Widths
from graphopt.latency.terms import points_of
from graphopt.pruning.work import sized
from graphopt.target import Target

EQUAL = 0.05
"""Relative difference of two times below which they stand on the same tread."""


@dataclass(frozen=True)
class Measured:
    """What `measured` found.

    Attributes:
        table: everything known for this machine and target.
        path: its file.
        new: how many entries were measured now.
        sites: the layers of the model, in float and, where the target executes int8, in int8.
    """

    table: LatencyTable
    path: Path
    new: int
    sites: tuple[Site, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each kind of layer, in the order of the model."""
        kinds = Counter((site.shape, site.widths) for site in self.sites)
        shrinks = {(site.shape, site.widths): site for site in self.sites}
        rows = []
        for (shape, widths), count in kinds.items():
            ms = self.table.time(shape, widths) * self.table.reference_ms
            moving = [axis is not None for axis in shrinks[shape, widths].axes]
            rows.append(
                {
                    "layer": str(shape),
                    "layers": count,
                    "widths": "x".join(map(str, widths)),
                    "ms": ms,
                    "time by width, the others full": "; ".join(
                        stairs(self.table, str(shape), widths, axis) for axis, moves in enumerate(moving) if moves
                    ),
                }
            )
        return rows


def measured(model: ir.Model, target: Target, feeds: Feeds, threads: int = 1) -> Measured:
    """Measure all layers of a model at the widths that pruning can give them, where the table lacks them.

    Args:
        model: analysed for what can shrink; not changed.
        target: where to run.
        feeds: one sample, which gives the sizes that the model leaves open.
        threads: of one session.

    Raises:
        MissingBackendError: the target cannot run here.
        DataError: the table's file is damaged.
    """
    known = sized(model, feeds)
    coupling = analyse(known)
    found = [*sites(known, coupling), *(sites(known, coupling, integer=True) if target.quant is not None else ())]
    table, path = table_of(target, threads)
    new = fill(table, points_of(found, target.channel_multiple), target, threads=threads, path=path)
    return Measured(table, path, new, tuple(found))


def stairs(table: LatencyTable, shape: str, widths: Widths, axis: int) -> str:
    """Relative times along one axis, the others full: `16: 0.34, 32: 0.67, 64: 1`; a tread has its last width."""
    times = {
        w[axis]: time
        for w, time in sorted(table.entries[shape].items())
        if all(have == full for a, (have, full) in enumerate(zip(w, widths, strict=True)) if a != axis)
        and w[axis] <= widths[axis]
    }
    whole = times[widths[axis]] or 1.0
    treads: list[tuple[int, float]] = []
    for width, time in times.items():
        if treads and abs(time - treads[-1][1]) <= EQUAL * whole:
            treads.pop()
        treads.append((width, time))
    return ", ".join(f"{width}: {time / whole:.2g}" for width, time in treads)
