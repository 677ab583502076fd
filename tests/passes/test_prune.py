"""prune: redundant units go without a trace, budgets are met, real networks keep their accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from redundant_net import images, redundant
from residual_nets import residual_blocks
from text_graph import graph

from graphopt import model as models
from graphopt.analysis.cost import model_stats
from graphopt.analysis.units import analyse
from graphopt.base import Context
from graphopt.calibration import load
from graphopt.errors import UsageError
from graphopt.executor import Session
from graphopt.latency.shapes import sites
from graphopt.latency.table import LatencyTable
from graphopt.latency.terms import points_of
from graphopt.passes.prune import Prune
from graphopt.progress import Silent
from graphopt.pruning.work import sized
from graphopt.rewriting.layers import drop_zero_biases, give_biases
from graphopt.target import Target

TARGET = Target("test", "ort", channel_multiple=1)


def context(calibration=None, seed=0, target=TARGET):
    return Context(target, calibration, None, seed, 1, Silent())


def pruned(model, calibration=None, seed=0, target=TARGET, **options):
    copy = model.clone()
    result = Prune(**options).run(copy, context(calibration, seed, target))
    models.infer_shapes(copy)
    models.check(copy)
    return copy, result


def difference(one, other, feeds):
    a, b = Session(one).run(feeds), Session(other).run(feeds)
    return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(a[n])) for n in a)


TEST = {"x": np.random.default_rng(99).normal(size=(16, 3, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("budget", ["macs", "params", "bytes", "units"])
def test_a_doubled_network_is_halved_without_a_trace(budget):
    model = redundant()
    # half of every width is a quarter of most work; the first layer's input and the last one's output stay
    share = 0.5 if budget == "units" else 0.35
    small, result = pruned(model, images(model), **{budget: share})
    assert difference(model, small, TEST) < 1e-4
    before, after = model_stats(model), model_stats(small)
    kept = {
        "macs": after.macs / before.macs,
        "params": after.parameters / before.parameters,
        "bytes": after.bytes / before.bytes,
        "units": len(analyse(small).units) / len(analyse(model).units),
    }
    assert kept[budget] <= share + 1e-9
    assert any("removed" in note for note in result.notes)


def test_without_reconstruction_the_same_removal_does_harm():
    """The test above can fail: what keeps the function is the refit, not the choice alone."""
    model = redundant()
    small, _ = pruned(model, images(model), macs=0.35, reconstruct="none")
    assert difference(model, small, TEST) > 1e-2


def test_means_alone_are_better_than_nothing():
    model = redundant(3)
    errors = {}
    for mode in ("ls", "mean", "none"):
        small, _ = pruned(model, images(model), macs=0.2, reconstruct=mode, score="random", seed=1)
        errors[mode] = difference(model, small, TEST)
    assert errors["ls"] < errors["mean"] < errors["none"]


def test_obs_beats_random():
    model = redundant(5)
    errors = {s: difference(model, pruned(model, images(model), macs=0.4, score=s)[0], TEST) for s in ("obs", "random")}
    assert errors["obs"] < 0.1 * errors["random"]


@pytest.mark.parametrize("op", ["grouped", "transposed", "matmul", "concat"])
def test_other_readers(op):
    """Redundant channels in front of a grouped and a transposed convolution, a MatMul, two readers of one Concat."""
    rng = np.random.default_rng(2)
    bodies = {
        "grouped": (
            "y = Conv <group = 2> (s, w1)",
            {"w1": np.concatenate([rng.normal(size=(4, 2, 3, 3)).repeat(2, axis=1)], axis=0).astype(np.float32)},
        ),
        "transposed": (
            "y = ConvTranspose <strides = [2, 2]> (s, w1)",
            {"w1": rng.normal(size=(4, 3, 3, 3)).repeat(2, axis=0).astype(np.float32)},
        ),
        "matmul": (
            "t = Transpose <perm = [0, 2, 3, 1]> (s)  y = MatMul (t, w1)",
            {"w1": rng.normal(size=(4, 5)).repeat(2, axis=0).astype(np.float32)},
        ),
        "concat": (
            "k = Concat <axis = 1> (x, s)  p = Conv (k, w1, b1)  q = Conv (s, w2)  r = Conv (q, w3)  y = Add (p, r)",
            {
                "w1": rng.normal(size=(4, 11, 1, 1)).astype(np.float32),
                "b1": rng.normal(size=4).astype(np.float32),
                "w2": rng.normal(size=(6, 8, 1, 1)).astype(np.float32),
                "w3": rng.normal(size=(4, 6, 1, 1)).astype(np.float32),
            },
        ),
    }
    body, parameters = bodies[op]
    w0 = rng.normal(size=(4, 3, 3, 3)).repeat(2, axis=0).astype(np.float32)
    b0 = rng.normal(size=4).repeat(2).astype(np.float32)
    first = "a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)  s = Relu (a)  "
    signature = "(float[n, 3, 8, 8] x) => (float[n, m, h, w] y)"
    model = graph(signature, first + body, w0=w0, b0=b0, **parameters)
    small, result = pruned(model, images(model), macs=0.75 if op == "concat" else 0.55)
    assert result.changed
    assert difference(model, small, TEST) < 2e-3
    assert model_stats(small).macs < 0.76 * model_stats(model).macs


def test_multiple_and_floor_and_exclusion():
    model = redundant()
    target = Target("test", "ort", channel_multiple=4)
    small, _ = pruned(model, images(model), target=target, macs=0.7)
    widths = {n: v.const_value.shape[0] for n, v in small.graph.initializers.items() if n in {"w0", "w1"}}
    assert all(w % 4 == 0 for w in widths.values())
    small, result = pruned(model, images(model), macs=0.6, exclude=("w3", "nothing*"))
    assert small.graph.initializers["w3"].const_value.shape[0] == 8
    assert small.graph.initializers["w1"].const_value.shape[0] < 12
    assert any(n == "warning: exclude=nothing* matches nothing" for n in result.notes)
    small, _ = pruned(model, images(model), macs=0.6, min_keep=6)
    assert small.graph.initializers["w0"].const_value.shape[0] >= 6


def test_same_seed_same_bytes(tmp_path):
    model = redundant()
    for name in ("one", "other"):
        small, _ = pruned(model, images(model), macs=0.5, score="random", seed=7)
        models.save(small, tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_without_data_it_says_so():
    model = redundant()
    small, result = pruned(model, macs=0.5)
    assert any(n.startswith("warning: ") and "accuracy will suffer" in n for n in result.notes)
    assert model_stats(small).macs <= 0.5 * model_stats(model).macs


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Conv(x, w0, b)  r = Relu(a)  c = Conv(r, w1)  s = Relu(c)  y = Conv(s, w2)",
         {"w0": (8, 3, 1, 1), "w1": (8, 8, 1, 1), "w2": (4, 8, 1, 1)}),
        ("a = Conv(x, w0, b)  r = Relu(a)  c = Conv<group=2>(r, w1)  s = Relu(c)  y = Conv(s, w2)",
         {"w0": (8, 3, 1, 1), "w1": (8, 4, 1, 1), "w2": (4, 8, 1, 1)}),
        ("a = Conv(x, w0, b)  p = GlobalAveragePool(a)  f = Flatten(p)  r = Relu(f)  c = Gemm(r, w1)  s = Relu(c)  "
         "g = Gemm(s, w2)  y = Reshape(g, to)",
         {"w0": (8, 3, 1, 1), "w1": (8, 8), "w2": (8, 4), "to": np.array([0, 4, 1, 1])}),
    ],
    ids=["conv", "grouped conv", "gemm"],
)  # fmt: skip
def test_layers_without_a_bias_get_one_that_is_cut_with_them(body, weights):
    signature = "(float[n,3,8,8] x) => (float[n,4,h,w] y)"
    model = graph(signature, body, b=(8,), **weights)
    small, _ = pruned(model, images(model), macs=0.6)
    assert difference(model, small, TEST) < 0.9


def test_biases_that_nothing_needed_go_again():
    model = graph("(float[n,3,8,8] x) => (float[n,4,8,8] y)", "y = Conv(x, w)", w=(4, 3, 1, 1))
    given = give_biases(model)
    assert len(given) == 1
    assert len(model.graph.node(0).inputs) == 3
    drop_zero_biases(given)
    assert len(model.graph.node(0).inputs) == 2
    assert list(model.graph.initializers) == ["w"]


def test_names_stay():
    model = redundant()
    small, _ = pruned(model, images(model), macs=0.5)
    assert [n.outputs[0].name for n in small.graph] == [n.outputs[0].name for n in model.graph]
    assert set(small.graph.initializers) == set(model.graph.initializers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget"),
        ({"macs": 0.5, "params": 0.5}, "two budgets"),
        ({"macs": 1.5}, "outside"),
        ({"macs": 1.0}, "keeps nothing or all"),
        ({"macs": 0.01}, "cannot be met"),
        ({"macs": 0.5, "multiple": 0}, "outside"),
        ({"macs": 0.5, "table": "times.json"}, "latency= only"),
        ({"macs": 0.5, "precision": "int8"}, "latency= only"),
    ],
)
def test_wrong_options(options, message):
    model = redundant()
    with pytest.raises(UsageError, match=message):
        pruned(model, images(model, 8), **options)


@pytest.mark.data
def test_resnet20_keeps_its_accuracy(data_dir):
    """128 training images calibrate, 500 test images measure: far from the full recipe, and still a floor."""
    model = models.load(data_dir / "models" / "resnet20_cifar10.onnx")
    models.infer_shapes(model)
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    deviation = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)

    def arrays(split, count):
        data = np.load(data_dir / "cifar10" / f"{split}.npz")
        return (data["images"][:count].astype(np.float32) / 255 - mean) / deviation, data["labels"][:count]

    calibration = load({"input": arrays("train2048", 128)[0]}, model)
    small, _ = pruned(model, calibration, target=Target("test", "ort", channel_multiple=4), macs=0.7)
    x, labels = arrays("test", 500)
    session = Session(small, optimize=True)
    found = np.concatenate([session.run({"input": x[i : i + 100]})["logits"].argmax(1) for i in range(0, 500, 100)])
    assert (found == labels).mean() > 0.85
    assert model_stats(small).macs <= 0.7 * model_stats(model).macs


def test_without_data_the_statistics_of_batch_normalisation_stand_in():
    """A unit that varies little about a large mean is worth its mean, and that is what its reader keeps."""
    rng = np.random.default_rng(0)
    gamma = np.where(np.arange(8) % 2, 0.01, 1.0).astype(np.float32)
    model = graph(
        "(float[n,3,8,8] x) => (float[n,4,8,8] y)",
        "a = Conv(x, w0, b0)  n = BatchNormalization(a, gamma, beta, mean, variance)  r = Relu(n)  y = Conv(r, w1, b1)",
        # The weights are such that l2 prefers to cut the channels that hardly vary.
        w0=(rng.normal(size=(8, 3, 1, 1)) * np.where(np.arange(8) % 2, 0.1, 1.0).reshape(8, 1, 1, 1)).astype(
            np.float32
        ),
        b0=np.zeros(8, np.float32),
        gamma=gamma,
        beta=np.full(8, 2.0, np.float32),
        mean=np.zeros(8, np.float32),
        variance=np.where(np.arange(8) % 2, 0.03, 3.0).astype(np.float32),
        w1=(rng.normal(size=(4, 8, 1, 1)) * np.where(np.arange(8) % 2, 0.5, 1.0).reshape(1, 8, 1, 1)).astype(
            np.float32
        ),
        b1=(4,),
    )
    small, result = pruned(model, macs=0.5)
    bare, _ = pruned(model, macs=0.5, reconstruct="none")
    assert any("stand in for what was cut" in note for note in result.notes)
    assert difference(model, small, TEST) < 0.02 < 0.2 < difference(model, bare, TEST)


def stairs(model, path, block=4):
    """A table in which every layer takes the product of its widths, each rounded up to a block."""
    table = LatencyTable({}, 1.0)
    sample = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    points = points_of(list(sites(sized(model, sample), analyse(model))), 1)
    table.add({(s, w): float(np.prod([-(-n // block) * block for n in w])) for s, w in points})
    table.save(path)
    return table


def table_time(model, table):
    sample = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    return sum(table.time(s.shape, s.widths) for s in sites(sized(model, sample), analyse(model)))


def test_a_budget_of_latency_is_spent_on_whole_treads(tmp_path):
    model, path = redundant(), tmp_path / "table.json"
    table = stairs(model, path)
    small, result = pruned(model, images(model), latency=0.6, table=str(path), erase=False)
    assert table_time(small, table) <= 0.6 * table_time(model, table)
    widths = {n: v.const_value.shape[0] for n, v in small.graph.initializers.items() if n in {"w0", "w1"}}
    assert all(w % 4 == 0 for w in widths.values())
    assert difference(model, small, TEST) < 1e-4
    assert any(n.startswith("warning: the target cannot run here") for n in result.notes)
    again, _ = pruned(model, images(model), latency=0.6, table=str(path), erase=False)
    assert {n: v.const_value.tobytes() for n, v in again.graph.initializers.items()} == {
        n: v.const_value.tobytes() for n, v in small.graph.initializers.items()
    }


def test_a_branch_that_hardly_matters_is_erased_with_its_sum(tmp_path):
    model, path = residual_blocks([0.7, 0.02, 0.7]), tmp_path / "table.json"
    table = stairs(model, path, block=8)
    small, result = pruned(model, images(model), latency=0.75, table=str(path))
    assert not {"v1", "u1"} & set(small.graph.initializers)
    assert {"v0", "u0", "v2", "u2"} <= set(small.graph.initializers)
    assert table_time(small, table) <= 0.75 * table_time(model, table)
    assert any("erased 1 branches" in n for n in result.notes)
    assert difference(model, small, TEST) < 0.05
    kept, _ = pruned(model, images(model), latency=0.75, table=str(path), exclude=("v1",))
    assert "v1" in kept.graph.initializers
    assert difference(model, kept, TEST) > difference(model, small, TEST)


def test_branches_may_go_for_any_budget_if_asked():
    model = residual_blocks([0.7, 0.02, 0.7])
    small, _ = pruned(model, images(model), macs=0.75, erase=True, multiple=8)
    assert "v1" not in small.graph.initializers
    assert model_stats(small).macs <= 0.75 * model_stats(model).macs
    stays, _ = pruned(model, images(model), macs=0.75)
    assert "v1" in stays.graph.initializers
    _, result = pruned(model, macs=0.75, erase=True)
    assert any(n.startswith("warning: no branch is erased") for n in result.notes)


@pytest.mark.parametrize("score", ["l1", "lamp", "fpgm", "flap"])
def test_every_score_meets_the_budget(score):
    model = redundant()
    small, _ = pruned(model, images(model), macs=0.5, score=score)
    assert model_stats(small).macs <= 0.5 * model_stats(model).macs


def test_a_latency_out_of_reach_is_refused(tmp_path):
    model, path = redundant(), tmp_path / "table.json"
    stairs(model, path)
    with pytest.raises(UsageError, match=r"latency=0.01 cannot be met"):
        pruned(model, images(model), latency=0.01, table=str(path), erase=False)
