"""What ranking by weights, at random and by reconstruction says about a network that holds every channel twice."""

import numpy as np
import pytest
from redundant_net import images, redundant

from graphopt.analysis.units import analyse
from graphopt.executor import Session
from graphopt.progress import Silent
from graphopt.pruning.families import candidates
from graphopt.pruning.importance import Setting, by_reconstruction, silence
from graphopt.rewriting.layers import layers_of


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


def test_silenced_units_are_zero_downstream(setting, families):
    model = setting.model.clone()
    hidden = next(f for f in families if len(f.units) == 12)
    silence(model, setting.coupling, {hidden.units[2]})
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    found = Session(model, outputs=["c"]).run({"x": x})["c"]
    assert not found[:, 2].any()
    assert found[:, 3].any()
