"""Slices: what they read and write, and that they compute the same as the whole."""

from __future__ import annotations

import numpy as np
import pytest
from model_files import small_proto, write

from graphopt import model as models
from graphopt import slicing
from graphopt.data.random_feeds import random_feeds
from graphopt.errors import DataError
from graphopt.executor import Session
from graphopt.slicing import SlicedSession, slices

NAMES = ["basic_pitch", "gtcrn", "minilm_l6", "ppocr_cls", "silero_vad_v5_if", "stories260k_kv", "yunet_n_dynamic"]


@pytest.fixture
def model(tmp_path):
    return models.load(write(small_proto(), tmp_path / "m.onnx"))


def test_slices_respect_the_budget_and_hand_over_what_is_read_later(model):
    first, second = slices(model, 6400)
    assert [node.name for node in first.nodes] == ["first", "act"]
    assert [node.name for node in second.nodes] == ["second"]
    assert [value.name for value in first.reads] == ["x"]
    assert [value.name for value in first.writes] == ["r"]
    assert [value.name for value in second.reads] == ["r"]
    assert [value.name for value in second.writes] == ["y"]
    assert len(slices(model, 1 << 20)) == 1


def test_a_graph_output_in_the_middle_is_written(model):
    model.graph.outputs.append(model.graph.node("first").outputs[0])
    first, _ = slices(model, 6400)
    assert [value.name for value in first.writes] == ["h", "r"]
    feeds = random_feeds(model, 0)
    with Session(model) as session:
        for found, feed in zip(SlicedSession(model, budget=1).run_all(feeds), feeds, strict=True):
            expected = session.run(feed)
            assert list(found) == list(expected) == ["y", "h"]
            np.testing.assert_allclose(found["h"], expected["h"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fed", [0, 1 << 30])
@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_may_be_fed_or_stored(tmp_path, monkeypatch, fed, ir_version):
    monkeypatch.setattr(slicing, "FED", fed)
    model = models.load(write(small_proto(ir_version), tmp_path / "m.onnx", external=True))
    feeds = random_feeds(model, 0, samples=3)
    with Session(model) as session:
        for found, feed in zip(SlicedSession(model, budget=1).run_all(feeds), feeds, strict=True):
            np.testing.assert_allclose(found["y"], session.run(feed)["y"], rtol=1e-5, atol=1e-5)


def test_feeds_are_checked(model):
    with pytest.raises(DataError, match="input x"):
        SlicedSession(model, budget=1).run_all([{"x": np.ones((2, 5), np.float32)}])


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_shared_models_compute_the_same_in_slices(data_dir, monkeypatch, name):
    """Subgraphs that capture, constants in nodes, dynamic shapes: everything crosses a slice somewhere."""
    monkeypatch.setattr(slicing, "FED", 0)
    model = models.load(data_dir / "models" / f"{name}.onnx")
    feeds = random_feeds(model, 0, samples=1)
    (found,) = SlicedSession(model, budget=models.weight_bytes(model) // 5).run_all(feeds)
    with Session(model, low_memory=True) as session:
        expected = session.run(feeds[0])
    assert list(found) == list(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(value).max())))
