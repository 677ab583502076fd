"""`module:function` on the command line: import a user's function from the current folder or the environment."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError

_SPEC = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")


def is_function_spec(spec: str) -> bool:
    """Whether `spec` is written as `module:function`."""
    return _SPEC.fullmatch(spec) is not None


def load_function(spec: str) -> Callable[..., Any]:
    """Import the function that `module:function` names; the current folder is searched first, and stays importable.

    Raises:
        UsageError: the module cannot be imported or has no such callable.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UsageError("is not of the form module:function", where=spec, hint="write e.g. my_data:batches")
    here = str(Path.cwd())
    if here not in sys.path:
        # left in place: the user's function may import its neighbours only when it is called
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        where = f"in {here} or the environment"
        raise UsageError(
            f"no module named {error.name!r} {where}", where=spec, hint="run from the module's folder or install it"
        ) from error
    except Exception as error:
        raise UsageError(
            f"importing it raised {type(error).__name__}: {error}", where=spec, hint="mend the module"
        ) from error
    for part in match["name"].split("."):
        if not hasattr(found, part):
            raise UsageError(
                f"module {match['module']!r} ({getattr(found, '__file__', 'built in')}) has no {part!r}",
                where=spec,
                hint="check the function's name",
            )
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"is a {type(found).__name__}, not a function", where=spec, hint="name a function")
    function: Callable[..., Any] = found
    return function
