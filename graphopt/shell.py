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
    """

    command: str | None = None
    debug: bool = False


class Shell(click.Group):
    """A group of commands that turns every exception into its exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit; takes what `click.Command.main` takes."""
        options["standalone_mode"] = False
        options["obj"] = options.get("obj") or State()
        options["prog_name"] = options.get("prog_name") or "graphopt"
        sys.exit(self._exit_code(options["obj"], *args, **options))

    def _exit_code(self, state: State, *args: Any, **options: Any) -> int:
        from graphopt.errors import GraphoptError

        try:
            code = super().main(*args, **options)
            return code if isinstance(code, int) else 0
        except click.Abort:  # click's name for Ctrl-C
            click.echo("error: interrupted; run the command again", err=True)
            return INTERRUPTED
        except click.ClickException as error:
            error.show()
            return USAGE
        except GraphoptError as error:
            _tell(state, str(error))
            return error.exit_code
        except MemoryError as error:
            _tell(state, f"out of memory ({error}); use a machine with more, or less calibration data")
            return INTERNAL
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _tell(state, f"{where}{error.strerror or error}; check the path, its rights and the space on the disk")
            return INTERNAL
        except Exception as error:
            text = " ".join(str(error).split())
            _tell(
                state,
                f"internal error: {type(error).__name__}: {text}; run it again with --debug and report the traceback",
            )
            return INTERNAL

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
