"""What a file must be to travel: no operator sets that nothing uses, none newer than the target reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.target import Target


def strip_unused_imports(model: ir.Model) -> ir.Model:
    """A copy without the operator sets that no node uses; optimisers of runtimes leave a dozen of them behind."""
    copy = model.clone()
    used = {""}
    for graph in (*copy.graphs(), *(f.graph for f in copy.functions.values())):
        used |= {node.domain for node in graph}
    used |= {domain for domain, _, _ in copy.functions}
    for domain in list(copy.opset_imports):
        if domain not in used:
            del copy.opset_imports[domain]
    return copy


def check_caps(model: ir.Model, target: Target) -> None:
    """Check that the target's runtime reads this operator set and IR version.

    Raises:
        ModelError: it does not.
    """
    opset = model.opset_imports.get("", 0)
    for what, have, cap in (("opset", opset, target.opset_max), ("IR version", model.ir_version, target.ir_max)):
        if cap is not None and have > cap:
            raise ModelError(
                f"the model has {what} {have}, and target {target.name!r} reads up to {cap}",
                hint=f"export it with {what} {cap} or older",
            )
