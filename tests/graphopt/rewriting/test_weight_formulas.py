from __future__ import annotations

import tracemalloc

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.weight_formulas import computed


def test_a_long_formula_holds_what_is_still_read() -> None:
    weight = ir.val("w", const_value=ir.Tensor(np.ones((256, 256), np.float32), name="w"))
    nodes = [ir.node("Neg", [weight])]
    for _ in range(20):
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], nodes[-1].outputs[0]]))
    ir.Graph([], nodes[-1].outputs, nodes=nodes, initializers=[weight], opset_imports={"": 17})
    tracemalloc.start()
    result = computed(nodes, 17)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result is not None
    assert (result == -(2.0**20)).all()
    assert peak < 3 * result.nbytes
