"""Options of prune that are about refitting."""

import attention_graphs as attention
import numpy as np
import pytest
from redundant_net import images
from text_graph import graph

from graphopt.base import Context
from graphopt.executor import Session
from graphopt.passes.prune import Prune
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.target import Target


def pruned(model, calibration, **options):
    small = private_clone(model)
    context = Context(Target("test", "ort", channel_multiple=1), calibration, None, 0, 1, Silent())
    result = Prune(**options).run(small, context)
    return small, result


def difference(model, small, feeds):
    one, two = (Session(m).run(feeds)["y"] for m in (model, small))
    return float(np.linalg.norm(one - two) / np.linalg.norm(one))


def two_layers():
    return graph(
        "(float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y)",
        "a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)  r = Relu (a)  y = Conv <pads = [1, 1, 1, 1]> (r, w2, b2)",
        seed=3, w1=(10, 3, 3, 3), b1=(10,), w2=(4, 10, 3, 3), b2=(4,),
    )  # fmt: skip


def test_blocks_can_be_refined_and_swept():
    model = two_layers()
    x = {"x": np.random.default_rng(9).normal(size=(64, 3, 6, 6)).astype(np.float32)}
    calibration = images(model, shape=(3, 6, 6))
    plain, _ = pruned(model, calibration, units=0.5)
    refined, result = pruned(model, calibration, units=0.5, refine="blockwise", sweeps=2)
    assert any("1 blocks of two layers refined" in note for note in result.notes)
    assert difference(model, refined, x) < 0.95 * difference(model, plain, x)


@pytest.mark.parametrize("make", [attention.separate, attention.fused])
def test_heads_are_turned_before_they_are_cut(make):
    model = make()
    calibration = attention.tokens(model)
    feeds = next(iter(calibration.batches(batch_size=64)))
    small, result = pruned(model, calibration, params=0.8)
    assert any("heads turned" in note for note in result.notes)
    assert difference(model, small, feeds) < 0.5
