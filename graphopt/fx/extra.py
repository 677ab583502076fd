"""torch, where it is installed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

from graphopt.errors import MissingBackendError
from graphopt.extras import how_to_install


def require_torch(what: str) -> None:
    """Refuse where torch is missing.

    Raises:
        MissingBackendError: torch is not installed; `what` is the request that needs it.
    """
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise MissingBackendError("it needs torch", where=what, hint=how_to_install("torch")) from error


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch with so many threads, and afterwards with as many as before: the number belongs to the process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
