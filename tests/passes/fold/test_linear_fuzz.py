"""Every fold of weights into weights on random graphs of linear operators: the same outputs, never larger."""

from __future__ import annotations

from collections import Counter

import pytest
from golden import assert_close, context, random_feeds, run
from hypothesis import given, settings
from hypothesis import strategies as st
from random_linear import linear_graph

from graphopt.registry import pass_class
from graphopt.rewriting.size import size

PASSES = (
    "fold-batchnorm",
    "fold-conv-affine",
    "fold-carried-affine",
    "fold-pad",
    "merge-linear",
    "merge-branches",
    "merge-projections",
    "fold",
)


@pytest.mark.parametrize("name", PASSES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000))
def test_outputs_stay(name: str, seed: int) -> None:
    model = linear_graph(seed)
    feeds = random_feeds(model, seed)
    reference, before = run(model, feeds), size(model)
    pass_class(name)().run(model, context())
    assert_close(run(model, feeds), reference, tolerance=2e-5)
    if name == "fold":
        after = size(model)
        assert after.nodes <= before.nodes
        assert after.bytes <= before.bytes


@pytest.mark.parametrize("name", PASSES)
def test_rules_are_met(name: str) -> None:
    found = Counter(pass_class(name)().run(linear_graph(seed), context()).changed for seed in range(60))
    assert found[True] >= 3
