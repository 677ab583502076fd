"""What the removal of units saves, and how much of a model units reach.

Work and storage are sums of products of axis lengths: a node multiplies ``c * prod_j n_j`` times, a parameter holds
``c * prod_j n_j`` elements, where ``n_j`` runs over the axes that carry units. A unit that takes ``k_j`` positions of
axis ``j`` saves ``c * (prod_j n_j - prod_j (n_j - k_j))`` where it goes alone; what no unit touches is
``c * prod_j f_j`` with ``f_j`` the positions that carry none. Everything is linear in the lengths of the axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from graphopt.analysis.labels import Vector
from graphopt.analysis.rules import Product
from graphopt.analysis.units import Coupling


@dataclass(frozen=True)
class Savings:
    """Of one kind of cost, over a whole model.

    Attributes:
        total: what the counted nodes or parameters cost as they are.
        reachable: the part of it that belongs to at least one unit.
        alone: shape (units + 1,): what each unit saves where it alone goes, by id; ``alone[0]`` is 0.
    """

    total: float
    reachable: float
    alone: npt.NDArray[np.float64]


def macs(coupling: Coupling, *, exact: bool = False) -> Savings:
    """Multiply-accumulates at the recorded shapes; `exact`: counting only units that are exact to remove."""
    return _savings(((term.coefficient, term.axes) for term in coupling.terms), coupling, exact)


def parameters(coupling: Coupling, *, exact: bool = False) -> Savings:
    """Elements of the parameters that have labels; `exact`: counting only units that are exact to remove."""
    return _savings(_products(coupling), coupling, exact)


def _products(coupling: Coupling) -> Iterable[Product]:
    """One product a parameter. What any of its uses lets go can go, so the factors of all uses count."""
    shapes: dict[str, tuple[int, ...]] = {}
    factors: dict[str, dict[int, dict[bytes, Vector]]] = {}
    for use in coupling.uses:
        axes = factors.setdefault(use.parameter, {})
        shapes.setdefault(use.parameter, use.shape)
        for axis, found in use.axes.items():
            for vector in coupling.solution.units(found):
                axes.setdefault(axis, {})[vector.tobytes()] = vector
    for name, axes in factors.items():
        rest = 1.0
        for axis, size in enumerate(shapes[name]):
            rest *= 1 if axis in axes else size
        yield rest, tuple(np.stack(list(vectors.values())) for vectors in axes.values())


def _savings(products: Iterable[Product], coupling: Coupling, exact: bool) -> Savings:
    counted = np.array([0, *(unit.id if unit.exact or not exact else 0 for unit in coupling.units)])
    alone = np.zeros(len(counted))
    total = reachable = 0.0
    for coefficient, axes in products:
        stacks = [counted[np.atleast_2d(axis)] for axis in axes]
        whole = coefficient * prod(stack.shape[1] for stack in stacks)
        free = coefficient * prod(int((stack == 0).all(axis=0).sum()) for stack in stacks)
        total += whole
        reachable += whole - free
        touched = np.unique(np.concatenate([stack.ravel() for stack in stacks])) if stacks else np.zeros(0, int)
        left = np.full(len(touched), coefficient)
        for stack in stacks:
            left *= stack.shape[1] - _positions(stack, touched)
        alone[touched] += whole - left
    alone[0] = 0.0
    return Savings(total, reachable, alone)


def _positions(stack: npt.NDArray[np.int64], units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many positions of an axis carry each of some units; `stack` has shape (factors, positions)."""
    stack = stack.copy()
    for index in range(1, len(stack)):  # a position that carries a unit twice is one position
        stack[index][(stack[:index] == stack[index]).any(axis=0)] = 0
    found, counts = np.unique(stack, return_counts=True)
    result = np.zeros(len(units), dtype=np.int64)
    result[np.searchsorted(units, found)] = counts
    return result
