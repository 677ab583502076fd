"""Recipes: a pipeline with its target, data, gates and seed as a TOML file that reproduces a run.

    schema = 1
    graphopt = "0.1.0"
    target = "cpu"
    max_drop = 0.01

    [[passes]]
    name = "prune"
    macs = 0.5
    exclude = ["conv1"]
    units = { spec = "none" }

An option that TOML can hold is written as TOML; one that it cannot (none, for instance) is written in the syntax of
pipelines, in an inline table with the one key `spec`. All options are written, also those that equal their default, so
that a recipe means the same when a later version changes a default.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from graphopt.base import Pass
from graphopt.errors import UsageError
from graphopt.pipeline.options import Mismatch, Written, default_of, option_types, quote, read_value, write_value
from graphopt.registry import pass_class, suggest
from graphopt.spec import Resolve, make_pass, read_written, unknown_option

SCHEMA = 1
"""Version of the file format; raised when a key changes its meaning or goes away."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. None: not said, the caller's default holds.

    Attributes:
        passes: the pipeline.
        target: name of the target.
        calib, evaluate, metric: as `--calib`, `--eval` and `--metric` take them.
        max_drop, max_latency: bounds of the gates; inf switches a gate off in words.
        seed: of every random choice.
        dim: fixed sizes of symbolic dimensions, by name.
        input_shape: fixed shapes of inputs, by name.
    """

    passes: tuple[Pass, ...]
    target: str | None = None
    calib: str | None = None
    evaluate: str | None = None
    metric: str | None = None
    max_drop: float | None = None
    max_latency: float | None = None
    seed: int | None = None
    dim: tuple[tuple[str, int], ...] = ()
    input_shape: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def to_toml(self) -> str:
        """The recipe as TOML. Inverse of `parse_recipe`.

        Raises:
            UsageError: an option of a pass is not of its type.
        """
        from graphopt.version import version

        lines = [f"schema = {SCHEMA}", f"graphopt = {quote(version())}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("passes", "dim", "input_shape") and value is not None:
                lines.append(f"{f.name} = {_toml(value)}")
        if self.dim:
            lines += ["", "[dim]", *(f"{quote(name)} = {size}" for name, size in self.dim)]
        if self.input_shape:
            lines += ["", "[input_shape]", *(f"{quote(name)} = {list(shape)}" for name, shape in self.input_shape)]
        if not self.passes:
            lines.insert(2, "passes = []")
        for p in self.passes:
            lines += ["", "[[passes]]", f"name = {quote(p.name)}"]
            for name, annotation in option_types(type(p)).items():
                value = getattr(p, name)
                if value is None and default_of(type(p), name) is None:
                    continue
                try:
                    text = write_value(value, annotation)
                except Mismatch as error:
                    raise UsageError(
                        str(error), where=f"{p.name}.{name}", hint=f"see `graphopt passes {p.name}` for its type"
                    ) from error
                lines.append(f"{name} = {_toml(value) if _holds(value) else f'{{ spec = {quote(text)} }}'}")
        return "\n".join(lines) + "\n"


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe file.

    Raises:
        UsageError: it cannot be written there, or an option is not of its type.
    """
    text = recipe.to_toml()
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path), hint="choose another path") from error


def read_recipe(path: str | os.PathLike[str], resolve: Resolve = pass_class) -> Recipe:
    """Read a recipe file.

    Raises:
        UsageError: it cannot be read, is not TOML, of another schema, or wrong; names file, pass and option.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot be read: {reason}", where=str(path), hint="give the path of a recipe file") from error
    return parse_recipe(text, str(path), resolve)


def parse_recipe(text: str, source: str = "recipe", resolve: Resolve = pass_class) -> Recipe:
    """Make a recipe from TOML text.

    Args:
        text: the file's content.
        source: its name, for errors.
        resolve: finds the class of a pass by name.

    Raises:
        UsageError: not TOML, of another schema, or wrong; names pass and option.
    """
    import tomllib

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"is not TOML: {error}", where=source, hint="`--save-recipe` writes a correct one") from error
    if "schema" not in data:
        raise UsageError("does not say its schema", where=source, hint=f"write `schema = {SCHEMA}` as its first line")
    schema = data.pop("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        writer = f"graphopt {data['graphopt']}" if "graphopt" in data else "the version of graphopt"
        raise UsageError(
            f"has schema {schema!r}, this graphopt reads schema {SCHEMA}",
            where=source,
            hint=f"write it anew with --save-recipe, or read it with {writer} that wrote it",
        )
    data.pop("graphopt", None)
    tables = data.pop("passes", None)
    if not isinstance(tables, list):
        raise UsageError("lacks [[passes]]", where=source, hint="write one [[passes]] table per pass, with its name")
    passes = tuple(_read_pass(table, f"{source}, pass {i + 1}", resolve) for i, table in enumerate(tables))
    return Recipe(passes=passes, **_read_settings(data, source))


def _read_settings(data: dict[str, Any], source: str) -> dict[str, Any]:
    kinds: dict[str, tuple[type, ...]] = {
        "target": (str,),
        "calib": (str,),
        "evaluate": (str,),
        "metric": (str,),
        "max_drop": (int, float),
        "max_latency": (int, float),
        "seed": (int,),
    }
    settings: dict[str, Any] = {}
    for key, value in data.items():
        if key == "dim":
            settings[key] = _read_dims(value, source)
            continue
        if key == "input_shape":
            settings[key] = _read_shapes(value, source)
            continue
        if key not in kinds:
            raise UsageError(
                f"unknown key {key!r}",
                where=source,
                hint=suggest(key, [*kinds, "dim", "input_shape", "passes"], "graphopt optimize --help"),
            )
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UsageError(
                f"{value!r} is not {' or '.join(k.__name__ for k in kinds[key])}",
                where=f"{source}, key {key!r}",
                hint="correct the recipe",
            )
        settings[key] = value
    return settings


def _read_dims(value: Any, source: str) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, Mapping) or not _sizes(value.values()):
        raise UsageError(
            "is not a table of positive integers", where=f"{source}, key 'dim'", hint="write [dim] and batch = 1"
        )
    return tuple(value.items())


def _read_shapes(value: Any, source: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(v, list) and _sizes(v) for v in value.values()):
        raise UsageError(
            "is not a table of lists of positive integers",
            where=f"{source}, key 'input_shape'",
            hint="write [input_shape] and x = [1, 3, 224, 224]",
        )
    return tuple((name, tuple(shape)) for name, shape in value.items())


def _sizes(values: Iterable[Any]) -> bool:
    return all(type(v) is int and v > 0 for v in values)


def _read_pass(table: Any, where: str, resolve: Resolve) -> Pass:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise UsageError("has no name", where=where, hint='write name = "..." in each [[passes]] table')
    try:
        kind = resolve(table["name"])
    except UsageError as error:
        raise UsageError(error.what, where=where, hint=error.hint) from error
    known = option_types(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name == "name":
            continue
        if name not in known:
            raise UsageError(unknown_option(kind, name), where=where, hint="correct the recipe")
        try:
            values[name] = read_value(_written(value), known[name])
        except Mismatch as error:
            raise UsageError(str(error), where=f"{where}, {kind.name}.{name}", hint="correct the recipe") from error
    try:
        return make_pass(kind, values)
    except UsageError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise


def _written(value: Any) -> Written:
    """A TOML value as the parser of pipelines would have read it."""
    if isinstance(value, bool):
        return Written("number", "true" if value else "false")
    if isinstance(value, (int, float)):
        return Written("number", repr(value))
    if isinstance(value, str):
        return Written("quoted", value)
    if isinstance(value, list):
        return Written("tuple", items=tuple(_written(v) for v in value))
    if isinstance(value, Mapping) and set(value) == {"spec"} and isinstance(value["spec"], str):
        return read_written(value["spec"])
    raise Mismatch(f"a {type(value).__name__} is no option value", 0)


def _holds(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_holds(v) for v in value)
    return value is not None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return quote(str(value))
