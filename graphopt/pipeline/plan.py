"""What the arguments of a run come to: recipe, preset and explicit arguments brought together and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt import registry
from graphopt.base import Pass
from graphopt.errors import UsageError
from graphopt.pipeline.gates import parse_bound
from graphopt.pipeline.presets import MAX_DROP, MAX_LATENCY, expand
from graphopt.pipeline.recipe import Recipe, read_recipe
from graphopt.spec import parse
from graphopt.target import Target

DEFAULT_PRESET = "O1"


@dataclass(frozen=True)
class Plan:
    """The settings of one run; `calib` and `evaluate` are whatever the loaders of such data take."""

    passes: tuple[Pass, ...]
    target: Target
    calib: Any
    evaluate: Any
    metric: str | None
    max_drop: float | None
    max_latency: float | None
    seed: int
    dim: Mapping[str, int]
    input_shape: Mapping[str, Sequence[int]]
    preset: str | None = None
    notes: tuple[str, ...] = ()

    def fixed_sizes(self) -> tuple[str, ...]:
        """A line for the report where dimensions of the inputs are fixed."""
        sizes = [f"{name}={size}" for name, size in self.dim.items()]
        shapes = [f"{name}:{','.join(map(str, shape))}" for name, shape in self.input_shape.items()]
        return (f"sizes of the inputs are fixed: {' '.join([*sizes, *shapes])}",) if sizes or shapes else ()

    def recipe(self) -> Recipe:
        """What to save to get the same run again; data that is not a path or a name has no place in a file."""

        def text(value: Any) -> str | None:
            return str(value) if isinstance(value, (str, os.PathLike)) else None

        return Recipe(
            passes=self.passes,
            target=self.target.name,
            calib=text(self.calib),
            evaluate=text(self.evaluate),
            metric=self.metric,
            max_drop=self.max_drop,
            max_latency=self.max_latency,
            seed=self.seed,
            dim=tuple(self.dim.items()),
            input_shape=tuple((name, tuple(shape)) for name, shape in self.input_shape.items()),
        )


def make_plan(
    passes: str | Sequence[Pass] | None,
    preset: str | int | None,
    recipe: Recipe | str | os.PathLike[str] | None,
    target: Target | str | None,
    calib: Any,
    evaluate: Any,
    metric: str | None,
    max_drop: float | str | None,
    max_latency: float | str | None,
    dim: Mapping[str, int] | None,
    input_shape: Mapping[str, Sequence[int]] | None,
    seed: int | None,
) -> Plan:
    """Bring the arguments of `graphopt.optimize`, which documents them, together with what a recipe or preset says.

    Raises:
        UsageError: arguments contradict each other, or one of them is wrong.
    """
    given = [n for n, v in (("passes", passes), ("preset", preset), ("recipe", recipe)) if v is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given together", hint="give one of passes, preset and recipe")
    said = recipe if isinstance(recipe, Recipe) else Recipe(()) if recipe is None else read_recipe(recipe)
    chosen = as_target(target if target is not None else said.target if said.target is not None else "cpu")
    plan = Plan(
        passes=said.passes,
        target=chosen,
        calib=calib if calib is not None else said.calib,
        evaluate=evaluate if evaluate is not None else said.evaluate,
        metric=metric if metric is not None else said.metric,
        max_drop=parse_bound(max_drop if max_drop is not None else said.max_drop, "max-drop"),
        max_latency=parse_bound(
            max_latency if max_latency is not None else said.max_latency, "max-latency", positive=True
        ),
        seed=seed if seed is not None else said.seed if said.seed is not None else 0,
        dim=dim if dim is not None else dict(said.dim),
        input_shape=input_shape if input_shape is not None else dict(said.input_shape),
    )
    if plan.seed < 0:
        raise UsageError(f"{plan.seed} is negative", where="seed", hint="give a whole number from 0 on")
    if recipe is not None:
        return plan
    if passes is not None:
        return replace(plan, passes=parse(passes) if isinstance(passes, str) else _instances(passes))
    expansion = expand(DEFAULT_PRESET if preset is None else preset, chosen, plan.calib is not None)
    drop = MAX_DROP if plan.max_drop is None else plan.max_drop
    latency = MAX_LATENCY if plan.max_latency is None else plan.max_latency
    return replace(
        plan,
        passes=expansion.passes,
        preset=expansion.name,
        max_drop=drop,
        max_latency=latency,
        notes=expansion.lines(drop, latency),
    )


def _instances(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    for p in passes:
        problem = registry.pass_problem(type(p)) if isinstance(p, Pass) else f"{p!r} is not a pass object"
        if problem is not None:
            raise UsageError(problem, where="passes", hint="give a pipeline as text, or instances of Pass dataclasses")
    return tuple(passes)


def as_target(target: Target | str) -> Target:
    """A target, looked up where it is given by name.

    Raises:
        UsageError: there is no such target.
    """
    return target if isinstance(target, Target) else registry.target(target)
