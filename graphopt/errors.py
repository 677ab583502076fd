"""The errors graphopt raises: each says what went wrong, where, and what to try next.

Every error carries the exit code of the command line (DESIGN section 3), so that a script can tell a bad recipe from a
refused gate without reading text.
"""

from __future__ import annotations

from typing import Any, ClassVar


class GraphoptError(Exception):
    """Base of all errors that are meant for the user.

    Args:
        what: the cause, one sentence without a trailing full stop.
        where: the node, tensor, file, option or pass it concerns.
        hint: the next step for the user, as an imperative.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(GraphoptError):
    """A wrong option, pass name, pass argument or recipe."""

    exit_code = 2


class ModelError(GraphoptError):
    """The model file is invalid, hostile or unsupported."""

    exit_code = 3


class DataError(GraphoptError):
    """Calibration or evaluation data that does not fit the model."""

    exit_code = 3


class VerificationError(GraphoptError):
    """A rewrite changed what the model computes, or left an invalid graph."""

    exit_code = 4


class GateRefused(GraphoptError):
    """Every result broke a gate, so the input model stands; `report` (a `graphopt.Report`) tells what was tried."""

    exit_code = 5
    report: Any = None


class MissingBackendError(GraphoptError):
    """A backend, tool or optional package that the request needs is not installed or cannot run here."""

    exit_code = 6


class PassFailure(GraphoptError):
    """A pass raised. Names the pass, the passes before it, and the reproducer bundle written."""

    exit_code = 1
