"""Heads are found however attention is written, and turning them changes nothing but the order of what matters."""

import attention_graphs as zoo
import numpy as np
import pytest

from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone
from graphopt.pruning.heads import find_heads
from graphopt.pruning.turning import turn_heads
from graphopt.rewriting.layers import layers_of


def heads_of(model):
    feeds = next(iter(zoo.tokens(model).batches(batch_size=1, limit=1)))
    return find_heads(model, layers_of(model)[0], feeds)


def channels(parts):
    return [(p.layer, p.side, p.channels) for p in parts]


def test_separate_layers():
    scores, values = (
        [h for h in heads_of(zoo.separate()) if h.scores is wanted] for wanted in (True, False)
    )  # fmt: skip
    second = tuple(range(6, 12))
    assert channels(scores[1].parts) == [("q0", "rows", second), ("k0", "rows", second)]
    assert channels(values[1].parts) == [("v0", "rows", second), ("y0", "columns", second)]
    assert all(h.centred for h in (*scores, *values))
    assert len(scores) == len(values) == zoo.HEADS


def test_one_layer_for_all():
    first = next(h for h in heads_of(zoo.fused()) if h.scores)
    assert channels(first.parts) == [("h0", "rows", tuple(range(6))), ("h0", "rows", tuple(range(12, 18)))]


def test_shared_values_have_a_copy_for_every_reader():
    values = [h for h in heads_of(zoo.grouped()) if not h.scores]
    assert channels(values[1].left) == [("v", "rows", (3, 4, 5))]
    assert channels(values[1].right) == [("y", "columns", (6, 7, 8)), ("y", "columns", (9, 10, 11))]


def test_a_table_between_leaves_no_freedom():
    assert not [h for h in heads_of(zoo.separate(rotary=True)) if h.scores]
    assert [h for h in heads_of(zoo.separate(rotary=True)) if not h.scores]


def test_what_is_an_output_keeps_its_basis():
    assert not [h for h in heads_of(zoo.separate(cache=True)) if h.scores]


@pytest.mark.parametrize("make", [zoo.separate, zoo.fused, zoo.grouped])
def test_turning_is_exact_and_is_taken_back(make):
    model = make()
    x = np.random.default_rng(0).normal(size=(3, 5, 12)).astype(np.float32)
    dense = Session(model).run({"x": x})["y"]
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    turned, notes = turn_heads(model, layers_of(model)[0], zoo.tokens(model), samples=None, threads=1)
    assert "heads turned" in notes[0]
    assert not np.allclose(model.graph.initializers["wo"].const_value.numpy(), before["wo"])
    np.testing.assert_allclose(Session(model).run({"x": x})["y"], dense, atol=1e-4)
    turned.restore(layers_of(model)[0], ())
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def shortened(model, kept):
    """Drop the last components of every head's queries and keys."""
    for name in ("wq", "bq", "wk", "bk"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        for head in range(zoo.HEADS):
            array[..., head * zoo.DIM + kept : (head + 1) * zoo.DIM] = 0
        value.const_value = type(value.const_value)(array, name=name)
    return model


def test_turned_heads_lose_least_when_shortened():
    model = zoo.separate()
    calibration = zoo.tokens(model)
    turned = private_clone(model)
    turn_heads(turned, layers_of(turned)[0], calibration, samples=None, threads=1)
    feeds = next(iter(calibration.batches(batch_size=64)))

    def scores(m):
        found = Session(m, outputs=["scores"]).run(feeds)["scores"].astype(np.float64)
        return found - found.mean(axis=-1, keepdims=True)

    dense = scores(model)
    for kept in (1, 3, 5):
        plain, ours = (np.linalg.norm(scores(shortened(private_clone(m), kept)) - dense) for m in (model, turned))
        assert ours < 0.6 * plain
