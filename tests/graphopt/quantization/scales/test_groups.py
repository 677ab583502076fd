"""Scale groups: whatever positive scales are put on them, the model computes the same bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from golden import random_feeds
from random_graphs import random_graph
from random_norm_graphs import norm_graph
from text_graph import graph

from graphopt.executor import Session
from graphopt.quantization.scales.groups import ScaleGroups, scale_groups
from graphopt.quantization.scales.scaling import apply_scales
from graphopt.rewriting.names import Names
from graphopt.rewriting.prepare import prepare


def random_scales(found: ScaleGroups, seed: int) -> np.ndarray:
    """A power of two for every scale there is, the first of them 1."""
    count = 1 + max((int(max(o.divide.max(), o.multiply.max())) for o in found.operands), default=0)
    scales = np.exp2(np.random.default_rng(seed).integers(-3, 4, count))
    scales[0] = 1
    return scales


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(Session(model, optimize=False).run(feeds).values())


def scaled_outputs(
    model: ir.Model, seed: int, *, spoil: bool = False
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Outputs before and after random scales; `spoil` leaves out those of one operand that writes."""
    prepare(model)
    feeds = random_feeds(model)
    before = run(model, feeds)
    found = scale_groups(model.graph)
    if spoil:
        gone = next(o for o in found.operands if o.weight and o.divide.any())
        rest = tuple(dataclasses.replace(o, divide=np.zeros_like(o.divide)) if o is gone else o for o in found.operands)
        found = dataclasses.replace(found, operands=rest)
    changed = apply_scales(found, random_scales(found, seed), Names(model))
    return before, run(model, feeds), changed


@pytest.mark.parametrize("seed", range(60))
def test_any_scales_on_random_graphs_change_no_bit(seed: int) -> None:
    before, after, _ = scaled_outputs(random_graph(seed), seed)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("seed", range(30))
def test_any_scales_on_graphs_of_norms_change_no_bit(seed: int) -> None:
    before, after, _ = scaled_outputs(norm_graph(seed), seed)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_most_random_graphs_have_scales() -> None:
    assert sum(scaled_outputs(random_graph(seed), seed)[2] > 0 for seed in range(20)) > 10


def test_a_scale_that_is_left_out_shows() -> None:
    def model() -> ir.Model:
        return graph(
            "(float[N,4] x) => (float[N,2] y)", "h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v)",
            w=(4, 6), b=(6,), v=(6, 2),
        )  # fmt: skip

    before, after, changed = scaled_outputs(model(), 1)
    assert changed == 3
    np.testing.assert_array_equal(before, after)
    before, after, _ = scaled_outputs(model(), 1, spoil=True)
    assert not np.allclose(before, after)


def test_groups_are_the_channels_of_one_tensor() -> None:
    """Branches of a sum are one group, parts of a concatenation one behind it, layers in a row several."""
    model = graph(
        "(float[N,3] x) => (float[N,2] y)",
        """a = MatMul(x, w)  b = MatMul(x, u)  s = Add(a, b)  r = Relu(s)  c = MatMul(r, t)  d = Relu(c)
        e = Concat<axis=1>(d, r)  y = MatMul(e, v)""",
        w=(3, 4), u=(3, 4), t=(4, 5), v=(9, 2),
    )  # fmt: skip
    found = scale_groups(model.graph)
    assert [len(group) for group in found.groups] == [9]
    writers = [o.value.name for o in found.operands if o.divide.any()]
    readers = [o.value.name for o in found.operands if o.multiply.any()]
    assert writers == ["w", "u", "t"]
    assert readers == ["t", "v"]
    assert found.frozen == {"MatMul(y)": "output 'y' of the graph"}
