"""Orders of channels between grouped convolutions: exact, and what can go is a few channels at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from text_graph import graph

from graphopt.analysis.certificate import certify
from graphopt.analysis.units import analyse
from graphopt.pipeline.clone import private_clone
from graphopt.rewriting.shuffles import gather_shuffles
from graphopt.rewriting.transversals import order_transversals, transversals


def network(groups, each, *, between=True, seed=0):
    """Grouped convolution, shuffle, depthwise convolution, grouped convolution, as in ShuffleNet."""
    size = groups * each
    middle = "d = Conv<group = GROUPS>(s, wd, bd)" if between else "d = Relu(s)"
    weights = {"wd": (size, 1, 1, 1), "bd": (size,)} if between else {}
    return graph(
        f"(float[N,{2 * groups},3,3] x) => (float[N,{2 * groups},3,3] y)",
        f"""p = Conv<group = {groups}>(x, wp, bp)
        n = BatchNormalization(p, scale, shift, mean, variance)  r = Relu(n)
        a = Reshape(r, split)  b = Transpose<perm = [0, 2, 1, 3, 4]>(a)  s = Reshape(b, joined)
        {middle.replace("GROUPS", str(size))}
        y = Conv<group = {groups}>(d, wq)""",
        seed=seed,
        wp=(size, 2, 1, 1), bp=(size,), wq=(2 * groups, each, 1, 1), **weights,
        scale=(size,), shift=(size,), mean=(size,), variance=np.linspace(0.5, 2, size, dtype=np.float32),
        split=np.array([0, groups, each, 3, 3]), joined=np.array([0, size, 3, 3]),
    )  # fmt: skip


def feeds(groups, seed=1):
    return {"x": np.random.default_rng(seed).normal(size=(3, 2 * groups, 3, 3)).astype(np.float32)}


@pytest.mark.parametrize(("groups", "each", "between"), [(3, 6, True), (3, 20, True), (4, 6, False), (2, 5, True)])
def test_the_order_is_exact_and_frees_a_channel_of_every_group_at_a_time(groups, each, between):
    model = network(groups, each, between=between)
    before = run(model, feeds(groups))
    gather_shuffles(model)
    few = [u for u in analyse(model).units if ("wq", 1) in {(m.parameter, m.axis) for m in u.members}]
    assert order_transversals(model)
    assert_close(run(model, feeds(groups)), before)
    coupling = analyse(model)
    found = [u for u in coupling.units if ("wq", 1) in {(m.parameter, m.axis) for m in u.members}]
    assert len(found) == each > len(few)
    assert all(len(m.indices) == groups for u in found for m in u.members if m.parameter == "wp")
    dead = {u.id for u in found[::2]}
    assert certify(model, coupling, dead, [feeds(groups)], 0).holds


def test_weak_channels_stand_together():
    model = network(3, 6)
    value = model.graph.initializers["wp"]
    # place o of group g goes to place 3 o + g, in group o // 2: these three are of different groups on both sides
    array = value.const_value.numpy().copy()
    array[[0, 8, 16]] *= 1e-3
    value.const_value = ir.tensor(array, name="wp")
    gather_shuffles(model)
    order_transversals(model)
    power = np.square(value.const_value.numpy()).sum(axis=(1, 2, 3)).reshape(3, 6)
    assert (power[:, 0] < 1e-4).all()
    assert (power[:, 1:] > 1e-4).all()


def test_what_others_read_stays():
    model = network(3, 6)
    gather_shuffles(model)
    for name in ("r", "s"):
        copy = private_clone(model)
        value = next(v for node in copy.graph for v in node.outputs if v.name == name)
        copy.graph.outputs.append(value)
        assert not order_transversals(copy)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 10**6))
def test_every_transversal_meets_every_group_once(groups, each, seed):
    random = np.random.default_rng(seed)
    size = groups * each
    pairs = np.stack([random.permutation(size) // each, random.permutation(size) // each])
    number = transversals(pairs, groups, random.random(size))
    for side in pairs:
        for k in range(each):
            assert sorted(side[number == k]) == list(range(groups))
