"""Operators that only move data, described by what they do to one axis; labels and dead values are moved alike.

A `Move` says: the positions of axis `source` appear in the axes `results` of the output, arranged as `apply` arranges a
vector. `apply` is run by numpy on the labels themselves, so a channel shuffle, a flatten or a split of heads needs no
rule of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.labels import Axes, Factors, varying_axes
from graphopt.analysis.rules import Labeller, OpRule, where

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Move:
    """Where the positions of one input axis go.

    Attributes:
        source: axis of the first input.
        results: axes of the output that `apply`'s result spans, in order.
        apply: takes a vector over the source axis, gives an array over `results`.
        keep: the only one of `results` that may be shortened, where the operator leaves no choice.
    """

    source: int
    results: tuple[int, ...]
    apply: Callable[[Array], Array]
    keep: int | None = None


def taking(places: slice | Array) -> Callable[[Array], Array]:
    """Some positions of the axis."""
    return lambda vector: vector[places]


def same(vector: Array) -> Array:
    """The axis as it is."""
    return vector


class Movement(OpRule):
    """Rule of an operator whose output is its first input, rearranged."""

    @abstractmethod
    def moves(self, node: ir.Node, axes: Sequence[int], output: int) -> list[Move] | str:
        """Moves of the labelled `axes`, or the reason why they cannot be followed. Axes left out end here: frozen."""

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        # A parameter that is rearranged before its use: zeroing its slices zeroes the unit wherever they end up.
        x = g.operand(node, 0, role="producer")
        taken: list[Array] = []
        for index, output in enumerate(node.outputs):
            moves = self.moves(node, list(x), index) if x else []
            if isinstance(moves, str):
                g.freeze(x, f"{name}: {moves}")
                continue
            followed = {move.source for move in moves}
            g.freeze(x, f"{name}: the axis cannot be followed", only=[a for a in x if a not in followed])
            result: Axes = {}
            for move in moves:
                kept = None if move.keep is None else move.results.index(move.keep)
                for factor in _together(g, move, x[move.source]):
                    moved = move.apply(factor)
                    taken.append(moved.ravel())
                    for place, factors in g.table.box(moved, name, kept).items():
                        axis = move.results[place]
                        result[axis] = (*result.get(axis, ()), *factors)
            g.set(output, result)
        source = node.inputs[0]
        if x and shapes.constant_tensor(source) is not None and source is not None and not shapes.is_tied(source):
            # A vector is labelled for this use alone: positions that it leaves to other uses are no units of it.
            used = np.concatenate([np.zeros(1, np.int64), *taken])
            for factors in x.values():
                left = [np.where(np.isin(factor, used), 0, factor) for factor in factors]
                g.table.freeze(left, f"{name}: it leaves these positions out")

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        source = node.inputs[0]
        if source is None:
            return
        for index, output in enumerate(node.outputs):
            if not d.axes(output):
                continue
            moves = self.moves(node, list(d.operand_axes(node, 0)), index)
            if isinstance(moves, str):
                continue
            for move in moves:
                values = d.operand(node, 0, move.source)
                if values is None:
                    continue
                moved = move.apply(values)
                for place, axis in enumerate(move.results):
                    if axis in d.axes(output):
                        rows = np.moveaxis(moved, place, 0).reshape(moved.shape[place], -1)
                        uniform = (rows == rows[:, :1]).all(axis=1)
                        found = np.where(uniform, rows[:, 0], np.nan)
                        # Several axes may have become this one: what is known along either is known of it.
                        known = d.of(output, axis)
                        d.set(output, axis, found if known is None else np.where(np.isnan(known), found, known))


def _together(g: Labeller, move: Move, factors: Factors) -> Factors:
    """Factors that end along one axis each; those that end along several are one: their product is what is split."""
    mixed = [len(varying_axes(move.apply(factor))) > 1 for factor in factors]
    if sum(mixed) < 2:
        return factors
    rest = g.table.product([factor for factor, several in zip(factors, mixed, strict=True) if several])
    return (*(factor for factor, several in zip(factors, mixed, strict=True) if not several), rest)
