"""The pass manager with its instruments: what a pass may do, and what becomes of one that misbehaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from manager_passes import (
    Blank,
    Dangling,
    DropIdentity,
    Hungry,
    Liar,
    NewOpset,
    Noise,
    Raises,
    Wrong,
    feeds,
    small_model,
)

from graphopt import calibration
from graphopt.base import Context, Pass, PassResult
from graphopt.errors import DataError, PassFailure, UsageError, VerificationError
from graphopt.manager import PassManager
from graphopt.model import load
from graphopt.pipeline.clone import private_clone
from graphopt.pipeline.instruments import BisectLimit, Clock, DumpIR, Instrument, PrintIR, ShowProgress, model_text
from graphopt.pipeline.recipe import parse_recipe
from graphopt.pipeline.verify_each import VerifyEach
from graphopt.progress import Silent
from graphopt.report.data import PassRecord
from graphopt.target import Target

TARGET = Target(name="test", backend="none")


def context(model: ir.Model, data: Any = None, seed: int = 0) -> Context:
    loaded = None if data is None else calibration.load(data, model)
    return Context(TARGET, loaded, None, seed, 1, Silent())


def run(
    *passes: Pass, instruments: list[Instrument] | None = None, data: Any = None, bundles: Path | None = None
) -> tuple[ir.Model, ir.Model, list[PassRecord]]:
    """Run on the small model; gives input, output and records."""
    model = small_model()
    manager = PassManager(passes, [VerifyEach()] if instruments is None else instruments, bundles=bundles)
    return model, manager.run(model, context(model, data)), manager.records


def test_a_good_pass_is_applied_measured_and_leaves_the_input_alone() -> None:
    model = small_model()
    before = model_text(model)
    manager = PassManager([DropIdentity()], [Clock(), VerifyEach()])
    result = manager.run(model, context(model))
    assert model_text(model) == before
    assert [n.op_type for n in result.graph] == ["MatMul", "Add", "Relu"]
    (record,) = manager.records
    assert (record.status, record.effect, record.spec) == ("applied", "exact", "drop-identity")
    assert record.before is not None and record.after is not None
    assert (record.before.nodes, record.after.nodes) == (4, 3)
    assert record.before.ops["Identity"] == 1 and "Identity" not in record.after.ops
    assert record.after.opset == {"ai.onnx": 20}
    assert record.seconds > 0 and record.peak_memory > 1 << 20
    assert record.verification is not None and record.verification.passed
    assert record.verification.outputs[0].rel_l2 == 0
    assert record.skipped[0].node == "sum" and record.notes == ["1 removed"]


def test_a_pass_with_nothing_to_do_is_unchanged() -> None:
    _, _, records = run(DropIdentity(), DropIdentity())
    assert [r.status for r in records] == ["applied", "unchanged"]
    assert records[1].before == records[1].after == records[0].after


def test_a_pass_that_says_it_changed_nothing_cannot_change_anything() -> None:
    model = small_model()
    before = model_text(model), model.graph.initializers["w"].const_value.numpy().copy()
    result = PassManager([Liar()]).run(model, context(model))
    assert result is model
    assert model_text(model) == before[0]
    assert (model.graph.initializers["w"].const_value.numpy() == before[1]).all()
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_a_clone_shares_weights_and_nothing_else() -> None:
    model = small_model()
    clone = private_clone(model)
    assert clone.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    for value in (*clone.graph.inputs, *clone.graph.initializers.values()):
        value.dtype = ir.DataType.DOUBLE
    next(iter(clone.graph)).name = "other"
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert next(iter(model.graph)).name != "other"


def test_an_exact_pass_that_is_not_exact_is_caught(tmp_path: Path) -> None:
    with pytest.raises(
        VerificationError, match=r"pass 'wrong': it is exact, but output 'y' differs by 0\.0\d+"
    ) as caught:
        run(DropIdentity(), Wrong(), bundles=tmp_path)
    assert caught.value.exit_code == 4
    assert "before it: drop-identity applied" in str(caught.value)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in str(caught.value)
    # The bundle shows the failure again: its recipe on its model.
    recipe = parse_recipe((folder / "recipe.toml").read_text(), resolve=lambda name: {"wrong": Wrong}[name])
    again = load(folder / "model.onnx")
    assert [n.op_type for n in again.graph] == ["MatMul", "Add", "Relu"]
    with pytest.raises(VerificationError):
        PassManager(recipe.passes, [VerifyEach()], bundles=tmp_path).run(again, context(again))
    text = (folder / "README.txt").read_text()
    assert "VerificationError" in text and "onnxruntime: " in text and "drop-identity" in text


def test_an_invalid_graph_is_caught(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"pass 'dangling'.*left an invalid graph.*nowhere"):
        run(Dangling(), instruments=[], bundles=tmp_path)


def test_structure_does_not_look_at_numbers() -> None:
    _, _, records = run(Wrong(), instruments=[VerifyEach("structure")])
    assert records[0].status == "applied" and records[0].verification is None


def test_a_lossy_pass_is_measured_on_the_calibration_data() -> None:
    _, _, records = run(Noise(0.1), data=feeds())
    found = records[0].verification
    assert found is not None and found.tolerance is None and found.data == "calibration"
    assert 1e-3 < found.outputs[0].rel_l2 < 0.2


def test_a_lossy_pass_must_not_leave_nan(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="not finite"):
        run(Blank(), data=feeds(), bundles=tmp_path)


def test_a_model_that_cannot_run_is_checked_for_structure_and_says_so() -> None:
    model = small_model()
    model.opset_imports["unknown.domain"] = 1
    next(iter(model.graph)).domain = "unknown.domain"

    class Rename(DropIdentity):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            next(iter(model.graph)).name = "renamed"
            return PassResult(changed=True)

    manager = PassManager([Rename()], [VerifyEach()])
    manager.run(model, context(model))
    (record,) = manager.records
    assert record.status == "applied"
    assert record.verification is not None and not record.verification.passed and record.verification.reason
    assert any(n.startswith("warning: drop-identity was checked for structure only") for n in record.notes)


def test_a_crash_names_the_pass_and_leaves_a_bundle(tmp_path: Path) -> None:
    model = small_model()
    manager = PassManager([DropIdentity(), Raises()], [VerifyEach()], bundles=tmp_path, command="graphopt optimize m")
    with pytest.raises(PassFailure, match="pass 'raises': ZeroDivisionError: by zero") as caught:
        manager.run(model, context(model, seed=5))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "before it: drop-identity applied" in str(caught.value)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["README.txt", "model.onnx", "recipe.toml"]
    text = (folder / "README.txt").read_text()
    assert "Started as: graphopt optimize m" in text and "in run" in text and "ZeroDivisionError: by zero" in text
    assert parse_recipe((folder / "recipe.toml").read_text(), resolve=lambda name: Raises).seed == 5
    assert manager.records[1].status == "not run"


def test_the_bundle_of_a_large_model_holds_its_structure_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.pipeline.reproducer.LARGEST", 10)
    with pytest.raises(PassFailure):
        run(DropIdentity(), Raises(), bundles=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["README.txt", "model.onnxtext", "recipe.toml"]
    known: dict[str, type[Pass]] = {"drop-identity": DropIdentity, "raises": Raises}
    recipe = parse_recipe((folder / "recipe.toml").read_text(), resolve=lambda name: known[name])
    assert recipe.passes == (DropIdentity(), Raises())


def test_a_bundle_that_cannot_be_written_does_not_hide_the_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PassFailure, match=r"ZeroDivisionError.*no reproducer could be written"):
        run(Raises(), bundles=blocked)


def test_an_error_for_users_keeps_its_kind_and_gains_the_name_of_the_pass(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pass 'raises': input x: the data is wrong; mend it") as caught:
        run(Raises(for_users=True), bundles=tmp_path)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())


def test_missing_calibration_is_told_before_any_work() -> None:
    class Never(Instrument):
        def begin(self, model: ir.Model, ctx: Context) -> None:
            raise AssertionError("work began")

    with pytest.raises(UsageError, match="pass 'hungry': needs calibration data"):
        run(DropIdentity(), Hungry(), instruments=[Never()])
    _, _, records = run(Hungry(), data=feeds(5))
    assert records[0].notes == ["5 samples"]


def test_wrong_option_types_are_told_before_any_work() -> None:
    with pytest.raises(UsageError, match=r"noise\.level"):
        run(Noise(level="much"))  # type: ignore[arg-type]


def test_a_veto_undoes_the_pass_and_the_pipeline_goes_on() -> None:
    class NoNoise(Instrument):
        def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
            return "too loud" if pass_.name == "noise" else None

    model, result, records = run(Noise(), DropIdentity(), instruments=[NoNoise()])
    assert [(r.status, r.reason) for r in records] == [("undone", "too loud"), ("applied", None)]
    assert records[0].after == records[0].before == records[1].before
    assert any("would have left" in n for n in records[0].notes)
    assert result.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_instruments_are_called_in_order_and_after_only_for_changes() -> None:
    calls: list[str] = []

    class Spy(Instrument):
        def begin(self, model: ir.Model, ctx: Context) -> None:
            calls.append("begin")

        def before(self, pass_: Pass, model: ir.Model) -> str | None:
            calls.append(f"before {pass_.name}")
            return None

        def after(self, pass_: Pass, model: ir.Model, result: PassResult) -> str | None:
            calls.append("after")
            return None

        def fill(self, record: PassRecord) -> None:
            calls.append(f"fill {record.status}")

    run(DropIdentity(), DropIdentity(), instruments=[Spy()])
    assert calls == [
        "begin", "before drop-identity", "after", "fill applied", "before drop-identity", "fill unchanged",
    ]  # fmt: skip


def test_bisect_limit() -> None:
    _, result, records = run(DropIdentity(), Noise(), instruments=[BisectLimit(1)])
    assert [(r.status, r.reason) for r in records] == [("applied", None), ("not run", "beyond the bisect limit of 1")]
    assert len(list(result.graph)) == 3
    with pytest.raises(UsageError, match="negative"):
        BisectLimit(-1)


def test_dump_ir(tmp_path: Path) -> None:
    run(DropIdentity(), DropIdentity(), Noise(), instruments=[DumpIR(tmp_path / "dump")])
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == [
        "000_input.onnxtext", "001_drop-identity.onnxtext", "003_noise.onnxtext",
    ]  # fmt: skip
    first, second = ((tmp_path / "dump" / n).read_text() for n in ("000_input.onnxtext", "001_drop-identity.onnxtext"))
    assert "Identity" in first and "Identity" not in second and "MatMul" in second


def test_dump_ir_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--dump-ir"):
        run(DropIdentity(), instruments=[DumpIR(tmp_path / "file")])


def test_print_ir() -> None:
    printed: list[str] = []
    run(DropIdentity(), Noise(), instruments=[PrintIR(["noise"], printed.append)])
    assert len(printed) == 1 and printed[0].startswith("# after noise\n") and "MatMul" in printed[0]


def test_model_text_lists_large_initializers_by_shape() -> None:
    import numpy as np

    model = small_model()
    array = np.zeros((5, 7), np.float32)
    model.graph.register_initializer(ir.Value(name="big", const_value=ir.Tensor(array, name="big")))
    text = model_text(model)
    assert "# initializer big: FLOAT [5,7]" in text
    assert "big" in model.graph.initializers


def test_progress_is_told() -> None:
    steps: list[tuple[str, int, int | None]] = []

    class Sink:
        def step(self, what: str, done: int, total: int | None = None) -> None:
            steps.append((what, done, total))

    model = small_model()
    ctx = Context(TARGET, None, None, 0, 1, Sink())
    PassManager([DropIdentity(), Noise()], [ShowProgress(2)]).run(model, ctx)
    assert steps == [("pass drop-identity", 0, 2), ("pass noise", 1, 2)]


def test_changes_of_opset_and_ir_version_are_told() -> None:
    _, result, records = run(NewOpset())
    assert records[0].notes == ["opset of ai.onnx: 20 -> 21", "IR version: 10 -> 11"]
    assert records[0].after is not None and records[0].after.opset == {"ai.onnx": 21}
    assert result.opset_imports[""] == 21
