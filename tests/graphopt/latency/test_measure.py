"""Measuring: what is missing and nothing else, kept in the cache, used by prune. No time is asserted."""

import json

import pytest
from click.testing import CliRunner
from redundant_net import images
from residual_nets import residual_blocks
from text_graph import graph

import graphopt
from graphopt import jobs, registry
from graphopt.cli import cli
from graphopt.errors import MissingBackendError
from graphopt.latency import budget, measure
from graphopt.latency.measure import fill, table_of
from graphopt.latency.table import load
from graphopt.model import save
from graphopt.target import Target


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "WHOLE_SECONDS", 0.0)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def mlp():
    body = "a = Gemm (x, w, b)  r = Relu (a)  y = Gemm (r, v, c)"
    return graph("(float[n, 4] x) => (float[n, 4] y)", body, w=(4, 8), b=(8,), v=(8, 4), c=(4,))


def test_a_model_is_measured_once(mlp):
    target = registry.target("cpu")
    first = jobs.latency_table(mlp)
    # two layers, each with 4 or 8 inner neurons, in float and in int8
    assert first.new == 8
    table, path = table_of(target)
    assert path == first.path
    assert path.is_file()
    assert {shape.split()[1] for shape in table.entries} == {"float32", "int8"}
    times = [time for by_width in table.entries.values() for time in by_width.values()]
    assert len(times) == 8
    assert all(time >= 0 for time in times)
    assert table.reference_ms > 0
    assert jobs.latency_table(mlp).new == 0
    assert table_of(target, threads=2)[0].entries == {}
    assert [row["layers"] for row in first.rows()] == [1, 1, 1, 1]
    assert all("8: 1" in row["time by width, the others full"] for row in first.rows())


def test_the_command_prints_stairs_and_json_that_is_a_table(mlp, tmp_path):
    save(mlp, tmp_path / "mlp.onnx")
    run = CliRunner().invoke(cli, ["bench", "--table", str(tmp_path / "mlp.onnx")])
    assert run.exit_code == 0, run.output
    assert "Gemm float32 on 1 bias Relu" in run.output
    assert "8 times measured now" in run.output
    run = CliRunner().invoke(cli, ["bench", "--table", "--json", str(tmp_path / "mlp.onnx")])
    (tmp_path / "table.json").write_text(run.stdout)
    assert json.loads(run.stdout)["schema"] == 1
    assert load(tmp_path / "table.json").entries == table_of(registry.target("cpu"))[0].entries


@pytest.fixture
def convolutions_only(monkeypatch):
    """Every convolution takes 1, however wide, and nothing else takes time."""
    monkeypatch.setattr(measure, "_measure", lambda table, points, target, threads: dict.fromkeys(points, 1.0))

    def times(models, target, feeds, threads=1):
        return [float(sum(n.op_type == "Conv" for n in m.graph)) for m in models]

    monkeypatch.setattr(budget, "model_times", times)


@pytest.mark.parametrize("precision", ["same", "int8"])
def test_prune_measures_what_it_needs_and_says_what_came_out(precision, convolutions_only):
    model = residual_blocks([0.7, 0.05, 0.7])
    calib = {"x": next(iter(images(model).batches(batch_size=64)))["x"]}
    spec = f"prune{{latency=0.75,precision={precision}}}"
    result = graphopt.optimize(model, spec, calib=calib, bench=False)
    notes = result.report.passes[0].notes
    assert any("of them new" in n for n in notes)
    # a stem and three blocks of two; one block goes
    how = "as int8 " if precision == "int8" else ""
    assert f"the result {how}takes 0.714 of the time of this pass's input, measured at batch 1" in notes
    assert sum(n.op_type == "Conv" for n in result.model.graph) == 5
    again = graphopt.optimize(model, spec, calib=calib, bench=False)
    assert not any("of them new" in n for n in again.report.passes[0].notes)


def test_where_no_choice_meets_the_measured_time_it_says_by_how_much(convolutions_only, monkeypatch):
    monkeypatch.setattr(budget, "model_times", lambda models, target, feeds, threads=1: [7.0, 6.5][: len(models)])
    model = residual_blocks([0.7, 0.05, 0.7])
    calib = {"x": next(iter(images(model).batches(batch_size=64)))["x"]}
    result = graphopt.optimize(model, "prune{latency=0.8}", calib=calib, bench=False)
    (warned,) = [n for n in result.report.passes[0].notes if n.startswith("warning: the result takes")]
    assert "takes 0.929 of the time" in warned
    assert "0.129 above the budget" in warned


def test_a_target_that_is_not_here_is_named(mlp):
    elsewhere = Target("far", "ort", arch="riscv64")
    table, _ = table_of(elsewhere)
    with pytest.raises(MissingBackendError, match=r"target 'far'.*--table"):
        fill(table, [(measure.REFERENCE, (4, 4))], elsewhere)
