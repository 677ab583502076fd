"""Refits of every kind of reader: several of one tensor, grouped and depthwise ones, heads, embeddings and streams."""

import attention_graphs as attention
import numpy as np
import pytest
from text_graph import graph

from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import analyse
from graphopt.calibration import load
from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.pruning.families import candidates
from graphopt.pruning.importance import Setting, by_reconstruction, silence
from graphopt.pruning.reconstruct import Plan, reconstruct
from graphopt.rewriting.layers import layers_of

RANDOM = np.random.default_rng(11)
IMAGES = {"x": (RANDOM.normal(size=(96, 4, 6, 6)) @ RANDOM.normal(size=(6, 6))).astype(np.float32)}
WORDS = {"ids": RANDOM.integers(0, 20, size=(96, 5))}


def two_readers():
    return graph(
        "(float[n, 4, 6, 6] x) => (float[n, 3, 6, 6] y, float[n, 5, 6, 6] z)",
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
        r = Relu (a)
        y = Conv <pads = [1, 1, 1, 1]> (r, wy, by)
        z = Conv (r, wz, bz)
        """,
        w=(12, 4, 3, 3), b=(12,), wy=(3, 12, 3, 3), by=(3,), wz=(5, 12, 1, 1), bz=(5,),
    )  # fmt: skip


def grouped():
    return graph(
        "(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)",
        "a = Conv (x, w, b)  r = Relu (a)  y = Conv <group = 2, pads = [1, 1, 1, 1]> (r, wy, by)",
        w=(16, 4, 1, 1), b=(16,), wy=(4, 8, 3, 3), by=(4,),
    )  # fmt: skip


def depthwise():
    return graph(
        "(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)",
        """
        a = Conv (x, w, b)
        r = Clip (a, low, high)
        d = Conv <group = 16, pads = [1, 1, 1, 1]> (r, wd, bd)
        s = Clip (d, low, high)
        y = Conv (s, wy, by)
        """,
        w=(16, 4, 1, 1), b=(16,), wd=(16, 1, 3, 3), bd=(16,), wy=(4, 16, 1, 1), by=(4,),
        low=np.float32(0), high=np.float32(6),
    )  # fmt: skip


def embedded():
    """A stream that an embedding and a layer write, and two layers behind RMS norms read."""
    norm = """
        {o}1 = Mul ({i}, {i})
        {o}2 = ReduceMean <axes = [-1]> ({o}1)
        {o}3 = Sqrt ({o}2)
        {o}4 = Div ({i}, {o}3)
        {o} = Mul ({o}4, {g})
    """
    return graph(
        "(int64[n, 5] ids) => (float[n, 5, 6] y)",
        f"""
        e = Gather (table, ids)
        {norm.format(i="e", o="f", g="g1")}
        h = MatMul (f, w1)
        r = Relu (h)
        o = MatMul (r, w2)
        s = Add (e, o)
        {norm.format(i="s", o="t", g="g2")}
        y = MatMul (t, w3)
        """,
        table=(20, 12), w1=(12, 16), w2=(16, 12), w3=(12, 6), g1=(12,), g2=(12,),
    )  # fmt: skip


def tokens():
    return {"x": np.concatenate([f["x"] for f in attention.tokens(attention.separate()).batches()])}


NETWORKS = {
    "two readers": (two_readers, IMAGES),
    "grouped": (grouped, IMAGES),
    "depthwise": (depthwise, IMAGES),
    "heads": (attention.separate, tokens()),
    "grouped queries": (attention.grouped, tokens()),
    "embedding and stream": (embedded, WORDS),
}


def errors(make, data, mode, share=3):
    """Relative error per output once a part of every family is gone, least harmful first."""
    model = make()
    calibration = load(data, model)
    coupling = analyse(model)
    layers, _ = layers_of(model)
    families, _ = candidates(coupling, layers, (), refitted=True)
    setting = Setting(model, coupling, layers, calibration, None, 1, Silent())
    ranked, _ = by_reconstruction(setting, families)
    assert families
    removed = [f.units[: len(f.units) // share] for f in ranked]
    assert any(removed)
    small = private_clone(model)
    dead = {u for units in removed for u in units}
    if mode == "ls":
        silence(small, coupling, {u for f, units in zip(families, removed, strict=True) if f.others for u in units})
        plan = Plan(
            dense=model, model=small, coupling=coupling, families=families, removed=removed, calibration=calibration,
            mode="ls", samples=None, threads=1, progress=Silent(),
        )  # fmt: skip
        dead = reconstruct(plan).dead
    remove_units(small, coupling, dead)
    one, two = (Session(m).run(next(iter(calibration.batches(batch_size=96)))) for m in (model, small))
    return np.array([np.linalg.norm(one[k] - two[k]) / np.linalg.norm(one[k] - one[k].mean()) for k in one])


@pytest.mark.parametrize("name", NETWORKS)
def test_refitting_every_reader_beats_cutting(name):
    cut, refitted = (errors(*NETWORKS[name], mode) for mode in ("none", "ls"))
    assert (refitted < 0.9 * cut).all(), (refitted, cut)
