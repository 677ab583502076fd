"""The table of latencies: looking up between stairs, keeping, refusing damaged files."""

import json
from dataclasses import replace

import pytest

from graphopt.errors import DataError
from graphopt.latency.shapes import LayerShape
from graphopt.latency.table import LatencyTable, cache_path, grid, levels, load, machine_of
from graphopt.target import Target

CONV = LayerShape("Conv", "float32", (1, 8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), add=True, activation="Relu")


def table(times):
    found = LatencyTable({"processor": "p"}, 1.0)
    found.add({(CONV, widths): time for widths, time in times.items()})
    return found


def test_between_measured_widths_the_next_larger_ones_count():
    stairs = table({(16, 16): 1.0, (16, 32): 2.0, (32, 16): 3.0, (32, 32): 4.0})
    assert stairs.time(CONV, (16, 32)) == 2.0
    assert stairs.time(CONV, (17, 1)) == 3.0
    assert stairs.time(CONV, (5, 17)) == 2.0
    assert stairs.time(CONV, (32, 0)) == 0.0
    with pytest.raises(KeyError, match="33"):
        stairs.time(CONV, (33, 1))
    with pytest.raises(KeyError):
        stairs.time(replace(CONV, add=False), (16, 16))


def test_an_incomplete_grid_never_promises_too_little():
    # nothing says what (16, 16) takes: of the smallest that hold it the slower counts
    holes = table({(16, 32): 2.0, (32, 16): 3.0, (32, 32): 4.0})
    assert holes.time(CONV, (16, 16)) == 3.0


def test_levels_are_few_aligned_and_include_the_whole():
    assert levels(16, 4) == [4, 8, 12, 16]
    assert levels(64, 4) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert levels(384, 4) == [64, 128, 192, 256, 320, 384]
    assert levels(10, 4) == [4, 8, 10]
    assert levels(3, 4) == [3]
    assert all(len(levels(n, m)) <= 9 for n in range(1, 3000, 7) for m in (1, 4, 16))
    assert grid((3, 8), (False, True), 4) == [(3, 4), (3, 8)]


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "table.json"
    one, other = table({(16, 16): 1.0}), table({(16, 32): 0.25})
    one.save(path)
    other.save(path)  # what was there stays
    found = load(path)
    assert found.entries == {str(CONV): {(16, 16): 1.0, (16, 32): 0.25}}
    assert found.missing([(CONV, (16, 16)), (CONV, (8, 8)), (CONV, (8, 8))]) == [(CONV, (8, 8))]
    assert not [p for p in path.parent.iterdir() if p != path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99, "machine": {}, "layers": {}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"table.json.*no table of latencies"):
        load(path)
    with pytest.raises(DataError, match=r"no such file.*bench"):
        load(tmp_path / "nothing.json")


def test_files_differ_by_all_that_times_depend_on(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    target = Target("cpu", "ort")
    paths = {
        cache_path(machine_of(target, 1)),
        cache_path(machine_of(target, 2)),
        cache_path(machine_of(replace(target, quant=None), 1)),
        cache_path({**machine_of(target, 1), "onnxruntime": "0.1"}),
    }
    assert len(paths) == 4
    assert {p.parent for p in paths} == {tmp_path / "latency"}
    assert all(json.dumps(p.name) for p in paths)


def test_without_a_folder_of_its_own_the_user_s_cache_is_taken(monkeypatch, tmp_path):
    monkeypatch.delenv("GRAPHOPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path(machine_of(Target("cpu", "ort"), 1)).parent == tmp_path / "graphopt" / "latency"
