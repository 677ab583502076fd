"""Which slices of parameters a unit consists of, and what kind of unit it is; all units in one sort."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from graphopt.analysis.labels import Solution, Vector
from graphopt.analysis.rules import Role, Use

Mode = Literal["channel", "head", "kv_group", "query_head", "head_dim", "group", "group_channel"]
"""channel: a position of an axis that is never split. head: one matrix of a batched product of activations; kv_group:
one that several heads of queries read; query_head: one of these, the same in every group. head_dim: a position within
all heads. group, group_channel: the coordinates of any other split, as of a channel shuffle."""

Slices = list[tuple[str, int, tuple[int, ...], Role]]
_ROLES: tuple[Role, ...] = ("producer", "consumer", "follower")


class MemberTable:
    """Slices (parameter, axis, positions, role) by unit, in the order in which the graph uses the parameters."""

    def __init__(self, uses: Iterable[Use], solution: Solution) -> None:
        self._slots: list[tuple[str, int]] = []
        places: dict[tuple[str, int], int] = {}
        seen: set[tuple[int, int, bytes]] = set()
        rows: list[Vector] = []
        for use in uses:
            for axis, factors in use.axes.items():
                slot = places.setdefault((use.parameter, axis), len(places))
                role = _ROLES.index(use.roles[axis])
                for vector in solution.units(factors):
                    key = (slot, role, vector.tobytes())
                    if key not in seen:
                        seen.add(key)
                        at = np.flatnonzero(vector)
                        rows.append(np.stack([vector[at], np.full(len(at), slot), at, np.full(len(at), role)]))
        self._slots = list(places)
        table = np.concatenate(rows, axis=1) if rows else np.empty((4, 0), dtype=np.int64)
        self._unit, self._slot, self._at, self._role = table[:, np.lexsort(table[2::-1])]
        self._starts = np.searchsorted(self._unit, np.arange(solution.count + 2))

    def of(self, unit: int) -> Slices:
        """The slices of one unit."""
        rows = slice(self._starts[unit], self._starts[unit + 1])
        slots, at, roles = self._slot[rows], self._at[rows], self._role[rows]
        found: Slices = []
        for slot in np.unique(slots):
            mine = slots == slot
            # Positions that one use produces and another follows are zeroed with the unit.
            indices = tuple(np.unique(at[mine]).tolist())
            found.append((*self._slots[slot], indices, _ROLES[int(roles[mine].min())]))
        return found


def modes(solution: Solution) -> list[Mode]:
    """What kind of unit each is, by id; entry 0 stands for none."""
    kinds: list[Mode] = ["channel"] * (solution.count + 1)
    has = {trait: _mask(rows, solution.count) for trait, rows in solution.traits.items()}
    nothing = np.zeros(solution.count + 1, dtype=bool)
    inner, outer, copy = (has.get(trait, nothing) for trait in ("inner", "outer", "copy"))
    heads = solution.traits.get("head", np.empty((0, 1), dtype=np.int64))
    is_head = _mask(heads, solution.count)
    shared = heads[((heads != 0).sum(axis=1) > 1) & copy[heads].any(axis=1)]
    is_shared = _mask(shared, solution.count)
    beside = _mask(solution.monomials[is_head[solution.monomials].any(axis=1)], solution.count) & ~is_head
    told: list[tuple[Vector, Mode]] = [
        (np.flatnonzero(outer), "group"),
        (np.flatnonzero(inner), "group_channel"),
        (np.flatnonzero(beside & (inner | outer)), "head_dim"),
        (np.flatnonzero(is_head), "head"),
        (np.flatnonzero(is_shared & ~copy), "kv_group"),
        (np.flatnonzero(is_shared & copy), "query_head"),
    ]
    for units, mode in told:
        for unit in units:
            kinds[unit] = mode
    kinds[0] = "channel"
    return kinds


def _mask(units: Vector, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which unit ids occur."""
    mask = np.zeros(count + 1, dtype=bool)
    mask[units] = True
    mask[0] = False
    return mask
