"""Names to passes, targets and backends: entry points, clashes, and a plug-in that is really installed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphopt import registry
from graphopt.backend import Backend
from graphopt.base import Effect, Pass
from graphopt.errors import MissingBackendError, UsageError
from graphopt.target import QuantScheme, parse_target

PLUGIN = Path(__file__).resolve().parent.parent / "plugin"


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace the installed entry points: call it with (group, name, value, distribution) rows."""

    class Distribution:
        def __init__(self, name: str) -> None:
            self.name, self.version = name, "1.0"

    def install(*rows: tuple[str, str, str, str]) -> None:
        made: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for group, name, value, owner in rows:
            point = importlib.metadata.EntryPoint(name, value, group)
            vars(point)["dist"] = Distribution(owner)
            made.setdefault(group, []).append(point)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: made.get(group, []))
        registry.refresh()

    registry.refresh()
    yield install
    monkeypatch.undo()
    registry.refresh()


# --- ours -------------------------------------------------------------------------------------------------------------


def test_every_pass_of_ours_loads_and_has_help() -> None:
    from graphopt.pipeline.describe import help_text

    names = registry.passes()
    assert "fold" in names and list(names) == sorted(names)
    for name in names:
        kind = registry.pass_class(name)
        assert issubclass(kind, Pass) and kind.name == name and isinstance(kind.effect, Effect)
        assert help_text(kind).startswith(f"{name} ({kind.effect.value}")


def test_every_target_of_ours_has_a_backend_or_says_what_works_without() -> None:
    found = registry.targets()
    assert "cpu" in found
    for name, target in found.items():
        assert target.name == name
        if target.backend not in registry.backends():
            with pytest.raises(MissingBackendError, match=rf"{name}.*: nothing .*backend '{target.backend}'"):
                registry.backend(target.backend)
        else:
            assert isinstance(registry.backend(target.backend), Backend)


@pytest.mark.parametrize(
    ("call", "wrong", "message"),
    [
        (registry.pass_class, "fodl", "unknown pass 'fodl'; did you mean 'fold'.*graphopt passes"),
        (registry.target, "cpux", "unknown target 'cpux'; the targets are .*; did you mean 'cpu'.*graphopt targets"),
        (registry.target, "nope", "the targets are android, android-nnapi, .*cpu, cpu-arm64"),
        (registry.backend, "otr", "unknown backend 'otr'; did you mean 'ort'"),
        (registry.pass_class, "zzzzzz", "unknown pass 'zzzzzz'; see `graphopt passes`"),
    ],
)
def test_unknown_names_suggest_known_ones(call: Any, wrong: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(wrong)


# --- clashes and broken plug-ins --------------------------------------------------------------------------------------


def test_a_clash_names_both_distributions(entries: Any) -> None:
    entries(
        ("graphopt.passes", "fold", "a:A", "one"),
        ("graphopt.passes", "fold", "b:B", "two"),
        ("graphopt.passes", "other", "c:C", "two"),
    )
    for call in (registry.passes, lambda: registry.pass_class("fold")):
        with pytest.raises(UsageError, match=r"pass 'fold' is offered by one 1\.0 and two 1\.0; uninstall one"):
            call()


def test_without_entry_points_the_installation_is_blamed(entries: Any) -> None:
    entries()
    with pytest.raises(UsageError, match="install it"):
        registry.pass_class("fold")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import package_that_is_not_there", "package_that_is_not_there"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("", "AttributeError"),
        ("P = 3", "not a subclass of graphopt.Pass"),
        ("from graphopt.base import *\nclass P(Pass):\n    name = 'x'", "itself lacks @dataclass"),
        (
            "from graphopt.base import *\nfrom dataclasses import dataclass\n"
            "@dataclass(frozen=True)\nclass P(Pass):\n    name = 'y'\n    effect = Effect.EXACT",
            "name is 'y', not 'x'",
        ),
        (
            "from graphopt.base import *\nfrom dataclasses import dataclass\n"
            "@dataclass(frozen=True)\nclass P(Pass):\n    name = 'x'",
            "effect is not an Effect",
        ),
    ],
)
def test_a_broken_pass_names_its_distribution(
    entries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    name = f"broken_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    entries(("graphopt.passes", "x", f"{name}:P", "acme"))
    wanted = MissingBackendError if "not_there" in source else UsageError
    with pytest.raises(wanted, match=message) as caught:
        registry.pass_class("x")
    assert "pass 'x' of acme 1.0" in str(caught.value)


def test_a_module_that_does_not_exist_is_the_fault_of_its_distribution(entries: Any) -> None:
    entries(("graphopt.passes", "x", "no_such_module.sub:P", "acme"))
    with pytest.raises(UsageError, match=r"pass 'x' of acme 1\.0: module 'no_such_module' does not exist"):
        registry.pass_class("x")


def test_targets_from_a_dict_and_from_a_function(entries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target_tables.py").write_text(
        "TABLES = {'a': {'backend': 'ort', 'opset_max': 17, 'quant': False}}\n"
        "def tables(): return {'b': {'backend': 'ort', 'artefacts': ['x']}}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entries(
        ("graphopt.targets", "one", "target_tables:TABLES", "acme"),
        ("graphopt.targets", "two", "target_tables:tables", "acme"),
    )
    assert list(registry.targets()) == ["a", "b"]
    assert registry.target("a").quant is None and registry.target("a").opset_max == 17
    assert registry.target("b").quant == QuantScheme() and registry.target("b").artefacts == ("x",)


def test_a_target_offered_twice_names_both(entries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twice_tables.py").write_text("TABLES = {'a': {'backend': 'ort'}}\nMORE = TABLES\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries(
        ("graphopt.targets", "one", "twice_tables:TABLES", "acme"),
        ("graphopt.targets", "two", "twice_tables:MORE", "bcme"),
    )
    with pytest.raises(UsageError, match=r"target 'a' is offered by acme 1\.0 .* and bcme 1\.0"):
        registry.targets()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (3, "is not a table but int"),
        ({}, "lacks 'backend'"),
        ({"backend": "ort", "chanel_multiple": 4}, "unknown key 'chanel_multiple'"),
        ({"backend": "ort", "name": "b"}, "unknown key 'name'"),
        ({"backend": 3}, "key 'backend': 3 is not str"),
        ({"backend": "ort", "channel_multiple": True}, "True is not int"),
        ({"backend": "ort", "channel_multiple": 0}, "must be at least 1"),
        ({"backend": "ort", "opset_max": "17"}, "'17' is not int"),
        ({"backend": "ort", "sparsity_2_4": 1}, "1 is not bool"),
        ({"backend": "ort", "providers": "CPU"}, "'CPU' is not an array of strings"),
        ({"backend": "ort", "providers": ["CPU", 1]}, "is not an array of strings"),
        ({"backend": "ort", "quant": True}, "must be a table or false"),
        ({"backend": "ort", "sparse": True}, "'sparse' must be a table"),
        ({"backend": "ort", "sparse": {"rows": 16}}, "sparse: unknown key 'rows'"),
        ({"backend": "ort", "sparse": {"inputs": 0}}, "at least 1"),
        ({"backend": "ort", "quant": {"activation": "int4"}}, "'int4' is not 'uint8' or 'int8'"),
        ({"backend": "ort", "quant": {"scheme": "x"}}, "quant: unknown key 'scheme'"),
    ],
)
def test_wrong_target_tables(table: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_target("board", table, "acme 1.0")
    assert "target 'board' in acme 1.0" in str(caught.value)


# --- a plug-in, installed ---------------------------------------------------------------------------------------------

USE = """
import sys
import graphopt
from graphopt import registry
from graphopt.pipeline.describe import help_text
assert "sample-rename" in registry.passes() and "fold" in registry.passes()
assert not any(name.startswith("graphopt_sample") for name in sys.modules), "loaded before it was asked for"
target = registry.target("sample-board")
assert target.quant.symmetric_activation and target.channel_multiple == 4
(made,) = graphopt.parse("sample-rename{prefix='a, b '}")
assert made.prefix == "a, b "
assert "text put before each name" in help_text(type(made))
result = graphopt.optimize(sys.argv[1], "sample-rename", target="sample-board", bench=False)
assert all(node.name.startswith("sample_") for node in result.model.graph)
assert result.report.passes[0].verification.passed
print(result.report.passes[0].notes[0])
"""


def test_an_installed_plugin_is_found_like_our_own(tmp_path: Path) -> None:
    from manager_passes import small_model

    from graphopt.model import save

    # A copy, because building leaves files beside pyproject.toml.
    source, site, model = tmp_path / "source", tmp_path / "site", tmp_path / "model.onnx"
    shutil.copytree(PLUGIN, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True, text=True)
    save(small_model(), model)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    found = subprocess.run(
        [sys.executable, "-c", USE, str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "4 nodes renamed"
