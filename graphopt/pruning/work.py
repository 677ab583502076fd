"""What a budget is about, as terms of work for the solver: multiply-accumulates, parameters, bytes, units.

A term is a function of the alive counts of some axes. Latency has terms of its own, `graphopt.latency.terms`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.rules import node_key
from graphopt.analysis.scope import initializers
from graphopt.analysis.units import Coupling
from graphopt.pruning.selection import Term, Vector


@dataclass(frozen=True)
class Product:
    """coefficient * product over axes of the number of alive positions.

    Attributes:
        coefficient: what does not depend on units.
        axes, nodes: see `graphopt.pruning.selection.Term`.
    """

    coefficient: float
    axes: tuple[Vector, ...]
    nodes: frozenset[str] = frozenset()

    def work(self, counts: Sequence[int]) -> float:
        """See `Term`."""
        return self.coefficient * math.prod(counts)


def terms_of(
    budget: str, model: ir.Model, coupling: Coupling, feeds: Mapping[str, npt.NDArray[Any]] | None
) -> list[Term]:
    """Terms of a budget: "macs", "params", "bytes" or "units"; the other arguments are those of `mac_terms`."""
    if budget == "units":
        return unit_terms(coupling)
    if budget in {"params", "bytes"}:
        return parameter_terms(coupling, in_bytes=budget == "bytes")
    return mac_terms(model, coupling, feeds)


def mac_terms(model: ir.Model, coupling: Coupling, feeds: Mapping[str, npt.NDArray[Any]] | None) -> list[Term]:
    """Multiply-accumulates by node.

    Args:
        model: with inferred shapes.
        coupling: its analysis.
        feeds: one sample; gives the sizes that the model leaves open. None: these count as 1.
    """
    terms = coupling.terms
    if feeds is not None and uncounted(model, {t.node for t in terms}):
        terms = _analysed_at(model, coupling, feeds) or terms
    return [Product(t.coefficient, t.axes, frozenset({t.node})) for t in terms]


def uncounted(model: ir.Model, counted: Set[str]) -> list[str]:
    """Names of the outputs of linear nodes that are not among those `counted`: their sizes are unknown."""
    linear = (n for n in model.graph.all_nodes() if n.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"})
    return [name for n in linear if (name := n.outputs[0].name) is not None and name not in counted]


def parameter_terms(coupling: Coupling, *, in_bytes: bool = False) -> list[Term]:
    """Elements, or bytes, of the weights; constants that are no weights (integers of a shape) do not count."""
    readers = readers_of(coupling.model)
    terms: list[Term] = []
    for name, value in initializers(coupling.model).items():
        tensor = value.const_value
        if tensor is None or not (tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8):
            continue
        axes = {a: np.stack(f) for a, f in coupling.parameter_axes(name).items() if f}
        fixed = [int(d) for a, d in enumerate(tensor.shape.numpy()) if a not in axes]
        each = tensor.dtype.bitwidth / 8 if in_bytes else 1.0
        terms.append(Product(each * math.prod(fixed), tuple(axes.values()), readers.get(name, frozenset())))
    return terms


def unit_terms(coupling: Coupling) -> list[Term]:
    """One for each unit."""
    readers = readers_of(coupling.model)
    groups: dict[frozenset[str], list[int]] = {}
    for unit in coupling.units:
        nodes = frozenset().union(*(readers.get(m.parameter, frozenset({""})) for m in unit.members))
        groups.setdefault(nodes, []).append(unit.id)
    return [Product(1.0, (np.array(ids, dtype=np.int64),), nodes) for nodes, ids in groups.items()]


def labelled_axes(coupling: Coupling) -> list[Vector]:
    """All labelled axes, each pattern once."""
    found: dict[bytes, Vector] = {}
    for _, axes in coupling.labelled():
        for factors in axes.values():
            if factors:
                stacked = np.stack(factors)
                found.setdefault(stacked.tobytes() + bytes(str(stacked.shape), "ascii"), stacked)
    return list(found.values())


def full_counts(term: Term) -> list[int]:
    """Lengths of a term's axes."""
    return [int(np.atleast_2d(axis).shape[1]) for axis in term.axes]


def readers_of(model: ir.Model) -> dict[str, frozenset[str]]:
    """Keys of the nodes that read each initializer."""
    return {name: frozenset(node_key(use.node) for use in value.uses()) for name, value in initializers(model).items()}


def _analysed_at(model: ir.Model, coupling: Coupling, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
    """Cost terms for inputs of these shapes; none where the units are not the same with known shapes."""
    from graphopt.analysis.units import analyse

    found = analyse(sized(model, feeds))
    same = [u.members for u in found.units] == [u.members for u in coupling.units]
    return list(found.terms) if same else []


def sized(model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> ir.Model:
    """A clone whose inputs have the shapes of these feeds, and whose other shapes follow from them."""
    from graphopt.model import infer_shapes
    from graphopt.pipeline.clone import private_clone

    copy = private_clone(model)
    for value in copy.graph.inputs:
        if value.name is not None and value.name in feeds:
            value.shape = ir.Shape(np.shape(feeds[value.name]))
    infer_shapes(copy)
    return copy
