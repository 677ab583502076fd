"""prune chooses the form of channel shuffles: reshapes while groups lose alike, a Gather where one loses more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import model as models
from graphopt.analysis.cost import model_stats
from graphopt.base import Context
from graphopt.calibration import load
from graphopt.executor import Session
from graphopt.passes.prune import Prune
from graphopt.progress import Silent
from graphopt.target import Target

TARGET = Target("test", "ort", channel_multiple=1)


def shuffled(copies_left: int, copies_right: int) -> ir.Model:
    """Two convolutions of eight filters, the last of them copies of the first; shuffled, and read by a third."""
    random = np.random.default_rng(5)

    def filters(copies: int) -> np.ndarray:
        weight = random.normal(size=(8, 3, 3, 3)).astype(np.float32)
        weight[8 - copies :] = weight[:copies]
        return weight

    return graph(
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        """l = Conv<pads = [1, 1, 1, 1]>(x, wl)  lr = Relu(l)
        r = Conv<pads = [1, 1, 1, 1]>(x, wr)  rr = Relu(r)  t = Concat<axis = 1>(lr, rr)
        a = Reshape(t, split)  b = Transpose<perm = [0, 2, 1, 3, 4]>(a)  s = Reshape(b, joined)
        y = Conv(s, wo)""",
        wl=filters(copies_left),
        wr=filters(copies_right),
        wo=(4, 16, 1, 1),
        split=np.array([0, 2, 8, 8, 8]),
        joined=np.array([0, 16, 8, 8]),
    )


def pruned(model, with_data=True, **options):
    feeds = {"x": np.random.default_rng(1).normal(size=(64, 3, 8, 8)).astype(np.float32)}
    data = load(feeds, model) if with_data else None
    copy = model.clone()
    result = Prune(**options).run(copy, Context(TARGET, data, None, 0, 1, Silent()))
    models.infer_shapes(copy)
    models.check(copy)
    return copy, result


def lost(dense, small):
    feeds = {"x": np.random.default_rng(2).normal(size=(16, 3, 8, 8)).astype(np.float32)}
    one, other = (Session(m).run(feeds)["y"] for m in (dense, small))
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


def operators(model):
    return [node.op_type for node in model.graph if node.op_type in {"Reshape", "Transpose", "Gather"}]


def widths(model):
    values = model.graph.initializers
    return tuple(values[name].const_value.shape[0] for name in ("wl", "wr"))


def test_groups_that_lose_alike_stay_reshapes():
    dense = shuffled(4, 4)
    small, result = pruned(dense, macs=0.5)
    assert operators(small) == ["Reshape", "Transpose", "Reshape"]
    assert widths(small) == (4, 4)
    assert lost(dense, small) < 1e-4
    assert [row["form"] for row in result.details["shuffles"]] == ["Reshape, Transpose, Reshape"]
    assert any(note.startswith("1 channel shuffles stay reshapes") for note in result.notes)


def test_a_group_that_loses_more_makes_it_a_gather():
    dense = shuffled(4, 0)
    small, result = pruned(dense, macs=0.75)
    assert operators(small) == ["Gather"]
    assert widths(small) == (4, 8)
    assert lost(dense, small) < 1e-4
    (index,) = (node.inputs[1].const_value.numpy() for node in small.graph if node.op_type == "Gather")
    assert sorted(index) == list(range(12))
    (row,) = result.details["shuffles"]
    assert row["form"] == "Gather"
    assert "one group" in row["why"]


def test_what_reshapes_can_never_meet_becomes_a_gather():
    # every channel of the right convolution is excluded: through reshapes that excludes the left one as well
    small, result = pruned(shuffled(4, 0), macs=0.75, exclude=("wr",))
    assert operators(small) == ["Gather"]
    assert any("with reshapes alone out of reach" in note for note in result.notes)


@pytest.mark.parametrize("score", ["l2", "lamp", "flap", "random"])
def test_every_score_has_a_yardstick(score):
    dense = shuffled(4, 0)
    small, result = pruned(dense, macs=0.7, score=score)
    assert model_stats(small).macs <= 0.7 * model_stats(dense).macs
    assert len(result.details["shuffles"]) == 1
    assert len(operators(small)) in {1, 3}


def test_without_data_too():
    dense = shuffled(4, 0)
    small, _ = pruned(dense, with_data=False, macs=0.7)
    assert model_stats(small).macs <= 0.7 * model_stats(dense).macs
