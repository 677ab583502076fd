"""Distillation: what was lost comes back, nothing gets worse on held-out data, equal seeds give equal weights."""

from __future__ import annotations

import numpy as np
import pytest
from redundant_net import images, redundant
from text_graph import graph

from graphopt.calibration import load
from graphopt.errors import DataError, ModelError, UsageError
from graphopt.executor import Session

pytest.importorskip("torch")
from graphopt.fx.distil import Hidden, distil

RNG = np.random.default_rng(0)


def disturbed(model, amount=0.1):
    copy = model.clone()
    for value in copy.graph.initializers.values():
        array = value.const_value.numpy()
        noise = RNG.normal(size=array.shape).astype(array.dtype) * amount * array.std()
        value.const_value = type(value.const_value)(array + noise, name=value.name)
    return copy


def gap(one, other):
    feeds = {"x": np.random.default_rng(5).normal(size=(32, 3, 8, 8)).astype(np.float32)}
    a, b = Session(one).run(feeds)["y"], Session(other).run(feeds)["y"]
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_what_was_lost_comes_back():
    dense = redundant()
    small = disturbed(dense)
    names, before = list(small.graph.initializers), gap(dense, small)
    found = distil(dense, small, images(dense), steps=60, rate=3e-3, batch=16)
    assert found.after < 0.3 * found.before
    assert gap(dense, small) < 0.6 * before
    assert list(small.graph.initializers) == names


def test_hidden_tensors_are_matched_where_they_are_left():
    dense = graph(
        "(float[n, 4] x) => (float[n, 1] y)", "h = MatMul (x, w)  y = MatMul (h, v)", w=(4, 6), v=np.zeros((6, 1), "f4")
    )
    small = graph(
        "(float[n, 4] x) => (float[n, 1] y)", "h = MatMul (x, w)  y = MatMul (h, v)", w=(4, 2), v=np.zeros((2, 1), "f4")
    )
    kept = np.array([1, 4])
    data = load({"x": RNG.normal(size=(256, 4)).astype(np.float32)}, dense)
    distil(dense, small, data, steps=400, rate=0.05, batch=64, hidden=[Hidden("h", {1: kept})])
    np.testing.assert_allclose(
        small.graph.initializers["w"].const_value.numpy(),
        dense.graph.initializers["w"].const_value.numpy()[:, kept],
        atol=0.02,
    )


def test_a_step_too_far_is_not_kept():
    dense = redundant()
    small = disturbed(dense, 0.01)
    weights = {n: v.const_value.numpy().copy() for n, v in small.graph.initializers.items()}
    found = distil(dense, small, images(dense), steps=5, rate=10.0, batch=16)
    assert found.best == 0
    assert found.after == found.before
    for name, value in small.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), weights[name])


def test_equal_seeds_give_equal_weights():
    dense = redundant()
    start, results = disturbed(dense), []
    for seed in (1, 1, 2):
        small = start.clone()
        distil(dense, small, images(dense), steps=4, batch=16, seed=seed)
        results.append(small.graph.initializers["w1"].const_value.numpy())
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_time_ends_it():
    dense = redundant()
    found = distil(dense, disturbed(dense), images(dense), steps=10**6, seconds=1e-9)
    assert found.steps <= 1


def test_calls_of_different_shapes_are_taken_as_they_come():
    dense = graph("(float[n, t, 4] x) => (float[n, t, 2] y)", "y = MatMul (x, w)", w=(4, 2))
    calls = [{"x": RNG.normal(size=(2, t, 4)).astype(np.float32)} for t in (3, 5, 4, 6)]
    small = disturbed(dense, 0.5)
    found = distil(dense, small, load(calls, dense), steps=30, rate=0.05)
    assert found.after < 0.5 * found.before


def test_refusals():
    dense = redundant()
    with pytest.raises(DataError, match="too few"):
        distil(dense, dense.clone(), images(dense, 4), steps=1)
    fixed = graph("(float[n, 4] x) => (float[n, 4] y)", "y = Relu (x)")
    with pytest.raises(ModelError, match="no float parameters"):
        distil(fixed, fixed.clone(), load({"x": np.ones((16, 4), np.float32)}, fixed), steps=1)


def prune(model, calibration, **options):
    from graphopt.base import Context
    from graphopt.passes.prune import Prune
    from graphopt.progress import Silent
    from graphopt.target import Target

    copy = model.clone()
    result = Prune(**options).run(copy, Context(Target("test", "ort"), calibration, None, 0, 1, Silent()))
    return copy, result


def test_prune_distils_where_it_is_asked_to():
    """Redundant channels cut without a refit: matching the dense model gains on unseen data."""
    dense = redundant()
    options = {"macs": 0.2, "score": "random", "reconstruct": "none"}
    bare, _ = prune(dense, images(dense, 256), **options)
    small, result = prune(dense, images(dense, 256), distil=200, **options)
    assert any(n.startswith("distilled in ") and "1 residual sums" in n for n in result.notes)
    assert gap(dense, small) < 0.95 * gap(dense, bare)
    assert set(small.graph.initializers) >= set(bare.graph.initializers)


def test_prune_refuses_to_distil_without_data_or_with_operators_it_cannot_train():
    with pytest.raises(UsageError, match="distil= needs calibration data"):
        prune(redundant(), None, macs=0.5, distil=10)
    odd = graph(
        "(float[n, 4] x) => (float[n, 4] y)", "a = MatMul (x, w)  y = com.example.Odd (a)", w=(4, 4),
        imports='"com.example" : 1',
    )  # fmt: skip
    data = load({"x": np.ones((16, 4), np.float32)}, redundant_like(odd))
    with pytest.raises(ModelError, match="1 nodes cannot be trained: y"):
        prune(odd, data, params=0.5, distil=10)


def redundant_like(model):
    """A model with the same inputs that the runtime can run."""
    return graph("(float[n, 4] x) => (float[n, 4] y)", "y = Relu (x)")
