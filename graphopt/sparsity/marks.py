"""What passes tell each other about sparse weights: keys in the `metadata_props` of nodes, which survive save and load.

    graphopt.sparsity.pattern   of a linear node: the pattern that its weight was given along its input channels, '2:4'
    graphopt.sparsity.role      of a node of a factorised layer W ~ A S B: 'core' (S), 'in' (B), 'out' (A, its bias too)
    graphopt.sparsity.layer     of a node of a factorised layer: which layer it belongs to; a wrapper that several
                                cores share names them all, one a line

They state an intention. What holds is found by looking at the weights: `graphopt.sparsity.found`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast, get_args

import onnx_ir as ir

from graphopt.numerics.sparsity.patterns import Pattern, parse

PATTERN = "graphopt.sparsity.pattern"
ROLE = "graphopt.sparsity.role"
LAYER = "graphopt.sparsity.layer"

Role = Literal["core", "in", "out"]


def declare_pattern(node: ir.Node, pattern: Pattern | str) -> None:
    """Say that the weight of a linear node has a pattern along its input channels."""
    node.metadata_props[PATTERN] = str(pattern)


def declared_pattern(node: ir.Node) -> Pattern | None:
    """The pattern that a pass gave the weight of a node; None where none did, or what stands there is none."""
    text = node.metadata_props.get(PATTERN)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError:
        return None  # written by somebody else: it declares nothing that we know


def mark(node: ir.Node, role: Role, layers: Iterable[str]) -> None:
    """Make a node part of factorised layers."""
    node.metadata_props[ROLE] = role
    node.metadata_props[LAYER] = "\n".join(layers)


def unmark(node: ir.Node) -> None:
    """Take a node out of factorised layers; it is an ordinary node then, with an ordinary weight."""
    for key in (PATTERN, ROLE, LAYER):
        node.metadata_props.pop(key, None)


def role_of(node: ir.Node) -> Role | None:
    """Core, wrapper, or neither."""
    role = node.metadata_props.get(ROLE)
    return cast(Role, role) if role in get_args(Role) else None


def is_wrapper(node: ir.Node) -> bool:
    """True for the nodes of A and B: passes leave them as they are, in float, unless they were made for them."""
    return role_of(node) in ("in", "out")


def layers_of(node: ir.Node) -> tuple[str, ...]:
    """The factorised layers that a node belongs to."""
    return tuple(filter(None, node.metadata_props.get(LAYER, "").split("\n")))
