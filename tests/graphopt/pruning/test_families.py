"""Families of interchangeable units and the layers that read them."""

import numpy as np
from redundant_net import redundant
from text_graph import graph

from graphopt.analysis.units import analyse
from graphopt.pruning.families import alive_channels, candidates, columns_of, rows_of
from graphopt.rewriting.layers import layers_of


def setup(exclude=(), refitted=True):
    model = redundant()
    coupling = analyse(model)
    layers, _ = layers_of(model)
    return coupling, layers, *candidates(coupling, layers, exclude, refitted=refitted)


def test_one_family_for_the_stream_and_one_inside_the_block():
    coupling, _, families, notes = setup()
    assert [len(f.units) for f in families] == [8, 12]
    assert [f.layers for f in families] == [("b", "y"), ("d",)] or [f.layers for f in families] == [("b",), ("d",)]
    assert sorted(u for f in families for u in f.units) == [u.id for u in coupling.units]
    assert not notes


def test_exclusion_by_parameter_and_by_node():
    assert [len(f.units) for f in setup(exclude=("w3",))[2]] == [12]
    assert [len(f.units) for f in setup(exclude=("y",))[2]] == [12]
    _, _, families, notes = setup(exclude=("b1", "no such*"))
    assert [len(f.units) for f in families] == [8]
    assert any("12 units excluded" in n for n in notes)
    assert any(n == "warning: exclude=no such* matches nothing" for n in notes)


def test_columns_of_a_unit_are_its_kernel_positions_everywhere():
    coupling, layers, families, _ = setup()
    hidden = next(f for f in families if len(f.units) == 12)
    found = columns_of(coupling, layers["d"], 0, hidden.units)
    np.testing.assert_array_equal(np.concatenate(found), np.arange(12 * 9))
    np.testing.assert_array_equal(np.concatenate(rows_of(coupling, layers["b"], 0, hidden.units)), np.arange(12))


def test_alive_channels():
    coupling, layers, families, _ = setup()
    hidden = next(f for f in families if len(f.units) == 12)
    dead = {hidden.units[3], hidden.units[7]}
    np.testing.assert_array_equal(np.flatnonzero(~alive_channels(coupling, layers["d"], dead, outputs=False)), [3, 7])
    np.testing.assert_array_equal(np.flatnonzero(~alive_channels(coupling, layers["b"], dead, outputs=True)), [3, 7])
    assert alive_channels(coupling, layers["b"], dead, outputs=False).all()


def shuffled():
    """Channels in 3 groups of 4: the weights of `a` are cut by groups and by places within them, on one axis."""
    return graph(
        "(float[n, 4, 6, 6] x) => (float[n, 3, 6, 6] y)",
        """
        a = Conv (x, w, b)
        g = Reshape (a, split)
        t = Transpose <perm = [0, 2, 1, 3, 4]> (g)
        r = Reshape (t, join)
        y = Conv (r, wy, by)
        """,
        w=(12, 4, 1, 1), b=(12,), wy=(3, 12, 1, 1), by=(3,),
        split=np.array([0, 3, 4, 6, 6]), join=np.array([0, 12, 6, 6]),
    )  # fmt: skip


def test_units_of_two_kinds_on_one_axis_are_two_families():
    model = shuffled()
    coupling = analyse(model)
    families, _ = candidates(coupling, layers_of(model)[0], (), refitted=True)
    kinds = [{coupling.units[u - 1].mode for u in f.units} for f in families]
    assert sorted((*kind, len(f.units)) for kind, f in zip(kinds, families, strict=True)) == [
        ("group", 3),
        ("group_channel", 4),
    ]
