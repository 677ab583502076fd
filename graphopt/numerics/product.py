"""The basis in which a product of two factors is best truncated.

Scores l_i . r_j between vectors l and r of dimension d (queries and keys; a head's output and the rows that read it)
do not change when l becomes A^T l and r becomes B^T r with A B^T = I. With the second moments G = E[l l^T] and
H = E[r r^T], any factors G = P^T P and H = Q^T Q, let P Q^T = U diag(s) V^T. Then

    A = P^-1 U diag(s)^1/2,    B = Q^-1 V diag(s)^1/2        gives        E[l' l'^T] = E[r' r'^T] = diag(s),

and dropping the components k+1..d of both is the best approximation of rank k of all the scores: its squared error is
s_{k+1}^2 + ... + s_d^2 (Eckart & Young, 1936, applied to G^1/2 H^1/2). Only moments of l and r are needed.

float64; numpy or torch arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.least_squares import scale

RIDGE = 1e-6
"""Added to the diagonals, relative to their means: directions that never occur keep a finite inverse."""


@dataclass(frozen=True)
class Basis:
    """A change of basis of both factors that leaves their product as it is.

    Attributes:
        left, right: A and B, (d, d), with A B^T = I.
        strength: s, (d,), falling: what component k carries.
    """

    left: Any
    right: Any
    strength: Any


def product_basis(left: Any, right: Any, ridge: float = RIDGE) -> Basis:
    """The basis that orders the components of a product by what they carry.

    Args:
        left: G = E[l l^T], (d, d), symmetric positive semidefinite.
        right: H = E[r r^T], (d, d), likewise.
        ridge: see `RIDGE`.
    """
    xp = array_namespace(left)
    p, q = _root(left, ridge), _root(right, ridge)
    u, s, vt = xp.linalg.svd(p @ q.T)
    root = xp.sqrt(s)[None, :]
    return Basis(xp.linalg.solve(p, u * root), xp.linalg.solve(q, vt.T * root), s)


def _root(gram: Any, ridge: float) -> Any:
    """P with P^T P = gram, upper triangular."""
    xp = array_namespace(gram)
    d = int(gram.shape[0])
    lifted = gram + ridge * scale(gram) * xp.eye(d, dtype=xp.float64, device=gram.device)
    return xp.linalg.cholesky(lifted).T
