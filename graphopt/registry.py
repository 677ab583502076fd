"""Passes, targets and backends by name, found through entry points and loaded when first asked for.

graphopt's own passes are found exactly as a third party's: a distribution declares

    [project.entry-points."graphopt.passes"]
    my-pass = "my_package.my_pass:MyPass"
    [project.entry-points."graphopt.targets"]
    my-board = "my_package:targets.toml"          # or "my_package:TABLES", a dict or a function that returns one
    [project.entry-points."graphopt.backends"]
    my-runtime = "my_package.runtime:MyBackend"

Two distributions that offer the same name are an error that names both: which of them runs must not depend on the
order in which they were installed.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.resources
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from graphopt.base import Effect, Pass
from graphopt.errors import GraphoptError, MissingBackendError, UsageError

if TYPE_CHECKING:
    from graphopt.backend import Backend
    from graphopt.target import Target

PASSES, TARGETS, BACKENDS = "graphopt.passes", "graphopt.targets", "graphopt.backends"
_KIND = {PASSES: "pass", TARGETS: "target", BACKENDS: "backend"}


def passes() -> tuple[str, ...]:
    """Names of all installed passes, sorted.

    Raises:
        UsageError: two distributions offer a pass of the same name.
    """
    return _names(PASSES)


def backends() -> tuple[str, ...]:
    """Names of all installed backends, sorted.

    Raises:
        UsageError: two distributions offer a backend of the same name.
    """
    return _names(BACKENDS)


def targets() -> dict[str, Target]:
    """All targets by name, sorted by name.

    Raises:
        UsageError: a target table is wrong, or two distributions offer the same name.
    """
    return dict(_target_tables())


@cache
def pass_class(name: str) -> type[Pass]:
    """The pass called `name`.

    Raises:
        UsageError: there is none, two distributions offer it, or it is not a pass.
        MissingBackendError: it needs a package that is not installed.
    """
    point = _entry_point(PASSES, name)
    found = _load(point, "pass")
    where = f"pass {name!r} of {_distribution(point)}"
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"{point.value} is not a subclass of graphopt.Pass", where=where, hint=_tell(point))
    problem = pass_problem(found, name)
    if problem:
        raise UsageError(problem, where=where, hint=_tell(point))
    return found


def pass_problem(found: type[Pass], name: str | None = None) -> str | None:
    """What keeps a class from being a pass that recipes and help can be generated for; None where nothing does."""
    if not is_dataclass(found) or not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"{found.__qualname__} is not a frozen dataclass"
    if "__dataclass_fields__" not in vars(found):
        return f"{found.__qualname__} itself lacks @dataclass(frozen=True), so its options would be lost"
    if not isinstance(getattr(found, "name", None), str) or (name is not None and found.name != name):
        return f"{found.__qualname__}.name is {getattr(found, 'name', None)!r}" + (f", not {name!r}" if name else "")
    if not isinstance(getattr(found, "effect", None), Effect):
        return f"{found.__qualname__}.effect is not an Effect"
    return None


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        UsageError: there is none, or a target table is wrong.
    """
    found = _target_tables()
    if name not in found:
        listed = f"the targets are {', '.join(found)}; {suggest(name, found, 'graphopt targets')}"
        raise UsageError(f"unknown target {name!r}", hint=listed)
    return found[name]


@cache
def backend(name: str) -> Backend:
    """An instance of the backend called `name`.

    Raises:
        UsageError: there is none and no target names it, or two distributions offer it.
        MissingBackendError: a target names it and no distribution offers it, or a package that it needs is missing.
    """
    named = [target.name for target in targets().values() if target.backend == name]
    if named and name not in _entry_points(BACKENDS):
        raise MissingBackendError(
            f"nothing that is installed lowers to backend {name!r} or measures there",
            where=f"target {' | '.join(named)}",
            hint="graphopt optimize -o MODEL.onnx and graphopt inspect --target work without it",
        )
    point = _entry_point(BACKENDS, name)
    made = _load(point, "backend")
    made = made() if isinstance(made, type) else made
    for member in ("name", "unavailable", "missing", "session", "bench", "lower", "open", "stand_in"):
        if not hasattr(made, member):
            raise UsageError(
                f"{point.value} has no {member!r}",
                where=f"backend {name!r} of {_distribution(point)}",
                hint=f"see graphopt.backend.Backend; {_tell(point)}",
            )
    chosen: Backend = made
    return chosen


def unavailable(target: Target) -> str | None:
    """Why models for a target cannot run here: its backend is not installed, or the machine is another; else None."""
    try:
        return backend(target.backend).unavailable(target)
    except (MissingBackendError, UsageError) as error:
        return str(error)


def suggest(name: str, known: Iterable[str], listing: str) -> str:
    """A hint for an unknown name: the closest known ones, and where the whole list is."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return (f"did you mean {' or '.join(repr(n) for n in near)}? " if near else "") + f"see `{listing}`"


def refresh() -> None:
    """Forget what was found, for a process that installs distributions while it runs (notebooks, tests)."""
    importlib.invalidate_caches()
    for memo in (_entry_points, _target_tables, pass_class, backend):
        memo.cache_clear()


@cache
def _entry_points(group: str) -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def _names(group: str) -> tuple[str, ...]:
    for name, points in _entry_points(group).items():
        _only(points, name, _KIND[group])
    return tuple(_entry_points(group))


def _entry_point(group: str, name: str) -> importlib.metadata.EntryPoint:
    found, kind = _entry_points(group), _KIND[group]
    if name not in found:
        hint = suggest(name, found, "graphopt passes" if group == PASSES else "graphopt targets")
        if not found:
            hint = "graphopt's own entry points are missing: install it (pip install graphopt, or pip install -e .)"
        raise UsageError(f"unknown {kind} {name!r}", hint=hint)
    return _only(found[name], name, kind)


def _only(points: list[importlib.metadata.EntryPoint], name: str, kind: str) -> importlib.metadata.EntryPoint:
    if len(points) > 1:
        raise UsageError(
            f"{kind} {name!r} is offered by {' and '.join(sorted(_distribution(p) for p in points))}",
            hint="uninstall one of them, or rename its entry point",
        )
    return points[0]


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def _tell(point: importlib.metadata.EntryPoint) -> str:
    return f"correct or uninstall {_distribution(point)}"


def _load(point: importlib.metadata.EntryPoint, kind: str) -> Any:
    where = f"{kind} {point.name!r} of {_distribution(point)}"
    try:
        return point.load()
    except GraphoptError:
        raise
    except ModuleNotFoundError as error:
        if error.name and not f"{point.module}.".startswith(f"{error.name}."):
            raise MissingBackendError(
                f"needs the Python package {error.name!r}, which is not installed",
                where=where,
                hint=f"pip install {error.name.partition('.')[0]}, or the extra that brings it",
            ) from error
        raise UsageError(f"module {error.name!r} does not exist", where=where, hint=_tell(point)) from error
    except Exception as error:  # a plug-in's module may raise anything while it is imported
        raise UsageError(f"{type(error).__name__}: {error}", where=where, hint=_tell(point)) from error


@cache
def _target_tables() -> dict[str, Target]:
    from graphopt.target import parse_target

    found: dict[str, tuple[Target, str]] = {}
    for points in _entry_points(TARGETS).values():
        for point in points:
            source = f"{_distribution(point)} ({point.value})"
            for name, table in _read_tables(point, source).items():
                if name in found:
                    raise UsageError(
                        f"target {name!r} is offered by {' and '.join(sorted((found[name][1], source)))}",
                        hint="uninstall one of them, or rename its table",
                    )
                found[name] = (parse_target(name, table, source), source)
    return {name: found[name][0] for name in sorted(found)}


def _read_tables(point: importlib.metadata.EntryPoint, source: str) -> Mapping[str, Any]:
    where = f"targets of {source}"
    if point.attr.endswith(".toml"):
        import tomllib

        try:
            text = importlib.resources.files(point.module).joinpath(point.attr).read_text(encoding="utf-8")
            return tomllib.loads(text)
        except (OSError, ImportError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{type(error).__name__}: {error}", where=where, hint=_tell(point)) from error
    tables = _load(point, "targets")
    if callable(tables):
        tables = tables()
    if not isinstance(tables, Mapping) or not all(isinstance(name, str) for name in tables):
        raise UsageError("not a dict of target tables by name", where=where, hint=_tell(point))
    return tables
