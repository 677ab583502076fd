"""If and Loop: what TensorRT asks of their bodies beyond the operators in them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import bodies, graphs
from graphopt.tensorrt.findings import Finding, error, warning

TABLE = "onnx-tensorrt operators.md for TensorRT 10.15"


def check_bodies(model: ir.Model) -> Iterator[Finding]:
    """Branches of one rank under different names; carried tensors of one shape; a known number of rows."""
    for graph in graphs(model):
        for node in graph:
            if is_onnx(node, "If"):
                yield from _branches(node)
            elif is_onnx(node, "Loop"):
                yield from _loop(node)
            for body in bodies(node):
                inner = next((n for n in body if is_onnx(n, "QuantizeLinear", "DequantizeLinear")), None)
                if inner is not None:
                    yield warning(
                        "body",
                        inner,
                        "integers in a body were not seen to become integer kernels",
                        "leave what stands in bodies in float (quantize{exclude=...})",
                    )


def _branches(node: ir.Node) -> Iterator[Finding]:
    first, second = bodies(node)
    for a, b in zip(first.outputs, second.outputs, strict=True):
        if a.name == b.name:
            yield error("if", node, f"both branches call an output {a.name!r}", "give them different names", TABLE)
        ranks = [None if (d := shapes.dims(v)) is None else len(d) for v in (a, b)]
        if None not in ranks and ranks[0] != ranks[1]:
            yield error(
                "if",
                node,
                f"its branches give tensors of {ranks[0]} and {ranks[1]} axes",
                "fold with fixed sizes (--dim), which decides Ifs on sizes, or reshape one of them",
                TABLE,
            )


def _loop(node: ir.Node) -> Iterator[Finding]:
    (body,) = bodies(node)
    states = len(node.inputs) - 2
    for before, after in zip(body.inputs[2:], body.outputs[1 : 1 + states], strict=False):
        a, b = shapes.dims(before), shapes.dims(after)
        grows = (
            a is not None
            and b is not None
            and (len(a) != len(b) or any(_differ(x, y) for x, y in zip(a, b, strict=False)))
        )
        if grows:
            yield error(
                "loop",
                node,
                f"what it carries as {before.name!r} changes its shape from {list(a or ())} to {list(b or ())}",
                "carry a tensor of one size, or unroll the loop",
                TABLE,
            )
    stacked = body.outputs[1 + states :]
    trips = node.inputs[0]
    counted = trips is not None and shapes.constant_tensor(trips) is not None
    if stacked and not counted:
        yield error(
            "loop",
            node,
            "it stacks a result of every run, and how many there are is computed: the length of "
            "scan outputs cannot be dynamic",
            "give it a constant trip count, or unroll it",
            TABLE,
        )


def _differ(a: shapes.Dim, b: shapes.Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b
