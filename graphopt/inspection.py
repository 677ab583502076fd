"""What a model is made of, what of it can be pruned, and for what cannot: why."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from graphopt.given import opened
from graphopt.pipeline.plan import as_target
from graphopt.report.data import Stats, Units

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.analysis.units import Coupling
    from graphopt.delegates import Report
    from graphopt.files.stored import Storage
    from graphopt.report.units import UnitGroup
    from graphopt.sparsity.verdicts import Eligibility
    from graphopt.target import Target

INSPECTION_SCHEMA = 1
"""Version of `Inspection.to_dict`: raised whenever a key changes its meaning or goes."""


@dataclass
class Inspection:
    """What a model is made of and what of it can be pruned.

    Attributes:
        stats: counts.
        inputs, outputs: rows of name, dtype and shape; free dimensions are names or None.
        units: what can be pruned, in short.
        coupling: the whole analysis.
        storage: how the weights are stored in the file, where it is compressed.
        sparsity: which layers a target's kernels that skip zeros may execute, where a target was asked for.
        delegates: what each accelerator that this target's runtime may hand nodes to would take.
    """

    model: ir.Model
    stats: Stats
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    units: Units
    coupling: Coupling
    storage: Storage | None = None
    sparsity: Eligibility | None = None
    delegates: tuple[Report, ...] = ()

    def groups(self) -> list[UnitGroup]:
        """The units by the parameters they are slices of."""
        from graphopt.report.units import groups

        return groups(self.coupling)

    def to_dict(self, *, units: bool = False) -> dict[str, Any]:
        """Plain data for JSON.

        Args:
            units: with every unit and its members, and every frozen axis.
        """
        found: dict[str, Any] = {
            "schema": INSPECTION_SCHEMA,
            "stats": asdict(self.stats),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "prunable": asdict(self.units),
            "storage": None if self.storage is None else asdict(self.storage),
            "sparsity": None if self.sparsity is None else self.sparsity.to_dict(),
            "delegates": [report.as_dict() for report in self.delegates],
        }
        if units:
            from graphopt.report.units import units_to_dicts

            found["groups"] = [asdict(group) for group in self.groups()]
            found["units"] = units_to_dicts(self.coupling)
            found["frozen"] = [asdict(axis) for axis in self.coupling.frozen]
        return found


def inspect(
    model: ir.Model | str | os.PathLike[str],
    *,
    dim: Mapping[str, int] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    target: Target | str | None = None,
) -> Inspection:
    """Count a model and find out what can be pruned, and for what cannot: why.

    Args:
        model: an ONNX file or a loaded model; not changed.
        dim: fixed sizes of symbolic input dimensions.
        input_shape: fixed shapes of inputs, by name.
        target: also which layers its kernels that skip zeros may execute, and which nodes its accelerators would take,
            and for the others: why not.

    Raises:
        ModelError: the model is invalid.
        UsageError: there is no such target.
    """
    from graphopt.analysis.units import analyse
    from graphopt.bundle import describe_model
    from graphopt.delegates import report
    from graphopt.files.compression import storage_of
    from graphopt.manager import stats
    from graphopt.pipeline.clone import private_clone
    from graphopt.report.units import summary
    from graphopt.rewriting.prepare import prepare
    from graphopt.sparsity.eligibility import eligibility

    chosen = None if target is None else as_target(target)
    given = opened(model, None)
    loaded = opened(given, dim, input_shape)
    readable = private_clone(loaded)
    prepare(readable)
    coupling = analyse(readable)
    return Inspection(
        loaded,
        stats(loaded),
        **describe_model(loaded),
        units=summary(loaded, coupling),
        coupling=coupling,
        storage=storage_of(given),
        sparsity=None if chosen is None else eligibility(loaded, chosen),
        delegates=() if chosen is None else tuple(report(loaded, name) for name in chosen.delegates),
    )
