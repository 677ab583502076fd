"""Options that one backend alone has: the keyword parameters of its `lower`, beyond those that all backends have.

Their annotations are their types: `bool`, `int`, `float` or `str`, or one of these `| None`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.backend import Backend

SHARED = ("model", "target", "folder", "feeds", "reference")
"""Parameters of `Backend.lower` that are no options."""

TYPES = {"bool": bool, "int": int, "float": float, "str": str}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def options_of(backend: Backend) -> dict[str, str]:
    """The options of a backend by name, each with the name of its type."""
    found = {}
    for name, parameter in inspect.signature(backend.lower).parameters.items():
        if name in SHARED or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind = parameter.annotation if isinstance(parameter.annotation, str) else parameter.annotation.__name__
        found[name] = kind.removesuffix("| None").strip()
    return found


def takes_reference(backend: Backend) -> bool:
    """Whether the `lower` of a backend wants the model before the target prepared it, too."""
    return "reference" in inspect.signature(backend.lower).parameters


def check_options(backend: Backend, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as the backend takes them; text is read as the type that the option has.

    Args:
        backend: whose options.
        given: by name; None and False mean: not given.

    Raises:
        UsageError: the backend has no such option, or the value is of another type.
    """
    known = options_of(backend)
    made = {}
    for name, value in given.items():
        if value is None or value is False:
            continue
        if name not in known:
            listed = ", ".join(known) or "none"
            raise UsageError(
                f"backend {backend.name!r} has no such option", where=name, hint=f"leave it out (its options: {listed})"
            )
        made[name] = _typed(name, value, known[name])
    return made


def assignments(texts: Sequence[str], given: Mapping[str, Any], reserved: Collection[str]) -> dict[str, Any]:
    """Options that have a place of their own on the command line, and those that were given as NAME=VALUE.

    Args:
        texts: NAME=VALUE.
        given: the former, by name; None and False mean: not given.
        reserved: names that are no options of a backend.

    Raises:
        UsageError: a text is not of that form, or names an option twice, or what is none.
    """
    found = {name: value for name, value in given.items() if value is not None and value is not False}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"{text!r} is not NAME=VALUE", where="--set", hint="write it as in --set tune=600")
        if name in reserved:
            raise UsageError("is no option of a backend", where=name, hint="see `graphopt lower --help`")
        if name in found:
            raise UsageError(f"{name} is given twice", where="--set", hint="give it once")
        found[name] = value.strip()
    return found


def _typed(name: str, value: Any, kind: str) -> Any:
    wanted = TYPES[kind]
    if isinstance(value, str) and wanted is not str:
        try:
            return WORDS[value.lower()] if wanted is bool else wanted(value)
        except (KeyError, ValueError):
            raise UsageError(f"{value!r} is no {kind}", where=name, hint="correct the value") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UsageError(f"{value!r} is no {kind}", where=name, hint="correct the value")
    return value
