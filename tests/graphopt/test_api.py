"""`graphopt.optimize` from end to end on a small network, and the report that it gives."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from manager_passes import Blank, DropIdentity, Grow, Hungry, Liar, NewOpset, Noise, Raises, feeds, small_model

import graphopt
from graphopt.backend import Artefacts
from graphopt.errors import DataError, GateRefused, GraphoptError, ModelError, PassFailure, UsageError
from graphopt.pipeline.presets import expand
from graphopt.pipeline.recipe import Recipe
from graphopt.report.data import Report, Stats
from graphopt.spec import to_spec
from graphopt.target import Target

TARGET = Target(name="nowhere", backend="ort", providers=("NoSuchExecutionProvider",))
"""A target that runs on no machine, so that no test waits for a clock."""


def optimize(passes: Any, model: Any = None, **settings: Any) -> graphopt.Result:
    settings = {"target": TARGET, "units": False, **settings}
    return graphopt.optimize(small_model() if model is None else model, passes, **settings)


def test_a_backend_that_cannot_compress_is_not_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        name = "plain"
        asked: ClassVar[list[Any]] = []

        def unavailable(self, target: Any) -> None:
            return None

        missing = unavailable

        def lower(self, model: Any, target: Any, folder: Path, *, feeds: Any = None) -> Artefacts:
            self.asked.append(folder)
            (folder / "net").write_bytes(b"x")
            return Artefacts("net", ("cat", "net"), ("cat", "net"), {"net": "the net"}, warnings=("it is slow",))

    result = optimize([DropIdentity()])
    monkeypatch.setattr("graphopt.registry.backend", lambda name: Plain())
    made = result.lower(tmp_path / "bundle", compress=True)
    assert {f.name for f in made.files} == {"net", "bench.sh", "README.md", "manifest.json"}
    assert result.report.warnings[-2:] == ["the bundle is not compressed: backend 'ort' cannot", "it is slow"]
    with pytest.raises(UsageError, match="no such option"):
        graphopt.lower(small_model(), TARGET, tmp_path, compress=True)
    assert len(Plain.asked) == 1


def test_the_report_tells_what_happened() -> None:
    model = small_model()
    result = optimize([DropIdentity(), Noise(0.01), Grow()], model, calib=feeds(), seed=3, command="test")
    report = result.report
    assert [n.op_type for n in model.graph] == ["Identity", "MatMul", "Add", "Relu"]
    assert [n.op_type for n in result.model.graph] == ["MatMul", "Add", "Relu"]
    assert (report.input.nodes, report.output.nodes) == (4, 3)
    assert report.pipeline == "drop-identity,noise{level=0.01},grow"
    assert (report.seed, report.target, report.command) == (3, "nowhere", "test")
    assert [p.status for p in report.passes] == ["applied"] * 3
    assert report.fidelity is not None and report.fidelity.data == "calibration"
    assert report.fidelity.cosine is not None and 0.999 < report.fidelity.cosine < 1
    assert report.latency is not None and report.latency.ratio is None
    assert "NoSuchExecutionProvider" in (report.latency.reason or "")
    assert report.versions["onnxruntime"] and report.seconds > 0
    assert any("grow made the weights larger" in w for w in report.warnings)


def test_the_report_survives_json() -> None:
    report = optimize([DropIdentity(), Noise(0.01)], calib=feeds()).report
    text = report.to_json()
    assert Report.from_json(text) == report
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["schema"] == 2
    # An exact pass leaves an infinite signal-to-noise ratio, which JSON cannot hold as a number.
    assert data["passes"][0]["verification"]["outputs"][0]["sqnr_db"] == "inf"
    data["schema"] = 99
    with pytest.raises(UsageError, match="schema 99"):
        Report.from_dict(data)
    with pytest.raises(UsageError, match="not a report"):
        Report.from_json("{")


def test_same_input_options_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    graphopt.save(small_model(), tmp_path / "in.onnx")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        optimize([DropIdentity(), Noise(0.01)], tmp_path / "in.onnx", calib=feeds(), seed=seed).save(
            tmp_path / f"{name}.onnx"
        )
    a, b, c = ((tmp_path / f"{n}.onnx").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_no_passes_is_an_identity() -> None:
    model = small_model()
    result = optimize("", model)
    assert result.model is model
    assert result.report.fidelity is not None and result.report.fidelity.cosine == 1


def test_accuracy_is_told_before_and_after() -> None:
    data = {**feeds(), "labels": np.zeros(16, np.int64)}
    report = optimize([DropIdentity()], evaluate=data, metric="top1").report
    assert report.accuracy is not None
    assert (report.accuracy.metric, report.accuracy.higher_is_better) == ("top1", True)
    assert report.accuracy.before == report.accuracy.after
    assert report.accuracy.drop == 0


def test_a_refused_gate_raises_with_the_report() -> None:
    with pytest.raises(GateRefused, match="noise: output fidelity") as caught:
        optimize([Noise(0.9)], calib=feeds(), max_drop="0.01%")
    assert caught.value.exit_code == 5
    assert [p.status for p in caught.value.report.passes] == ["undone"]
    assert caught.value.report.output == caught.value.report.input


def test_a_refused_gate_beside_a_pass_that_helped_is_told_and_no_error() -> None:
    result = optimize([DropIdentity(), Noise(0.9)], calib=feeds(), max_drop=1e-4)
    assert [p.status for p in result.report.passes] == ["applied", "undone"]
    assert any(w.startswith("noise was undone: output fidelity") for w in result.report.warnings)
    assert result.report.output.nodes == 3


def test_a_latency_gate_that_cannot_measure_is_told() -> None:
    report = optimize([DropIdentity()], max_latency=1.0).report
    assert report.passes[0].status == "applied"
    assert any("the max-latency gate did not decide" in w for w in report.warnings)


def test_a_demand_on_latency_that_the_result_misses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import registry
    from graphopt.backend import BenchResult

    class Clock:
        name = "fake"

        def unavailable(self, target: Target) -> str | None:
            return None

        def bench(self, models: Any, target: Target, feeds: Any = None, **settings: Any) -> BenchResult:
            return BenchResult((1.0, 0.8), (1.0, 0.8), (1.0, 0.79), (1.0, 0.81), 100, 1)

    monkeypatch.setattr(registry, "backend", lambda name: Clock())
    with pytest.raises(GateRefused, match=r"max-latency: the result takes 0\.800x .* not 0\.5x"):
        optimize([DropIdentity()], max_latency=0.5)
    report = optimize([DropIdentity()], max_latency=0.8).report
    assert report.latency is not None and report.latency.ratio == 0.8


def test_dry_run_checks_and_plans_and_runs_nothing() -> None:
    result = optimize([Raises(), Noise()], dry_run=True)
    assert [(p.name, p.status) for p in result.report.passes] == [("raises", "planned"), ("noise", "planned")]
    assert result.report.dry_run and result.report.output == result.report.input
    with pytest.raises(UsageError, match="needs calibration data"):
        optimize([Hungry()], dry_run=True)


def test_bisect_limit_and_dump(tmp_path: Path) -> None:
    report = optimize([DropIdentity(), Raises()], bisect_limit=1, dump_ir=tmp_path / "ir").report
    assert [p.status for p in report.passes] == ["applied", "not run"]
    assert (tmp_path / "ir" / "001_drop-identity.onnxtext").is_file()


def test_the_failure_of_a_pass(tmp_path: Path) -> None:
    with pytest.raises(PassFailure, match="pass 'raises'") as caught:
        optimize([Raises()], bundles=tmp_path)
    assert caught.value.exit_code == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_fixed_dimensions_leave_the_given_model_alone() -> None:
    model = small_model()
    result = optimize([DropIdentity()], model, dim={"N": 4})
    assert list(result.model.graph.inputs[0].shape or ()) == [4, 4]
    assert not isinstance((model.graph.inputs[0].shape or [0])[0], int)
    with pytest.raises(UsageError):
        optimize([DropIdentity()], model, dim={"M": 4})


def test_fixed_shapes_are_recorded() -> None:
    result = optimize([DropIdentity()], input_shape={"x": [3, 4]})
    assert list(result.model.graph.inputs[0].shape or ()) == [3, 4]
    assert result.recipe.input_shape == (("x", (3, 4)),)
    assert "sizes of the inputs are fixed: x:3,4" in result.report.notes
    again = optimize(None, recipe=result.recipe)
    assert list(again.model.graph.inputs[0].shape or ()) == [3, 4]


def test_opset_beyond_the_target_is_told() -> None:
    report = optimize([NewOpset()], target=replace(TARGET, opset_max=20, ir_max=10)).report
    assert "opset 21 is newer than target 'nowhere' reads (at most 20)" in report.warnings
    assert any(w.startswith("IR version 11 is newer") for w in report.warnings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"passes": "nope"}, UsageError, "unknown pass 'nope'"),
        ({"passes": [3]}, UsageError, "3 is not a pass object"),
        ({"passes": "", "preset": "O1"}, UsageError, "passes and preset are given together"),
        ({"preset": "O9"}, UsageError, "no preset 'O9'"),
        ({"passes": "", "target": "zzz"}, UsageError, "unknown target 'zzz'"),
        ({"passes": "", "max_drop": "lots"}, UsageError, "max-drop: 'lots' is not a bound"),
        ({"passes": "", "seed": -1}, UsageError, "seed: -1 is negative"),
        ({"passes": "", "jobs": 0}, UsageError, "jobs: 0 is less than 1"),
        ({"passes": "", "metric": "top1"}, UsageError, "a metric without evaluation data"),
        ({"passes": "", "print_ir_after": ["fold"]}, UsageError, "'fold' is not in the pipeline"),
        ({"passes": "", "calib": {"z": np.zeros((2, 4), np.float32)}}, DataError, "x"),
        ({"passes": "", "model": "/no/such/model.onnx"}, ModelError, "model.onnx"),
        ({"recipe": "/no/such/recipe.toml"}, UsageError, "cannot be read"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], error: type[GraphoptError], message: str) -> None:
    passes = settings.pop("passes", None)
    with pytest.raises(error, match=message):
        optimize(passes, **settings)


def test_an_instrument_of_the_user_can_veto() -> None:
    class No(graphopt.Instrument):
        def after(self, pass_: Any, model: ir.Model, result: Any) -> str | None:
            return "because"

    with pytest.raises(GateRefused, match="drop-identity: because"):
        optimize([DropIdentity()], instruments=[No()])


def test_a_lossy_pass_that_destroys_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(graphopt.VerificationError, match="not finite"):
        optimize([Blank()], calib=feeds(), bundles=tmp_path)


def test_a_pass_that_changes_what_it_says_it_leaves_is_harmless() -> None:
    report = optimize([Liar()]).report
    assert report.passes[0].status == "unchanged"


# --- recipes and presets ----------------------------------------------------------------------------------------------


def test_a_recipe_gives_the_same_again(tmp_path: Path) -> None:
    graphopt.save(small_model(), tmp_path / "in.onnx")
    np.savez(tmp_path / "calib.npz", **feeds())  # type: ignore[arg-type]
    first = graphopt.optimize(
        tmp_path / "in.onnx",
        "fold,quantize",
        calib=str(tmp_path / "calib.npz"),
        max_drop="5%",
        max_latency=math.inf,
        seed=4,
        dim={"N": 1},
        units=False,
        bench=False,
    )
    graphopt.write_recipe(first.recipe, tmp_path / "r.toml")
    again = graphopt.optimize(tmp_path / "in.onnx", recipe=tmp_path / "r.toml", units=False, bench=False)
    assert again.recipe == first.recipe
    first.save(tmp_path / "a.onnx")
    again.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_arguments_go_before_the_recipe() -> None:
    recipe = Recipe((DropIdentity(),), target="cpu", seed=4, max_drop=0.5)
    report = optimize(None, recipe=recipe, seed=5).report
    assert (report.seed, report.target, report.gates["max-drop"]) == (5, "nowhere", 0.5)
    assert report.pipeline == "drop-identity"


def test_presets_say_what_they_are() -> None:
    said: list[str] = []
    with pytest.raises(UsageError):
        # Both: the lines were said before the contradiction would matter.
        optimize("", preset=1)
    report = optimize(None, preset="-O0", say=said.append).report
    assert said == ["-O0 runs no pass"]
    assert report.preset == "O0" and report.notes == said
    assert report.gates == {"max-drop": 0.01, "max-latency": 1.0}


def known(name: str) -> type[graphopt.Pass]:
    """Stand-ins with the names that the presets use."""
    lossy = name in ("prune", "quantize")

    @dataclass(frozen=True)
    class Stand(Noise):
        """A stand-in."""

        effect: ClassVar[graphopt.Effect] = graphopt.Effect.LOSSY if lossy else graphopt.Effect.EXACT
        needs_calibration: ClassVar[bool] = name == "quantize"
        macs: float = 1.0
        scheme: str = "int8"

    Stand.name = name
    return Stand


def test_presets_leave_out_what_cannot_work() -> None:
    full = expand("O3", TARGET, True, known)
    assert [p.name for p in full.passes] == ["fold", "shrink", "prune", "quantize"] and full.left_out == ()
    assert to_spec(full.passes[3:]) == "quantize"  # nobody can time the formats of a target that is not here
    without = expand(3, TARGET, False, known)
    assert [p.name for p in without.passes] == ["fold", "shrink"]
    assert without.left_out == (
        "prune is left out: it needs calibration data (--calib DATA)",
        "quantize is left out: it needs calibration data (--calib DATA)",
    )
    fp32 = expand("2", Target("t", "ort", quant=None), True, known)
    assert [p.name for p in fp32.passes] == ["fold", "shrink"]
    assert fp32.lines()[1] == "quantize is left out: target 't' does not run int8"
    assert expand("O0", TARGET, True, known).passes == ()


@pytest.mark.parametrize("preset", ["O2", "O3"])
def test_presets_measure_formats_where_the_target_runs(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def unavailable(self, target: Target) -> str | None:
            return None if target.name == "here" else "no such device"

    monkeypatch.setattr(graphopt.registry, "backend", lambda name: Here())
    here, elsewhere = (expand(preset, Target(name, "ort"), True, known) for name in ("here", "there"))
    assert to_spec(here.passes[-1:]) == "quantize{scheme=auto}"
    assert to_spec(elsewhere.passes[-1:]) == "quantize"
    assert here.lines()[0].endswith("quantize{scheme=auto}' --max-drop 0.01 --max-latency 1")


# --- saving, lowering, importing --------------------------------------------------------------------------------------


def test_saving_into_a_folder_writes_model_reports_and_recipe(tmp_path: Path) -> None:
    result = graphopt.optimize(small_model(), "fold", units=False, bench=False)
    files = result.save(tmp_path / "out")
    assert sorted(p.name for p in files) == ["model.onnx", "recipe.toml", "report.html", "report.json"]
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == result.report
    assert graphopt.read_recipe(tmp_path / "out" / "recipe.toml") == result.recipe
    assert [n.op_type for n in graphopt.load(tmp_path / "out" / "model.onnx").graph]


def test_saving_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        optimize("").save(tmp_path / "file" / "out")


def test_lowering_writes_a_bundle(tmp_path: Path) -> None:
    result = graphopt.optimize(small_model(), "fold", units=False, bench=False)
    files = result.lower(tmp_path / "bundle", verify=True).files
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["pipeline"]["optimize"] == "fold"
    assert manifest["verified"]["relative"] < 1e-5
    assert {p.name for p in files} >= {"model.onnx", "manifest.json"}


def test_importing_graphopt_loads_nothing_heavy() -> None:
    code = (
        "import sys, graphopt\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'scipy', 'rich', 'jinja2', 'networkx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "import graphopt.api\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(sorted(n for n in dir(graphopt) if n in ('optimize', 'load', 'Pass', '__version__')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "[]", "['Pass', '__version__', 'load', 'optimize']"]


def test_every_public_name_exists() -> None:
    for name in dir(graphopt):
        assert getattr(graphopt, name) is not None or name.startswith("__")
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = graphopt.nope


def test_an_analysis_that_fails_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ir.Model) -> Any:
        raise KeyError("axis")

    monkeypatch.setattr("graphopt.report.units.summarise", broken)
    report = optimize([DropIdentity()], units=True).report
    assert report.passes[0].status == "applied"
    assert report.units is not None and "KeyError: 'axis'" in (report.units.reason or "")
    assert any("what can be pruned is not known" in w for w in report.warnings)


def test_stats_of_a_plain_model_compare_equal() -> None:
    report = optimize("").report
    assert isinstance(report.input, Stats) and report.input.parameters == 15 and report.input.bytes == 60
