"""How to install what is optional."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from graphopt.extras import how_to_install

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["torch", "tvm", "ray"])
def test_an_extra_is_installed_by_the_names_of_its_packages(extra: str) -> None:
    command, _, told = how_to_install(extra).partition(" (")
    assert shlex.split(command)[:2] == ["pip", "install"]
    packages = shlex.split(command)[2:]
    assert packages[0] == EXTRAS[extra][0]
    assert set(packages) <= set(EXTRAS[extra])  # what was installed may be of an earlier day
    assert told == f"graphopt's extra {extra!r})"
