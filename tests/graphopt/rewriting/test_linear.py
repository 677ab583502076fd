from __future__ import annotations

import numpy as np
import pytest
from golden import parse

from graphopt.rewriting import row_blocks
from graphopt.rewriting.linear import Linear, linear_view

NODES = {
    "y = Conv <group: int = 2> (x, w)": (6, 2, 3, 3),
    "y = ConvTranspose <group: int = 2> (x, w)": (4, 3, 3, 3),
    "y = Gemm <alpha: float = 0.3> (x, w)": (4, 6),
    "y = Gemm <alpha: float = 0.3, transB: int = 1> (x, w)": (6, 4),
    "y = MatMul (x, w)": (4, 6),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("node", NODES)
def test_a_weight_added_in_blocks_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, node: str, sign: float) -> None:
    shape = NODES[node]
    generator = np.random.default_rng(0)
    numbers = ", ".join(f"{v:.7f}" for v in generator.standard_normal(shape).ravel())
    x = "float[1,4,8,8] x" if len(shape) == 4 else "float[1,4] x"
    model = parse(f"g ({x}) => (float y) <float{list(shape)} w = {{{numbers}}}> {{ {node} }}")
    linear = linear_view(model.graph[0], opset=17)
    assert isinstance(linear, Linear)
    matrices = linear.matrices()
    total = generator.standard_normal(matrices.shape)
    expected = sign * matrices + total
    monkeypatch.setattr(row_blocks, "BLOCK", 8 * 2 * matrices[0, 0].size)
    assert len(list(row_blocks.row_blocks(matrices.shape[1:]))) > 1
    linear.add_to(total, sign)
    assert total.tobytes() == expected.tobytes()
