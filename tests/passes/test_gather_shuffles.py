"""gather-shuffles: a permutation of one axis becomes a Gather, and channels of either side go by themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import context, expect, parse, run

from graphopt.analysis.certificate import certify
from graphopt.analysis.units import analyse
from graphopt.registry import pass_class

SHUFFLES = pass_class("gather-shuffles")()


def chain(split: str, perm: str, joined: str, shape: str = "N,6,4") -> str:
    rank, last = split.count(",") + 1, joined.count(",") + 1
    return f"""g (float[{shape}] x) => (float[{shape}] y)
    <int64[{rank}] split = {{{split}}}, int64[{last}] joined = {{{joined}}}>
    {{ a = Reshape(x, split) b = Transpose<perm = [{perm}]>(a) y = Reshape(b, joined) }}"""


def test_shuffle_becomes_a_gather() -> None:
    wanted = """g (float[N,6,4] x) => (float[N,6,4] y) <int64[6] places = {0, 3, 1, 4, 2, 5}>
    { y = Gather<axis = 1>(x, places) }"""
    expect(chain("-1,2,3,4", "0,2,1,3", "-1,6,4"), wanted, SHUFFLES)


def test_three_parts_are_permuted_together() -> None:
    model = parse(chain("-1,2,3,2", "0,3,1,2", "-1,12", "N,12"))
    feeds = {"x": np.arange(24, dtype=np.float32).reshape(2, 12)}
    before = run(model, feeds)
    assert SHUFFLES.run(model, context()).changed
    assert [node.op_type for node in model.graph] == ["Gather"]
    np.testing.assert_array_equal(run(model, feeds)[0], before[0])


@pytest.mark.parametrize(
    "text",
    [
        chain("-1,2,3,4", "0,1,3,2", "-1,6,4"),  # mixes the axis with its neighbour
        chain("-1,2,3,4", "1,0,2,3", "-1,6,4"),  # mixes the axis with the batch
        """g (float[2,6] x) => (float[2,6] y, float[2,3,2] b) <int64[3] split = {2, 2, 3}, int64[2] joined = {2, 6}>
        { a = Reshape(x, split) b = Transpose<perm = [0, 2, 1]>(a) y = Reshape(b, joined) }""",
    ],
)
def test_other_chains_stay(text: str) -> None:
    expect(text, None, SHUFFLES)


def halves() -> ir.Model:
    """Two convolutions, their channels shuffled, a third that reads them."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> str:
        numbers = ", ".join(f"{x:.3f}" for x in random.standard_normal(shape).ravel())
        return f"= {{{numbers}}}"

    return parse(f"""g (float[1,3,5,5] x) => (float[1,2,5,5] y)
    <float[4,3,1,1] w1 {weight(4, 3)}, float[4,3,1,1] w2 {weight(4, 3)}, float[2,8,1,1] w3 {weight(2, 8)},
     int64[5] split = {{0, 2, 4, 5, 5}}, int64[4] joined = {{0, 8, 5, 5}}>
    {{ l = Conv(x, w1) r = Conv(x, w2) t = Concat<axis = 1>(l, r) a = Reshape(t, split)
      b = Transpose<perm = [0, 2, 1, 3, 4]>(a) s = Reshape(b, joined) y = Conv(s, w3) }}""")


def test_channels_of_both_sides_go_by_themselves() -> None:
    model = halves()
    assert len(analyse(model).units) < 8
    SHUFFLES.run(model, context())
    coupling = analyse(model)
    assert len(coupling.units) == 8
    assert all(unit.exact for unit in coupling.units)
    feeds = [{"x": np.random.default_rng(1).standard_normal((1, 3, 5, 5)).astype(np.float32)}]
    assert certify(model, coupling, {coupling.units[k].id for k in (0, 5, 6)}, feeds, 0).holds
