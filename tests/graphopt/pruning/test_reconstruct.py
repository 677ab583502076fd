"""Refitting layers front to back: targets, and errors that fall."""

import numpy as np
import pytest
from redundant_net import images, redundant

from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import analyse
from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.pruning.families import candidates
from graphopt.pruning.reconstruct import Plan, reconstruct
from graphopt.pruning.targets import Target, target_of
from graphopt.rewriting.layers import layers_of

X = np.random.default_rng(5).normal(size=(32, 3, 8, 8)).astype(np.float32)


def test_targets_follow_the_sum_and_see_the_relu():
    layers, _ = layers_of(redundant())
    assert target_of(layers["b"], set()) == Target("b", relu=True)
    assert target_of(layers["d"], set()) == Target("e", relu=True)
    assert target_of(layers["y"], set()) == Target("y", relu=False)


def test_a_sum_with_an_unfinished_branch_is_no_target():
    layers, _ = layers_of(redundant())
    assert target_of(layers["d"], {layers["a"].linear.node}) == Target("d", relu=False)


def error_after(units_of, mode, reselect=False, samples=None):
    model = redundant()
    coupling = analyse(model)
    families, _ = candidates(coupling, layers_of(model)[0], (), refitted=True)
    removed = [tuple(units_of(f)) for f in families]
    small = private_clone(model)
    if mode == "none":
        dead = {u for units in removed for u in units}
    else:
        plan = Plan(
            dense=model, model=small, coupling=coupling, families=families, removed=removed,
            calibration=images(model), mode=mode, samples=samples, threads=1, progress=Silent(), reselect=reselect,
        )  # fmt: skip
        outcome = reconstruct(plan)
        dead = outcome.dead
        assert len(dead) == sum(len(u) for u in removed)
        assert outcome.refitted == 3
    remove_units(small, coupling, dead)
    a, b = (Session(m).run({"x": X})["y"] for m in (model, small))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def thirds(family):
    return family.units[::3]


def test_the_twins_of_what_goes_take_over():
    assert error_after(lambda f: f.units[: len(f.units) // 2], "ls") < 1e-4


def test_weights_beat_biases_beat_nothing():
    """More than the twins can make up for: pairs go too."""

    def pairs(family):
        half = len(family.units) // 2
        return (*family.units[:half], family.units[half])

    least, mean, none = (error_after(pairs, mode) for mode in ("ls", "mean", "none"))
    assert least < 0.7 * mean < none


def test_choosing_again_avoids_lost_pairs():
    """Inside the block a pair was to go; the layer that reads it finds twins to remove instead."""

    def a_pair_inside(family):
        return (family.units[0], family.units[6]) if len(family.units) == 12 else ()

    model = redundant()
    coupling = analyse(model)
    families, _ = candidates(coupling, layers_of(model)[0], (), refitted=True)
    small = private_clone(model)
    plan = Plan(
        dense=model, model=small, coupling=coupling, families=families, removed=[a_pair_inside(f) for f in families],
        calibration=images(model), mode="ls", samples=None, threads=1, progress=Silent(),
    )  # fmt: skip
    outcome = reconstruct(plan)
    assert len(outcome.dead) == 2
    hidden = next(f for f in families if len(f.units) == 12)
    places = sorted(hidden.units.index(u) for u in outcome.dead)
    assert places[1] - places[0] != 6
    remove_units(small, coupling, outcome.dead)
    a, b = (Session(m).run({"x": X})["y"] for m in (model, small))
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)


@pytest.mark.parametrize("samples", [3, 16])
def test_few_samples_do_no_worse_than_cutting(samples):
    assert error_after(thirds, "ls", samples=samples) <= error_after(thirds, "none")
