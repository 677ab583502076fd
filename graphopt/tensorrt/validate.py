"""All rules over one model."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.delegates import Report, report
from graphopt.errors import ModelError
from graphopt.quantization.static.obeys import violations
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs
from graphopt.target import Target
from graphopt.tensorrt.bodies import check_bodies
from graphopt.tensorrt.findings import SHOWN, Finding, error, gathered, warning
from graphopt.tensorrt.quantised import check_quantised
from graphopt.tensorrt.sparse import check_sparse
from graphopt.tensorrt.types import check_types
from graphopt.tensorrt.versions import Version, feature_since, operator_since, version_of

PLACEMENT = ("fused sums", "no idle pairs", "one scale through data movement")
"""Rules of placement that cost time or accuracy, and stop nothing."""

PLACED = "TensorRT Developer Guide, Q/DQ layer-placement recommendations"
VERSIONS = "graphopt/tensorrt/versions.toml"
DATA_DEPENDENT = ("NonZero", "NonMaxSuppression", "Compress", "Unique")


def validate(model: ir.Model, target: Target, version: str = "10.3") -> list[Finding]:
    """Check a model against every rule of TensorRT that the file alone can break.

    Args:
        model: with inferred shapes, local functions inlined; not changed.
        target: its int8 scheme says where Q and DQ stand best.
        version: the oldest TensorRT that has to take the file.

    Returns:
        errors first; one finding names all nodes that break a rule in the same way.
    """
    oldest = version_of(version)
    checks = (
        _operators(model, oldest),
        check_types(model, oldest),
        check_bodies(model),
        check_quantised(model),
        check_sparse(model),
        _placement(model, target),
        _sizes(model),
    )
    return gathered(finding for check in checks for finding in check)


def require_valid(found: list[Finding], target: Target, beside: Report | None = None) -> None:
    """Raise where there are errors.

    Args:
        found: what `validate` found.
        target: for the message.
        beside: what ONNX Runtime's TensorRT provider would take, told where operators are missing.

    Raises:
        ModelError: names the nodes and what to do, error by error.
    """
    errors = [f for f in found if f.severity == "error"]
    if not errors:
        return
    shown = [f.sentence() for f in errors[:SHOWN]]
    more = f" | and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    hint = "change these nodes"
    if beside is not None and beside.refused:
        hint += f", or lower it for target 'gpu', which runs them beside TensorRT ({beside.summary()})"
    raise ModelError(
        f"TensorRT would not take it: {' | '.join(shown)}{more}", where=f"target {target.name!r}", hint=hint
    )


def parts(model: ir.Model) -> Report:
    """What ONNX Runtime's TensorRT provider would take of a model, in which parts."""
    return report(model, "tensorrt")


def _operators(model: ir.Model, version: Version) -> Iterator[Finding]:
    found = parts(model)
    for refused in found.refused:
        domain = refused.op.rpartition(":")[0]
        for reason in refused.reasons:
            if domain:
                yield error(
                    "plugin",
                    refused.node,
                    f"{refused.op} needs a plugin of that name",
                    "write it in operators of the standard, or load its plugin (trtexec --staticPlugins)",
                    found.sources[0],
                )
                continue
            change = next((c.change for c in found.changes if refused.node in c.nodes), f"replace {refused.op}")
            told = reason if reason.startswith(refused.op) else f"{refused.op}: {reason}"
            yield error("operator", refused.node, told, change, found.sources[0])
    for graph in graphs(model):
        for node in graph:
            since = operator_since(node.op_type) if node.domain in ("", "ai.onnx") else None
            if since is not None and version_of(since) > version:
                text = f"{node.op_type} came with TensorRT {since}, and {version[0]}.{version[1]} is older"
                yield error(
                    "version",
                    node,
                    text,
                    f"use TensorRT {since}, or write {node.op_type} out",
                    VERSIONS,
                )
            if is_onnx(node, "Einsum") and version < feature_since("einsum") and _repeats(node):
                text = "its equation has an ellipsis or a letter twice in one operand, which came with TensorRT 10.12"
                yield error("version", node, text, "write it as MatMul, or use TensorRT 10.12", VERSIONS)
            if is_onnx(node, "RoiAlign", "DeformConv"):
                yield warning(
                    "library",
                    node,
                    f"{node.op_type} is a plugin of TensorRT's own library",
                    "have libnvinfer_plugin on the device (trtexec loads it)",
                    found.sources[0],
                )
            if is_onnx(node, *DATA_DEPENDENT):
                yield warning(
                    "data-dependent",
                    node,
                    f"how much {node.op_type} gives depends on the data",
                    "bound it by TopK or Slice if you can; run.py takes such outputs through an allocator",
                    found.sources[0],
                )


def _repeats(node: ir.Node) -> bool:
    operands = (node.attributes.get_string("equation") or "").replace(" ", "").partition("->")[0].split(",")
    return any("..." in one or len(set(one)) < len(one) for one in operands)


def _placement(model: ir.Model, target: Target) -> Iterator[Finding]:
    if target.quant is None:
        return
    for broken in violations(model, target.quant):
        if broken.rule in PLACEMENT:
            yield warning(
                "placement",
                broken.node,
                f"{broken.rule}: {broken.text}",
                "quantise the float model for this target (dequantize,quantize)",
                PLACED,
            )


def _sizes(model: ir.Model) -> Iterator[Finding]:
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if shapes.dims(value) is None:
            yield error(
                "profile",
                str(value.name),
                "not even the number of its axes is known",
                f"fix its shape (--input-shape {value.name}=...)",
            )
