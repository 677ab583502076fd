"""Scores by weights and activations: what they rank first, by the formulas."""

import numpy as np
import pytest
from redundant_net import images, redundant
from text_graph import graph

from graphopt.analysis.units import analyse
from graphopt.pruning.families import candidates
from graphopt.pruning.scores import at_random, by_fluctuation, by_value, by_weight
from graphopt.rewriting.layers import layers_of


class Net:
    """A network, what it consists of, and its inner family."""

    def __init__(self, model):
        self.model, self.coupling, self.layers = model, analyse(model), layers_of(model)[0]
        self.families = candidates(self.coupling, self.layers, (), refitted=True)[0]
        self.weights = {n: v.const_value.numpy().astype(float) for n, v in model.graph.initializers.items()}

    def order(self, ranked, family):
        """Places in the axis, in the order in which they would go."""
        at = self.families.index(family)
        return [family.units.index(u) for u in ranked[at].units]


@pytest.fixture(scope="module")
def net():
    return Net(redundant())


@pytest.fixture(scope="module")
def hidden(net):
    return next(f for f in net.families if len(f.units) == 12)


@pytest.mark.parametrize("score", ["l2", "l1", "lamp"])
def test_weights_rank_by_size(net, hidden, score):
    size = np.abs if score == "l1" else np.square
    w = net.weights
    power = size(w["w1"]).sum((1, 2, 3)) + size(w["b1"]) + size(w["w2"]).sum((0, 2, 3))
    ranked = by_weight(net.coupling, net.families, score)
    found = ranked[net.families.index(hidden)]
    ordered = power[net.order(ranked, hidden)]
    assert (np.diff(ordered) >= -1e-9).all()
    lamp = ordered / np.cumsum(ordered[::-1])[::-1]
    assert np.allclose(np.diff(found.harm), lamp if score == "lamp" else ordered / ordered.sum())


def test_filters_near_the_median_go_first(net, hidden):
    w = net.weights
    filters = np.concatenate([w["w1"].reshape(12, -1), w["b1"][:, None]], axis=1)
    apart = np.linalg.norm(filters[:, None] - filters[None], axis=2).sum(1)
    order = net.order(by_weight(net.coupling, net.families, "fpgm"), hidden)
    assert (np.diff(apart[order]) >= -1e-9).all()


def test_fluctuation_is_the_power_that_varies():
    """A channel that is large and constant is worth nothing: its mean goes into a bias."""
    rng = np.random.default_rng(4)
    w0 = rng.normal(size=(6, 3, 1, 1)).astype(np.float32)
    w0[2] *= 1e-3
    b0 = np.array([0, 0, 50, 0, 0, 0], np.float32)
    model = graph(
        "(float[n, 3, 8, 8] x) => (float[n, 4, h, w] y)", "a = Conv (x, w0, b0)  s = Relu (a)  y = Conv (s, w1)",
        w0=w0, b0=b0, w1=(4, 6, 1, 1),
    )  # fmt: skip
    net = Net(model)
    ranked = by_fluctuation(
        model, net.coupling, net.layers, net.families, images(model), samples=None, threads=1
    )  # fmt: skip
    (family,) = net.families
    assert net.order(ranked, family)[0] == 2
    assert net.order(by_weight(net.coupling, net.families), family)[-1] == 2
    x = next(iter(images(model).batches(batch_size=256)))["x"]
    hidden = np.maximum(np.einsum("oc,nchw->nohw", w0[:, :, 0, 0], x) + b0[:, None, None], 0)
    share = hidden.var((0, 2, 3)) * (net.weights["w1"][:, :, 0, 0] ** 2).sum(0)
    assert np.allclose(np.diff(ranked[0].harm), np.sort(share) / share.sum(), rtol=1e-3)


def test_values_are_taken_as_they_are(net, hidden):
    values = {u: float(u % 5) for f in net.families for u in f.units}
    ranked = by_value(net.families, values)
    found = ranked[net.families.index(hidden)]
    assert [values[u] for u in found.units] == sorted(values[u] for u in hidden.units)
    assert found.harm[-1] == pytest.approx(sum(values[u] for u in hidden.units))


def test_random_depends_on_the_seed_alone(net):
    one, same, other = (at_random(net.families, seed) for seed in (1, 1, 2))
    assert [f.units for f in one] == [f.units for f in same]
    assert [f.units for f in one] != [f.units for f in other]
