"""How the command line ends: errors become one clear line and an exit code, tracebacks need --debug."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import click

INTERNAL, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


@dataclass
class State:
    """What the commands of one call share.

    Attributes:
        command: the call as typed, for reports and bundles.
        debug: show tracebacks.
        json: JSON was asked for.
    """

    command: str | None = None
    debug: bool = False
    json: bool = False


class Shell(click.Group):
    """A group of commands that turns every exception into its exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit; takes what `click.Command.main` takes."""
        options["standalone_mode"] = False
        options["obj"] = options.get("obj") or State()
        options["prog_name"] = options.get("prog_name") or "graphopt"
        sys.exit(self._exit_code(options["obj"], *args, **options))

    def _exit_code(self, state: State, *args: Any, **options: Any) -> int:
        from graphopt.errors import GateRefused, GraphoptError

        # Read from the words themselves: a call that cannot be parsed is an error like the others.
        given = options.get("args", args[0] if args else None)
        state.json = "--json" in (sys.argv[1:] if given is None else given)
        try:
            code = super().main(*args, **options)
            return code if isinstance(code, int) else 0
        except click.Abort:  # click's name for Ctrl-C
            click.echo("error: interrupted; run the command again", err=True)
            return _error_json(state, INTERRUPTED, "interrupted", hint="run the command again")
        except click.ClickException as error:
            error.show()
            return _error_json(state, USAGE, error.format_message())
        except GraphoptError as error:
            _tell(state, str(error))
            if isinstance(error, GateRefused) and error.report is not None:
                return error.exit_code  # the report, which tells what was tried, is what stands on stdout
            return _error_json(state, error.exit_code, error.what, where=error.where, hint=error.hint)
        except MemoryError as error:
            hint = "use a machine with more, or less calibration data"
            _tell(state, f"out of memory ({error}); {hint}")
            return _error_json(state, INTERNAL, f"out of memory ({error})", hint=hint)
        except OSError as error:
            what, hint = str(error.strerror or error), "check the path, its rights and the space on the disk"
            where = None if error.filename is None else str(error.filename)
            _tell(state, f"{f'{where}: ' if where else ''}{what}; {hint}")
            return _error_json(state, INTERNAL, what, where=where, hint=hint)
        except Exception as error:
            what = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
            hint = "run it again with --debug and report the traceback"
            _tell(state, f"{what}; {hint}")
            return _error_json(state, INTERNAL, what, hint=hint)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that went away (`graphopt passes | head -1`) is no error to tell anybody."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # What is still buffered would raise again when Python closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)


def _error_json(state: State, code: int, what: str, *, where: str | None = None, hint: str | None = None) -> int:
    """With --json, the error on stdout in place of a result, so that readers always get JSON; returns the exit code."""
    if state.json:
        import json

        error = {"exit_code": code, "what": what, "where": where, "hint": hint}
        click.echo(json.dumps({"error": error}, indent=2, ensure_ascii=False))
    return code


def _tell(state: State, message: str) -> None:
    """The error on stderr; its last line says the cause and what to try."""
    from graphopt.report.text import clean

    if state.debug:
        import traceback

        traceback.print_exc()
    *before, last = message.splitlines() or [""]
    for line in before:
        click.echo(clean(line, 1000), err=True)
    click.secho(f"error: {clean(last, 4000)}", err=True, fg="red")
