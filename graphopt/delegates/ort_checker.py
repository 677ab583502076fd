"""ONNX Runtime's own estimate of what NNAPI and CoreML take, for comparison: it looks at operators and ranks alone.

`onnxruntime.tools.mobile_helpers.usability_checker` ships with the wheel. It does not look at types, constants,
attributes and Q/DQ groups ("caveats that have not been checked"), so that it takes more than the providers do; and less
where it errs: it reads an input that is left out as one of unknown shape (Resize without a region), and a misprint in
its list hides ReduceSum from CoreML's NeuralNetwork.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

CHECKED = ("nnapi", "coreml_neuralnetwork", "coreml_mlprogram")
"""Delegates that it has a list for."""


@dataclass(frozen=True)
class Estimate:
    """What the checker says of one delegate.

    Attributes:
        nodes: number of nodes that it counted.
        taken: those that it takes to be supported.
        partitions: of them.
        advice: "YES", "MAYBE" or "NO": whether the delegate is worth a try.
        missing: operators that it has no entry for.
    """

    nodes: int
    taken: int
    partitions: int
    advice: str
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def estimate(model: ir.Model, which: str) -> Estimate:
    """Ask ONNX Runtime's checker about a model as it stands.

    Args:
        model: with inferred shapes; weights are not read.
        which: one of `CHECKED`.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker

    coreml = usability_checker.check_coreml_partitions
    ask: dict[str, Callable[[Any, bool], Any]] = {
        "nnapi": usability_checker.check_nnapi_partitions,
        "coreml_neuralnetwork": lambda proto, fixed: coreml(proto, fixed, "coreml_supported_neuralnetwork_ops.md"),
        "coreml_mlprogram": lambda proto, fixed: coreml(proto, fixed, "coreml_supported_mlprogram_ops.md"),
    }
    import onnx

    before = onnx.NodeProto.__hash__
    try:
        found = ask[which](_readable(model), True)
    finally:
        # it makes nodes hashable by their identity, for all who use the class
        onnx.NodeProto.__hash__ = before  # type: ignore[method-assign]
    return Estimate(
        nodes=found.num_nodes,
        taken=found.num_supported_nodes,
        partitions=found.num_partitions,
        advice=found.suitability().name,
        missing=tuple(sorted(found.unsupported_ops)),
    )


def _readable(model: ir.Model) -> Any:
    """The model as the checker wants it: constants as initializers, every shape annotated."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    copy = model.clone()
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(copy)
    return ir.to_proto(copy)
