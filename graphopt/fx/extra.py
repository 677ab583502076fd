"""torch, where it is installed."""

from __future__ import annotations

import importlib

from graphopt.errors import MissingBackendError


def require_torch(what: str) -> None:
    """Refuse where torch is missing.

    Raises:
        MissingBackendError: torch is not installed; `what` is the request that needs it.
    """
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise MissingBackendError("it needs torch", where=what, hint="run: pip install 'graphopt[torch]'") from error
