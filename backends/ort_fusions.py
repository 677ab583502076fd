"""Fusions of ONNX Runtime that make a quantised model slower, found by timing it with and without them.

Where sizes are fixed, ONNX Runtime 1.31 makes one Gemm of MatMul and Add before it looks for integer kernels. A
product of integers whose sum is not quantised again then finds none: it runs in float, and its weights are
dequantised at every run. MiniLM in int8 with 16 tokens took 38 ms so, and 1.9 ms without the fusion; where every sum
is quantised both ways take the same time. Whether a model is such a one depends on the runtime's rules, so it is
asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data.feeds import Array

FUSION = "MatMulAddFusion"
"""Name of the optimiser in ONNX Runtime."""

ENTRY = "optimization.disable_specified_optimizers"
"""Entry of a session's configuration that turns optimisers off by name."""

SLOW_FUSION = (
    f"ONNX Runtime's {FUSION} makes this model slower: run.py turns it off (`config` of the manifest's `session`), "
    "and so must whoever loads model.onnx otherwise."
)
"""What the reader of a bundle must know."""

GAIN = 0.8
"""Of the time with the fusion: without it the model must be faster than that, or all stays as it is by default."""


def configuration(model: ir.Model, feeds: Mapping[str, Array], seconds: float) -> dict[str, str]:
    """Entries of the session's configuration with which a model runs faster on the CPU; {} where the defaults do.

    Args:
        model: what is deployed.
        feeds: one batch of inputs to time it on.
        seconds: time to spend, where there is something to find out.
    """
    from graphopt.executor import Session
    from graphopt.timing import paired

    if not _multiplies_integers(model):
        return {}
    entries = {ENTRY: FUSION}
    with Session(model, optimize=True) as usual, Session(model, optimize=True, config=entries) as without:
        calls = [lambda: usual.run(feeds), lambda: without.run(feeds)]
        return entries if paired(calls, seconds).ratios[1] < GAIN else {}


def _multiplies_integers(model: ir.Model) -> bool:
    """Whether some product reads dequantised numbers and is added to."""
    for node in model.graph.all_nodes():
        if node.op_type == "MatMul" and node.domain == "":
            quantised = any(
                value is not None and (made := value.producer()) is not None and made.op_type == "DequantizeLinear"
                for value in node.inputs
            )
            if quantised and any(use.node.op_type == "Add" for use in node.outputs[0].uses()):
                return True
    return False
