"""Latency as terms of work for the budget solver: the table's time of each layer, and the time of all the rest.

The times of layers do not add up to the time of the model: there is work between them, and neighbours share caches.
What the dense model takes beyond the sum is dealt out to the other nodes (`graphopt.latency.passing`); where the sum is
larger, it is scaled down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.latency.shapes import Site
from graphopt.latency.table import LatencyTable, Point, grid
from graphopt.pruning.selection import Term, Vector
from graphopt.pruning.work import Product


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer at the widths that its axes leave.

    Attributes:
        table: of measured times.
        site: the layer.
        scale: factor of the table's time.
    """

    table: LatencyTable
    site: Site
    scale: float = 1.0

    @property
    def axes(self) -> tuple[Vector, ...]:
        """Of the widths that can shrink."""
        return tuple(a for a in self.site.axes if a is not None)

    @property
    def nodes(self) -> frozenset[str]:
        """The layer."""
        return frozenset({self.site.key})

    def work(self, counts: Sequence[int]) -> float:
        """Multiples of the reference's time."""
        left = iter(counts)
        widths = tuple(w if a is None else next(left) for w, a in zip(self.site.widths, self.site.axes, strict=True))
        return self.scale * self.table.time(self.site.shape, widths)


@dataclass(frozen=True)
class Constant:
    """Work that stays."""

    amount: float
    axes: tuple[Vector, ...] = ()
    nodes: frozenset[str] = frozenset()

    def work(self, counts: Sequence[int]) -> float:
        """The amount."""
        return self.amount


def points_of(sites: Sequence[Site], multiple: int) -> list[Point]:
    """What the table must hold for these layers, at the levels that their axes can have."""
    found: dict[Point, None] = {}
    for site in sites:
        for widths in grid(site.widths, [a is not None for a in site.axes], multiple):
            found[site.shape, widths] = None
    return list(found)


def latency_terms(table: LatencyTable, sites: Sequence[Site], whole: float, others: Sequence[Product]) -> list[Term]:
    """Terms that add up to the time of the dense model.

    Args:
        table: complete for these layers.
        sites: the layers.
        whole: measured time of the dense model, in multiples of the reference's.
        others: work of the other nodes, in any unit; none: what the layers leave is constant.
    """
    total = sum(table.time(site.shape, site.widths) for site in sites)
    scale = min(1.0, whole / total) if total else 1.0
    terms: list[Term] = [LayerTime(table, site, scale) for site in sites]
    rest, counted = max(0.0, whole - total), sum(o.work([a.shape[1] for a in o.axes]) for o in others)
    if not counted:
        return [*terms, Constant(rest)]
    return [*terms, *(replace(o, coefficient=o.coefficient * rest / counted) for o in others)]
