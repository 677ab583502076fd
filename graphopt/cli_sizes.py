"""The options of the command line that fix sizes of a model's inputs: `--dim` and `--input-shape`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

F = Callable[..., Any]


def size_options(command: F) -> F:
    """Add `--dim` and `--input-shape`, which arrive as `dim` and `input_shape`."""
    shapes = click.option(
        "--input-shape",
        multiple=True,
        metavar="NAME:SIZE,SIZE,...",
        callback=_shapes,
        help="Fix the shape of an input, as in x:1,3,224,224; repeatable.",
    )
    dims = click.option(
        "--dim", multiple=True, metavar="NAME=SIZE", callback=_dims, help="Fix a symbolic input dimension; repeatable."
    )
    return dims(shapes(command))


def _dims(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, int] | None:
    found: dict[str, int] = {}
    for text in given:
        name, _, size = text.rpartition("=")
        if not name or not _is_size(size):
            raise click.BadParameter(f"{text!r} is not NAME=SIZE with a positive size, such as batch=1")
        found[name] = int(size)
    return found or None


def _shapes(ctx: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    found: dict[str, tuple[int, ...]] = {}
    for text in given:
        # Names of inputs may hold colons ("serving_default_x:0"), sizes do not.
        name, _, shape = text.rpartition(":")
        sizes = shape.split(",")
        if not name or not all(map(_is_size, sizes)):
            raise click.BadParameter(f"{text!r} is not NAME:SIZE,SIZE,... with positive sizes, such as x:1,3,224,224")
        if name in found:
            raise click.BadParameter(f"input {name!r} is given twice")
        found[name] = tuple(map(int, sizes))
    return found or None


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0
