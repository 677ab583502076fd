"""Terms of time for the solver, and how a budget is settled by measurement; with invented tables, nothing is timed."""

import json

import numpy as np
import pytest
from redundant_net import redundant

from graphopt.analysis.units import analyse
from graphopt.errors import DataError, UsageError
from graphopt.latency import budget as module
from graphopt.latency.budget import LatencyBudget
from graphopt.latency.passing import passing
from graphopt.latency.shapes import sites
from graphopt.latency.table import LatencyTable
from graphopt.latency.terms import latency_terms, points_of
from graphopt.progress import Silent
from graphopt.pruning.work import full_counts, sized
from graphopt.target import Target

X = {"x": np.zeros((1, 3, 8, 8), np.float32)}
TARGET = Target("test", "ort", channel_multiple=1)


def stair_table(model, block=4, integer=False):
    """Every layer takes the product of its widths, each rounded up to a block."""
    table = LatencyTable({}, 1.0)
    found = list(sites(sized(model, X), analyse(model), integer=integer))
    points = points_of(found, 1)
    table.add({(s, w): float(np.prod([-(-n // block) * block for n in w])) for s, w in points})
    return table, found


def test_terms_add_up_to_the_whole_and_follow_the_stairs():
    table, found = stair_table(redundant())
    terms = latency_terms(table, found, 1000.0, [])
    assert sum(t.work(full_counts(t)) for t in terms) == pytest.approx(1000.0)
    hidden = next(t for t in terms if t.nodes == {"b"})  # 8 -> 12
    assert hidden.work([8, 12]) == 96
    assert hidden.work([8, 9]) == 96  # the same tread
    assert hidden.work([8, 8]) == hidden.work([5, 5]) == 64
    # where the layers take more than the whole, all are scaled, and nothing is left over
    less = latency_terms(table, found, 100.0, [])
    assert sum(t.work(full_counts(t)) for t in less) == pytest.approx(100.0)
    assert less[-1].work([]) == 0


def test_what_layers_leave_is_dealt_out_to_what_lies_between_them():
    table, found = stair_table(redundant())
    model = sized(redundant(), X)
    others = passing(model, analyse(model), {site.key for site in found})
    assert all(not o.nodes & {site.key for site in found} for o in others)
    terms = latency_terms(table, found, 1000.0, others)
    assert sum(t.work(full_counts(t)) for t in terms) == pytest.approx(1000.0)
    relu = next(t for t in terms if t.nodes == {"c"})
    full = full_counts(relu)
    assert len(full) == 1  # its channels can go, its positions stay
    assert relu.work([full[0] // 2]) == pytest.approx(relu.work(full) / 2)


def of(model, path, **options):
    given = {"integer": False, "multiple": 1, "table": str(path), "progress": Silent(), **options}
    return LatencyBudget.of(model, analyse(model), X, TARGET, **given)


def test_a_table_from_elsewhere_is_enough(tmp_path):
    model, path = redundant(), tmp_path / "device.json"
    table, _ = stair_table(model)
    table.save(path)
    budget = of(model, path)
    assert (budget.measured, budget.source) == (0, path)
    assert budget.keep(0.5) == pytest.approx(0.5)
    assert budget.ratio(model) is None  # the device is not here
    del table.entries[next(iter(table.entries))]
    path.write_text(json.dumps(table.to_dict()))
    with pytest.raises(UsageError, match=r"lacks \d+ of \d+ entries.*--table"):
        of(model, path)
    path.write_text("nonsense")
    with pytest.raises(DataError):
        of(model, path)


def test_int8_is_compared_with_the_float_model(tmp_path):
    model, path = redundant(), tmp_path / "device.json"
    table, _ = stair_table(model)
    table.save(path)
    fast, _ = stair_table(model, integer=True)
    fast.entries = {shape: {w: t / 4 for w, t in times.items()} for shape, times in fast.entries.items()}
    fast.save(path)
    budget = of(model, path, integer=True)
    assert budget.after == pytest.approx(budget.before / 4)
    assert budget.keep(0.2) == pytest.approx(0.8)
    assert budget.keep(0.25) == pytest.approx(1.0)


@pytest.fixture
def measuring(monkeypatch):
    """A budget whose candidates are numbers: the time that the table foresees, off by a factor."""

    def make(factor):
        budget = LatencyBudget([], 1.0, 1.0, 0, None, None, X, TARGET, False, True)
        monkeypatch.setattr(module.LatencyBudget, "ratio", lambda self, candidate: factor * candidate)
        return budget

    return make


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_what_the_table_did_not_foresee_is_corrected(measuring, factor):
    settled = measuring(factor).settle(0.7, lambda keep: keep, lambda choice: choice)
    assert 0.7 * 0.97 <= settled.ratio <= 0.7 * 1.01
    assert settled.choice == pytest.approx(0.7 / factor, rel=0.04)


def test_of_choices_on_stairs_the_slowest_within_the_budget_stands(measuring):
    tried = []

    def stairs(keep):
        tried.append(keep)
        return np.floor(keep * 5) / 5

    settled = measuring(1.1).settle(0.7, stairs, lambda choice: choice)
    assert settled.ratio == pytest.approx(0.66)
    assert len(tried) <= module.ROUNDS


def test_a_budget_out_of_reach_gives_the_fastest(measuring):
    settled = measuring(1.0).settle(0.3, lambda keep: max(keep, 0.5), lambda choice: choice)
    assert settled.ratio == pytest.approx(0.5)


def test_choices_that_save_more_than_foreseen_are_taken_back_as_far_as_possible(measuring):
    settled = measuring(1.0).settle(0.75, lambda keep: keep**2, lambda choice: choice)
    assert 0.75 * 0.97 <= settled.ratio <= 0.75 * 1.01
    # between two choices that lie on either side there is none
    jump = measuring(1.0).settle(0.75, lambda keep: keep if keep > 0.8 else keep / 2, lambda choice: choice)
    assert jump.ratio < 0.45
