"""What somebody quantised before is recognised, node by node."""

from __future__ import annotations

import numpy as np
from text_graph import graph

from graphopt.quantization.back.recognised import holds_quantised, quantised_already


def test_nodes_between_the_operators_of_a_quantised_layer_belong_to_it() -> None:
    model = graph(
        "(float[2,4] x) => (float[2,4] y)",
        """a = Relu(x)  b = Tanh(a)  q = QuantizeLinear(b, s)  d = DequantizeLinear(q, s)  m = MatMul(d, w)
        n = com.microsoft.MatMulNBits<K=4, N=4, bits=4, block_size=16>(m, c, t)  y = Neg(n)""",
        imports='"com.microsoft" : 1', s=np.array(0.1, np.float32), w=(4, 4),
        c=np.zeros((4, 1, 8), np.uint8), t=(4,),
    )  # fmt: skip
    found = {node.outputs[0].name: quantised_already(node) for node in model.graph}
    assert {name for name, reason in found.items() if reason} == {"b", "q", "d", "m", "n"}
    # what a product with quantised weights gives is float like any other
    assert found["y"] is None
    assert found["n"] == "quantised already: MatMulNBits"
    assert holds_quantised(model) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMulNBits": 1}


def test_operators_of_the_same_name_elsewhere_are_something_else() -> None:
    model = graph("(float[2] x) => (float[2] y)", "y = acme.QGemm(x)", imports='"acme" : 1')
    assert quantised_already(model.graph[0]) is None
