"""What ranking by weights, at random and by reconstruction says about a network that holds every channel twice."""

import numpy as np
import pytest
from redundant_net import images, redundant

from graphopt.analysis.units import analyse
from graphopt.executor import Session
from graphopt.progress import Silent
from graphopt.pruning.families import candidates
from graphopt.pruning.importance import Setting, at_random, by_reconstruction, by_weight, silence
from graphopt.pruning.layers import layers_of


@pytest.fixture(scope="module")
def setting():
    model = redundant()
    return Setting(model, analyse(model), layers_of(model)[0], images(model), None, 1, Silent())


@pytest.fixture(scope="module")
def families(setting):
    return candidates(setting.coupling, setting.layers, (), refitted=True)[0]


def test_reconstruction_finds_the_twins(setting, families):
    ranked, notes = by_reconstruction(setting, families)
    assert not notes
    for family, before in zip(ranked, families, strict=True):
        count = len(family.units)
        assert sorted(family.units) == sorted(before.units)
        # half of the units go before any twin pair is lost, and that costs next to nothing
        places = [before.units.index(u) % (count // 2) for u in family.units[: count // 2]]
        assert len(set(places)) == count // 2
        assert family.harm[count // 2] < 1e-2 * family.harm[-1]
        assert (np.diff(family.harm) >= 0).all()


def test_weights_rank_by_size(setting, families):
    weights = {n: v.const_value.numpy().astype(float) for n, v in setting.model.graph.initializers.items()}
    power = (weights["w1"] ** 2).sum((1, 2, 3)) + weights["b1"] ** 2 + (weights["w2"] ** 2).sum((0, 2, 3))
    hidden = next(f for f in families if len(f.units) == 12)
    found = next(f for f in by_weight(setting.coupling, families) if len(f.units) == 12)
    order = [hidden.units.index(u) for u in found.units]
    assert (np.diff(power[order]) >= -1e-9).all()
    assert found.harm[-1] == pytest.approx(1.0)


def test_random_depends_on_the_seed_alone(families):
    one, same, other = (at_random(families, seed) for seed in (1, 1, 2))
    assert [f.units for f in one] == [f.units for f in same]
    assert [f.units for f in one] != [f.units for f in other]


def test_silenced_units_are_zero_downstream(setting, families):
    model = setting.model.clone()
    hidden = next(f for f in families if len(f.units) == 12)
    silence(model, setting.coupling, {hidden.units[2]})
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    found = Session(model, outputs=["c"]).run({"x": x})["c"]
    assert not found[:, 2].any()
    assert found[:, 3].any()
