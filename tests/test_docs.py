"""What the documentation shows is executed, and what it lists is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from graphopt import registry
from graphopt.analysis import rules
from graphopt.fx import operators
from graphopt.target import parse_target

ROOT = Path(__file__).resolve().parent.parent
LONGEST_EXAMPLE = 40


def blocks(path: str, language: str) -> list[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_tables_of_the_readme_are_those_of_the_registry() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_operators_is_that_of_the_rules() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "operator_table.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec", dont_inherit=True), found)
    report = found["result"].report
    assert report.accuracy.after > 0.97
    assert report.output.bytes < 0.4 * report.input.bytes
    assert (tmp_path / "out" / "from_python" / "report.html").is_file()


def test_examples_of_extending_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # the example's rule and torch operator are gone after the test
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    monkeypatch.setattr(operators, "_TABLE", dict(operators.table()))
    module = types.ModuleType("extending")
    monkeypatch.setitem(sys.modules, "extending", module)  # annotations are looked up there
    found = vars(module)
    examples = blocks("docs/extending.md", "python")
    assert len(examples) == 10
    for number, block in enumerate(examples, 1):
        assert len(block.splitlines()) < LONGEST_EXAMPLE, f"block {number} is too long"
        exec(compile(block, f"docs/extending.md, block {number}", "exec", dont_inherit=True), found)
    assert registry.pass_problem(found["RoundWeights"], "round-weights") is None


def test_tables_of_extending_are_valid() -> None:
    entry_points, target = (tomllib.loads(block) for block in blocks("docs/extending.md", "toml"))
    assert set(entry_points["project"]["entry-points"]) == {registry.PASSES, registry.TARGETS, registry.BACKENDS}
    (name,) = target
    made = parse_target(name, target[name], "docs/extending.md")
    assert made.channel_multiple == 8 and made.quant is not None and made.quant.activation == "int8"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CHANGELOG.md",
        "examples/digits/README.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / link).exists(), f"{page} -> {link}"


def test_commands_of_the_readme_parse() -> None:
    """Each `graphopt ...` line names a command and options that exist."""
    import click

    from graphopt.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    graphopt ")]
    assert len(lines) > 8
    for line in lines:
        words = line.split()
        command = cli.commands.get(words[1])
        if words[1].startswith("-"):
            continue
        assert command is not None, line
        known = {name for option in command.params if isinstance(option, click.Option) for name in option.opts}
        for word in words[2:]:
            if word.startswith("-"):
                assert word in known or word[:2] in known, f"{line}: {word}"


def test_transcript_of_the_readme_is_of_the_demo() -> None:
    """The command shown is the one that `make demo` runs."""
    shown = re.search(r"\$ (graphopt optimize .*?-o out/demo)", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    recipe = re.search(r"graphopt optimize .*?-o \$\(OUT\)", (ROOT / "Makefile").read_text("utf-8"), re.DOTALL)
    assert shown and recipe
    plain = [" ".join(text.replace("\\\n", " ").split()) for text in (shown.group(1), recipe.group(0))]
    assert plain[0] == plain[1].replace("$(OUT)", "out/demo")
