"""Networks of the zoo pruned to a budget: what the pass decides, beyond what the analysis finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zoo.export import exported

import graphopt
from graphopt.analysis.cost import model_stats
from graphopt.executor import Session
from zoo import ZOO


@pytest.mark.parametrize(("name", "gathers"), [("shufflenet_v1", 2), ("shufflenet_v2", 3)])
def test_shuffles_take_the_form_of_least_harm(name: str, gathers: int, folder: Path) -> None:
    model = graphopt.load(exported(ZOO[name], "dynamo", folder))
    samples = [ZOO[name].feeds(seed) for seed in range(64)]
    data = {key: np.concatenate([feeds[key] for feeds in samples]) for key in samples[0]}
    found = graphopt.optimize(model, "prune{macs=0.6,multiple=1}", calib=data, bench=False)
    assert model_stats(found.model).macs <= 0.6 * model_stats(model).macs
    rows = found.report.passes[0].details["shuffles"]
    assert sum(row["form"] == "Gather" for row in rows) == gathers
    feeds = ZOO[name].feeds(999)
    one, other = (next(iter(Session(m).run(feeds).values())) for m in (model, found.model))
    assert float(np.linalg.norm(one - other) / np.linalg.norm(one)) < 0.25
