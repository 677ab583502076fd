"""What schedules know of a processor, the tiles they choose by it, and the order in which rules are tried."""

from __future__ import annotations

from typing import Any

import pytest

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'graphopt[tvm]'")

from graphopt.backends import tvm_schedules  # noqa: E402
from graphopt.backends.tvm_schedules.blocks import block_of  # noqa: E402
from graphopt.backends.tvm_schedules.machine import Machine  # noqa: E402
from graphopt.backends.tvm_schedules.tiles import best_tile  # noqa: E402

AVX512, AVX2, NEON = Machine(512, 32, 1), Machine(256, 16, 1), Machine(128, 32, 1)


@pytest.mark.parametrize(
    ("target", "machine"),
    [
        ({"mcpu": "znver4", "num-cores": 3}, Machine(512, 32, 3)),
        ({"mcpu": "haswell"}, AVX2),
        ({"mtriple": "x86_64-linux-gnu"}, Machine(128, 16, 1)),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78ae", "num-cores": 12}, Machine(128, 32, 12)),
    ],
)
def test_machine_of_a_target(target: dict[str, Any], machine: Machine) -> None:
    device = tvm.target.Target({"kind": "llvm", **target})
    with device:
        assert Machine.of(device) == machine


def test_a_block_is_a_vector_or_what_all_channels_fit_in() -> None:
    assert [block_of(c, AVX512) for c in (1, 4, 5, 8, 9, 16, 17, 512)] == [4, 4, 8, 8, 16, 16, 16, 16]
    assert [block_of(c, NEON) for c in (1, 7, 64)] == [4, 4, 4]


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON])
@pytest.mark.parametrize("size", [(1, 32, 32), (4, 8, 8), (1, 1, 33), (3, 7, 7), (16, 1, 1), (2, None, None)])
def test_sums_of_a_tile_fit_in_registers(size: tuple[int, int | None, int | None], machine: Machine) -> None:
    tile = best_tile(*size, machine)
    assert tile.sums <= machine.registers * 3 // 4
    assert size[0] % tile.blocks == 0
    enough = size[0] * (size[1] or 99) * (size[2] or 99)
    assert tile.sums >= min(6, enough), "too few sums to hide the latency of an addition"


def test_tiles_divide_an_image_where_they_can() -> None:
    for width in (8, 10, 12, 20, 28, 40, 56, 80):
        assert width % best_tile(2, width, width, AVX512).columns == 0


def _kernel() -> Any:
    from tvm import te

    x = te.placeholder((4,), "float32", name="x")
    return tvm.IRModule({"twice": te.create_prim_func([x, te.compute((4,), lambda i: x[i] * 2.0, name="y")])})


def test_a_rule_that_raises_is_noted_and_the_next_one_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, machine: Machine) -> Any:
        raise ValueError("where it was\nwhat was wrong")

    def works(function: Any, machine: Machine) -> Any:
        return tvm.s_tir.Schedule(function)

    monkeypatch.setattr(tvm_schedules, "RULES", {"broken": broken, "works": works})
    failures: list[Any] = []
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    before = _kernel()
    after = tvm_schedules.schedule(before, target, failures=failures)
    assert [str(f) for f in failures] == ["twice: broken: what was wrong"]
    assert after["twice"].attrs["tirx.is_scheduled"] == 1
    assert not before["twice"].attrs.get("tirx.is_scheduled", 0), "the module that was given is not changed"


def test_a_function_that_no_rule_takes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_schedules, "RULES", {"none": lambda function, machine: None})
    after = tvm_schedules.schedule(_kernel(), tvm.target.Target({"kind": "llvm", "num-cores": 1}))
    assert not after["twice"].attrs.get("tirx.is_scheduled", 0)
