"""What a file must be to travel: no operator sets that nothing uses, none newer than the target reads, no open sizes
where it takes none, and nothing that an optimiser made for its own machine."""

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


def refuse_free_sizes(model: ir.Model, target: Target) -> None:
    """Refuse a model with open sizes where the target takes none.

    Raises:
        ModelError: names the dimensions and how to fix them.
    """
    from graphopt.data.feeds import input_specs

    if not target.static_shapes:
        return
    free: dict[str, str] = {}
    for spec in (s for s in input_specs(model) if s.required):
        for axis, size in enumerate(spec.shape or (None,)):
            if not isinstance(size, int):
                option = f"--dim {size}=SIZE" if size else f"--input-shape {spec.name}=..."
                free.setdefault(option, f"{size or f'axis {axis}'} of input {spec.name!r}")
    if free:
        raise ModelError(
            f"target {target.name!r} takes fixed sizes only, and {', '.join(free.values())} "
            f"{'is' if len(free) == 1 else 'are'} free",
            hint=f"fix {'it' if len(free) == 1 else 'them'}: {' '.join(free)}",
        )


PRIVATE_DOMAINS = {
    "com.microsoft.nchwc": "ONNX Runtime's optimiser writes it for the vector width of the processor it runs on",
    "com.ms.internal.nhwc": "ONNX Runtime's optimiser writes it for the provider of one device",
}
"""Operator sets that no file should hold, and why."""

PRIVATE_OPERATORS = {"EPContext": "it holds code that was compiled for one device and library"}
"""Operators of com.microsoft that no model should hold that is to be lowered, and why."""


def refuse_private(model: ir.Model) -> None:
    """Refuse a file that an optimiser saved for its own machine.

    Raises:
        ModelError: names the first such node.
    """
    for node in model.graph.all_nodes():
        reason = PRIVATE_DOMAINS.get(node.domain)
        if reason is None and node.domain == "com.microsoft":
            reason = PRIVATE_OPERATORS.get(node.op_type)
        if reason is not None:
            raise ModelError(
                f"no other machine runs it: {reason}",
                where=f"node {node.name or '(unnamed)'} ({node.domain}.{node.op_type})",
                hint="lower the model that this one was made of",
            )


def beyond_onnx(model: ir.Model) -> list[str]:
    """Operators outside the standard, sorted, each with its domain; model-local functions are no such."""
    own = {(domain, name) for domain, name, _ in model.functions}
    nodes = model.graph.all_nodes()
    found = {f"{n.domain}.{n.op_type}" for n in nodes if n.domain not in ("", "ai.onnx", "ai.onnx.ml")
             and (n.domain, n.op_type) not in own}  # fmt: skip
    return sorted(found)
