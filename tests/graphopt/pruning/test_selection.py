"""The budget solver: budgets, multiples, floors, optimality on small cases, determinism."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.pruning.selection import Erasures, Family, choose
from graphopt.pruning.work import Product as Term


def chain(widths, seed=0, coefficients=None):
    """A chain of layers: layer i has width[i-1] x width[i] weights; input and output widths are fixed to 3."""
    rng = np.random.default_rng(seed)
    first, axes = 1, []
    for width in widths:
        axes.append(np.arange(first, first + width))
        first += width
    fixed = np.zeros(3, dtype=np.int64)
    sides = [fixed, *axes, fixed]
    given = coefficients or [1.0] * (len(widths) + 1)
    terms = [Term(c, (a, b)) for c, (a, b) in zip(given, itertools.pairwise(sides), strict=True)]
    families = []
    for number, axis in enumerate(axes):
        order = rng.permutation(axis)
        harm = np.concatenate([[0.0], np.cumsum(np.sort(rng.exponential(size=len(axis)) ** 2))])
        families.append(Family(f"f{number}", tuple(int(u) for u in order), harm))
    return families, terms, axes


def work(terms, dead):
    return sum(t.coefficient * np.prod([np.sum(~np.isin(a, list(dead))) for a in t.axes]) for t in terms)


def harm_of(families, dead):
    return sum(f.harm[sum(u in dead for u in f.units)] for f in families)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 24), min_size=1, max_size=4), st.floats(0.3, 0.95), st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_every_choice_obeys_its_constraints(widths, keep, multiple, floor, seed):
    families, terms, axes = chain(widths, seed)
    choice = choose(families, terms, axes, keep=keep, multiple=multiple, min_keep=floor)
    full = work(terms, set())
    assert choice.kept == pytest.approx(work(terms, choice.dead) / full)
    assert choice.harm == pytest.approx(harm_of(families, choice.dead))
    for family, axis, count in zip(families, axes, choice.removed, strict=True):
        alive = len(axis) - count
        assert alive >= min(floor, len(axis)) >= 1
        assert alive % multiple == 0 or count == 0
        assert set(family.units[:count]) == choice.dead & set(family.units)
    if choice.least:
        # nothing more could go
        for axis, count in zip(axes, choice.removed, strict=True):
            left = [k for k in range(max(floor, 1), len(axis) - count) if k % multiple == 0]
            assert not left
    else:
        assert choice.kept <= keep * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.3, 0.9))
def test_near_the_best_choice_on_small_cases(seed, keep):
    families, terms, axes = chain([5, 6], seed)
    choice = choose(families, terms, axes, keep=keep)
    full = work(terms, set())
    best = np.inf
    for levels in itertools.product(range(5), range(6)):
        dead = {u for f, k in zip(families, levels, strict=True) for u in f.units[:k]}
        if work(terms, dead) <= keep * full:
            best = min(best, harm_of(families, dead))
    if choice.least:
        assert best == np.inf
    else:
        largest = max(float(np.diff(f.harm).max()) for f in families)
        assert choice.harm <= best + largest + 1e-9


def test_prefers_what_harms_less_for_the_same_work():
    families, terms, axes = chain([8, 8])
    cheap = Family("cheap", families[0].units, np.linspace(0, 0.1, 9))
    dear = Family("dear", families[1].units, np.linspace(0, 10, 9))
    choice = choose([cheap, dear], terms, axes, keep=0.6)
    assert choice.removed[0] > 0 == choice.removed[1]


def test_looks_beyond_an_expensive_first_step():
    """The first unit is dear and the rest are free: only a look ahead finds that."""
    families, terms, axes = chain([8, 8])
    hump = Family("hump", families[0].units, np.array([0.0] + [1.0] * 8))
    line = Family("line", families[1].units, np.linspace(0, 8, 9) * 0.5)
    choice = choose([hump, line], terms, axes, keep=0.6)
    assert choice.removed[0] > 1
    assert choice.removed[1] == 0


def test_units_without_a_family_stay():
    families, terms, axes = chain([8, 8])
    choice = choose(families[:1], terms, axes, keep=0.7)
    assert choice.dead <= set(families[0].units)


def test_one_unit_on_several_axes():
    """A residual stream: the same units on two axes of different widths, the wider with units of its own."""
    stream = np.arange(1, 9)
    wide = np.concatenate([np.arange(9, 13), stream, np.arange(13, 17)])
    terms = [Term(1.0, (stream, wide)), Term(2.0, (wide, wide))]
    families = [
        Family("stream", tuple(range(1, 9)), np.linspace(0, 1, 9)),
        Family("own", tuple(range(9, 17)), np.linspace(0, 1, 9)),
    ]
    choice = choose(families, terms, [stream, wide], keep=0.4, multiple=4)
    assert not choice.least
    for axis in (stream, wide):
        assert np.sum(~np.isin(axis, list(choice.dead))) % 4 == 0
    assert choice.kept <= 0.4


def test_factors_of_a_position_count_once():
    """Positions that carry two units die with either of them."""
    heads, dims = np.repeat(np.arange(1, 5), 3), np.tile(np.arange(5, 8), 4)
    terms = [Term(1.0, (np.stack([heads, dims]),))]
    families = [Family("heads", (1, 2, 3, 4), np.linspace(0, 1, 5))]
    choice = choose(families, terms, [np.stack([heads, dims])], keep=0.5)
    assert choice.removed == (2,)
    assert choice.kept == pytest.approx(0.5)


def test_same_input_same_choice():
    one, other = (choose(*chain([24, 16, 12], 3), keep=0.5, multiple=2) for _ in range(2))
    assert one == other


def test_impossible_budget_says_what_is_possible():
    families, terms, axes = chain([4, 4])
    choice = choose(families, terms, axes, keep=0.01, multiple=4)
    assert choice.least == choice.kept == 1.0
    assert not choice.dead


@pytest.mark.parametrize("bad", [{"keep": 0.0}, {"keep": 1.5}, {"keep": 0.5, "multiple": 0}])
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match="must be"):
        choose(*chain([4]), **bad)


def test_a_unit_in_two_families_is_refused():
    families, terms, axes = chain([4])
    with pytest.raises(ValueError, match="two families"):
        choose([families[0], families[0]], terms, axes, keep=0.5)


class Stair:
    """Time in blocks of 4."""

    def __init__(self, axis, node):
        self.axes, self.nodes = (axis,), frozenset({node})

    def work(self, counts):
        return float(-(-counts[0] // 4))


def blocks(count=3, width=8):
    """Independent families of a width, each one layer, whose harm grows with the number of the family."""
    axes = [np.arange(1 + i * width, 1 + (i + 1) * width) for i in range(count)]
    families = [
        Family(f"f{i}", tuple(map(int, axis)), np.linspace(0, 1.0 + i, width + 1)) for i, axis in enumerate(axes)
    ]
    return families, [Stair(axis, f"n{i}") for i, axis in enumerate(axes)], axes


def test_only_whole_treads_of_a_stair_are_spent():
    families, stairs, axes = blocks()
    choice = choose(families, stairs, axes, keep=0.7)
    # 6 treads; two go, of the two families that they harm least: half of each
    assert choice.removed == (4, 4, 0)
    assert choice.kept == pytest.approx(4 / 6)


def test_a_branch_goes_where_that_is_cheaper_than_its_units():
    families, stairs, axes = blocks()
    nodes, homes = (frozenset({"n2"}), frozenset({"n0"})), ((2,), (0,))
    cheap = Erasures(nodes, homes, np.array([0.0, 0.1, 5.0]))
    choice = choose(families, stairs, axes, keep=0.7, erasures=cheap)
    assert (choice.erased, choice.removed, choice.harm) == (1, (0, 0, 0), pytest.approx(0.1))
    assert choice.kept == pytest.approx(4 / 6)
    dear = Erasures(nodes, homes, np.array([0.0, 4.0, 5.0]))
    assert choose(families, stairs, axes, keep=0.7, erasures=dear).erased == 0


def test_units_of_erased_branches_do_not_count():
    families, stairs, axes = blocks(2)
    # cheap at first, so that units of f0 go before its branch does
    families[0] = Family("f0", families[0].units, np.array([0, 0, 0, 0, 0.01, 9, 9, 9, 9.0]))
    erasures = Erasures((frozenset({"n0"}),), ((0,),), np.array([0.0, 0.5]))
    choice = choose(families, stairs, axes, keep=0.5, erasures=erasures)
    assert (choice.erased, choice.removed, choice.dead) == (1, (0, 0), frozenset())
    assert choice.harm == pytest.approx(0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.2, 0.9))
def test_branches_and_units_together_stay_within_the_budget(seed, keep):
    rng = np.random.default_rng(seed)
    families, stairs, axes = blocks(4)
    families = [Family(f.name, f.units, np.append(0, np.cumsum(rng.exponential(size=8)))) for f in families]
    order = rng.permutation(4)
    harm = np.append(0, np.cumsum(rng.exponential(4, size=4)))
    erasures = Erasures(tuple(frozenset({f"n{i}"}) for i in order), tuple((int(i),) for i in order), harm)
    choice = choose(families, stairs, axes, keep=keep, erasures=erasures)
    gone = {int(i) for i in order[: choice.erased]}
    left = sum(0 if i in gone else -(-(8 - k) // 4) for i, k in enumerate(choice.removed)) / 8
    assert choice.kept == pytest.approx(left)
    assert choice.kept <= keep * (1 + 1e-9)
    assert all(choice.removed[i] == 0 for i in gone)
    assert choice.harm == pytest.approx(harm_of(families, choice.dead) + harm[choice.erased])
