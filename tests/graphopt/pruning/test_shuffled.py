"""The form of channel shuffles: reshapes where they cost nothing, a Gather where it saves harm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from text_graph import graph

from graphopt.analysis.units import Coupling, analyse
from graphopt.pruning.scores import weight_share
from graphopt.pruning.shuffled import choose_form, even
from graphopt.rewriting.scopes import graphs
from graphopt.rewriting.shuffles import gather_shuffles, shuffles


def chains(count=1):
    """Halves of four channels from two convolutions, shuffled, read by a convolution; one such block after another."""
    body, sizes, stream = "", {}, "x"
    for k in range(count):
        body += f"""
        l{k} = Conv({stream}, wl{k})  r{k} = Conv({stream}, wr{k})  t{k} = Concat<axis = 1>(l{k}, r{k})
        a{k} = Reshape(t{k}, split)  b{k} = Transpose<perm = [0, 2, 1, 3, 4]>(a{k})  s{k} = Reshape(b{k}, joined)
        y{k} = Conv(s{k}, wo{k})"""
        sizes |= {f"wl{k}": (4, 3, 1, 1), f"wr{k}": (4, 3, 1, 1), f"wo{k}": (3, 8, 1, 1)}
        stream = f"y{k}"
    numbers = {"split": np.array([0, 2, 4, 5, 5]), "joined": np.array([0, 8, 5, 5])}
    return graph(f"(float[N,3,5,5] x) => (float[N,3,5,5] {stream})", body, **sizes, **numbers)


@dataclass
class Trial:
    coupling: Coupling
    dead: frozenset[int]
    harm: float


def names(model):
    return [s.name for g in graphs(model) for s in shuffles(g)]


def cut(model, gathered, plain):
    """An attempt that takes the first channel of some convolutions where there are Gathers."""
    coupling = analyse(model)
    found = {(m.parameter, m.axis, i): u.id for u in coupling.units for m in u.members for i in m.indices}
    left = len(names(model))
    dead = frozenset(found[name, 0, 0] for name in gathered) if left < len(names(DENSE)) else frozenset()
    return Trial(coupling, dead, plain if left == len(names(DENSE)) else 1.0 + 0.1 * left)


DENSE = chains(2)


@pytest.mark.parametrize(
    ("alive", "wanted"),
    [([], True), ([("wl0", 0)], False), ([("wl0", 0), ("wr0", 0)], True), ([("wl0", 0), ("wr0", 1)], False)],
)
def test_survivors_that_reshapes_can_say(alive, wanted):
    model = chains()
    (shuffle,) = [s for g in graphs(model) for s in shuffles(g)]
    copy = chains()
    gather_shuffles(copy)
    coupling = analyse(copy)
    dead = {
        u.id
        for u in coupling.units
        for m in u.members
        for p, i in alive
        if (m.parameter, m.axis) == (p, 0) and i in m.indices
    }
    assert even(shuffle, coupling, dead) is wanted


def test_the_least_harm_wins_with_the_fewest_gathers():
    # all gathered: 1.0; with the second as reshapes 1.1; none 1.2
    chosen = choose_form(chains(2), lambda m: cut(m, ["wl0"], plain=1.2))
    assert names(chosen.trial.coupling.model) == []
    assert [row["form"] for row in chosen.rows] == ["Gather", "Gather"]
    assert "2 of 2 channel shuffles became a Gather" in chosen.note


def test_equal_harm_keeps_the_reshapes():
    chosen = choose_form(chains(2), lambda m: cut(m, ["wl0"], plain=1.005))
    assert len(names(chosen.trial.coupling.model)) == 2
    assert all(row["form"].startswith("Reshape") for row in chosen.rows)


def test_only_where_it_is_needed():
    model = chains(2)

    def attempt(form):
        left = names(form)
        coupling = analyse(form)
        first = {m.parameter: u.id for u in coupling.units for m in u.members if (m.axis, m.indices) == (0, (0,))}
        dead = frozenset({first["wl0"]}) if len(left) < 2 and "wl0" in first else frozenset()
        return Trial(coupling, dead, {0: 1.0, 1: 1.0, 2: math.inf}[len(left)])

    chosen = choose_form(model, attempt)
    assert [row["form"].split(",")[0] for row in chosen.rows] == ["Gather", "Reshape"]
    assert "out of reach" in chosen.note


def test_a_model_without_shuffles_is_tried_once():
    model = graph("(float[N,3] x) => (float[N,2] y)", "y = MatMul(x, w)", w=(3, 2))
    tried = []
    chosen = choose_form(model, lambda m: tried.append(m) or Trial(analyse(m), frozenset(), 0.0))
    assert tried == [model]
    assert not chosen.note
    assert not chosen.rows


def test_weight_share_does_not_depend_on_families():
    model = graph(
        "(float[N,3] x) => (float[N,2] y)",
        "h = MatMul(x, w)  y = MatMul(h, v)",
        w=np.ones((3, 4), np.float32),
        v=(4, 2),
    )
    coupling = analyse(model)
    assert weight_share(coupling, []) == 0
    shares = [weight_share(coupling, [u.id]) for u in coupling.units]
    assert sum(shares) == pytest.approx(weight_share(coupling, [u.id for u in coupling.units])) == pytest.approx(2.0)
    assert min(shares) > 0.25
