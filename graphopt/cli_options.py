"""Options that commands share, and how they print rows and JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from graphopt.shell import State

F = Callable[..., Any]
DATA = "DATA is an .npz (keys are input names, axis 0 is samples), a folder of .npy/.npz, MODULE:FUNCTION, or 'random'."


def _debug(ctx: click.Context, option: click.Parameter, on: bool) -> None:
    if on:
        ctx.ensure_object(State).debug = True


def common(command: F) -> F:
    """Options that every command takes."""
    command = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
    )(command)
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables, errors too.")(command)


target_option = click.option("--target", metavar="NAME", help="Device and runtime; see `graphopt targets`.")
seed_option = click.option("--seed", type=int, help="Of every random choice.  [default: 0]")
threads_option = click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of a session.")
compress_option = click.option(
    "--compress", is_flag=True, help="Store weights with many zeros as values and positions; runtimes unpack them."
)
force_option = click.option("--force", is_flag=True, help="Write into a folder that holds other things.")


def print_rows(data: Any, as_json: bool) -> None:
    """Rows as a table, or as JSON."""
    if as_json:
        print_json(data)
        return
    from graphopt.report import tables

    tables.print_mappings(tables.console(sys.stdout), data)


def print_json(data: Any) -> None:
    """Plain data as JSON."""
    from graphopt.report.data import plain_json

    click.echo(plain_json(data))
