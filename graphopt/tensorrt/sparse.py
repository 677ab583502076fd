"""2:4 zeros: do they hold on the numbers that are stored, and on the numbers that these stand for?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.found import fullest_groups
from graphopt.sparsity.marks import declared_pattern, role_of
from graphopt.sparsity.shapes import Objection
from graphopt.sparsity.weights import Weight, weight_of
from graphopt.tensorrt.findings import Finding, warning
from graphopt.tensorrt.quantised import LAYERS

GROUP, KEPT = 4, 2
SOURCE = "TensorRT 8.5 Developer Guide, Sparsity"


def check_sparse(model: ir.Model) -> Iterator[Finding]:
    """Layers that a pass made 2:4 and that are so no longer, stored or dequantised."""
    for graph in graphs(model):
        for node in graph:
            if not is_onnx(node, *LAYERS) or declared_pattern(node) is None or role_of(node) in ("in", "out"):
                continue
            found = weight_of(node)
            if isinstance(found, Objection) or found.rows.shape[-1] < GROUP:
                continue
            stored, meant = two_of_four(found.rows, found.zero), two_of_four(dequantised(found))
            if not stored or not meant:
                where = "its integers" if not stored and meant else "the numbers that its integers stand for"
                where = where if found.dequantise is not None else "its weight"
                yield warning(
                    "2:4",
                    node,
                    f"it was made 2:4, and {where} are so no longer: it runs dense",
                    "sparsify after what changed it, or keep zero points 0",
                    SOURCE,
                )


def two_of_four(rows: npt.NDArray[Any], zero: int = 0) -> bool:
    """Whether at most two of every four neighbours on the last axis are other than `zero`."""
    return fullest_groups(np.ascontiguousarray(rows), [GROUP], zero).get(GROUP, GROUP) <= KEPT


def dequantised(weight: Weight) -> npt.NDArray[np.float32]:
    """What the stored rows stand for up to their scales, which are positive: the same zeros, in float."""
    rows = np.asarray(weight.rows, np.float32)
    return rows if weight.dequantise is None else rows - np.float32(weight.zero)
