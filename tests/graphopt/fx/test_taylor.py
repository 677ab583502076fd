"""The estimate against what removing a unit really does to the outputs."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph

from graphopt.analysis.certificate import zero_units
from graphopt.analysis.units import analyse
from graphopt.calibration import load
from graphopt.executor import Session

pytest.importorskip("torch")
from graphopt.fx.taylor import taylor_scores

RNG = np.random.default_rng(0)
SIZES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (6, 8, 1, 1), "b1": (6,), "w2": (8, 6, 1, 1)}
BODY = (
    "a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)  r = Relu (a)  c = Conv (r, w1, b1)  s = Relu (c)  d = Conv (s, w2)  "
    "j = Add (r, d)  p = GlobalAveragePool (j)  f = Flatten (p)  "
)


def model(end: str):
    # weak units, so that one of them alone is a small step
    scale = np.linspace(0.02, 0.4, 8, dtype=np.float32)
    w0 = RNG.normal(size=SIZES["w0"]).astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    sizes = {**SIZES, "w0": w0, "v": RNG.normal(size=(8, 5)).astype(np.float32) * 0.1}
    return graph("(float[n, 3, 6, 6] x) => (float[n, 5] y)", BODY + end, **sizes)


def softmax_kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(1).mean()


@pytest.mark.parametrize(
    ("end", "divergence"),
    [
        ("y = MatMul (f, v)", lambda y, z: 0.5 * np.square(y - z).sum(1).mean() / y.var()),
        ("l = MatMul (f, v)  y = Softmax <axis = -1> (l)", softmax_kl),
        ("l = MatMul (f, v)  y = LogSoftmax <axis = -1> (l)", lambda y, z: softmax_kl(np.exp(y), np.exp(z))),
        (
            "l = MatMul (f, v)  y = Sigmoid (l)",
            lambda y, z: (y * np.log(y / z) + (1 - y) * np.log((1 - y) / (1 - z))).sum(1).mean(),
        ),
    ],
    ids=["values", "softmax", "log_softmax", "sigmoid"],
)
def test_scores_predict_the_divergence_of_each_unit_alone(end, divergence):
    dense = model(end)
    coupling = analyse(dense)
    x = RNG.normal(size=(512, 3, 6, 6)).astype(np.float32)
    scores = taylor_scores(dense, coupling, load({"x": x}, dense), centred=False)
    y = Session(dense).run({"x": x})["y"].astype(np.float64)
    truth = []
    for unit in coupling.units:
        cut = dense.clone()
        zero_units(cut, coupling, {unit.id})
        truth.append(divergence(y, Session(cut).run({"x": x})["y"].astype(np.float64)))
    found = scores[1:]
    assert scores[0] == 0
    assert len(found) == len(truth) == 14
    assert np.corrcoef(np.log(found + 1e-9), np.log(np.array(truth) + 1e-9))[0, 1] > 0.9
    assert 0.4 < np.median(found / truth) < 2.5


def test_a_constant_unit_harms_nothing_once_its_mean_stays():
    dense = model("y = MatMul (f, v)")
    weights = np.array(dense.graph.initializers["w1"].const_value.numpy())
    weights[3] = 0  # the bias alone is left: 1 at every position
    bias = np.array(dense.graph.initializers["b1"].const_value.numpy())
    bias[3] = 1
    for name, array in (("w1", weights), ("b1", bias)):
        value = dense.graph.initializers[name]
        value.const_value = type(value.const_value)(array, name=name)
    coupling = analyse(dense)
    data = load({"x": RNG.normal(size=(64, 3, 6, 6)).astype(np.float32)}, dense)
    unit = next(
        u.id for u in coupling.units if any(m.parameter == "w1" and m.axis == 0 and 3 in m.indices for m in u.members)
    )
    centred, zeroed = (taylor_scores(dense, coupling, data, centred=c)[unit] for c in (True, False))
    assert centred < 1e-9 < zeroed


def test_equal_seeds_give_equal_scores():
    dense = model("y = MatMul (f, v)")
    coupling = analyse(dense)
    data = load({"x": RNG.normal(size=(32, 3, 6, 6)).astype(np.float32)}, dense)
    one, same, other = (taylor_scores(dense, coupling, data, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_prune_ranks_by_it():
    """Of a network whose channels matter unequally, those go that the outputs depend on least."""
    from graphopt.base import Context
    from graphopt.passes.prune import Prune
    from graphopt.progress import Silent
    from graphopt.target import Target

    dense = model("y = MatMul (f, v)")
    x = RNG.normal(size=(64, 3, 6, 6)).astype(np.float32)
    data = load({"x": x}, dense)
    y = Session(dense).run({"x": x})["y"]
    gaps = {}
    for score in ("taylor", "random"):
        small = dense.clone()
        context = Context(Target("test", "ort"), data, None, 0, 1, Silent())
        Prune(params=0.7, score=score, reconstruct="none").run(small, context)
        gaps[score] = float(np.linalg.norm(Session(small).run({"x": x})["y"] - y) / np.linalg.norm(y))
    assert gaps["taylor"] < 0.6 * gaps["random"]
