"""Values of pass options: from written text to the type of the dataclass field, and back without loss.

Types understood: int, float, bool, str, Literal, tuple[X, ...], tuple[X, Y], Optional and unions of these. A written
value is *bare* (`0.5`, `true`, `none`, `conv1`), *quoted* (`'a, b'`, always a string) or a *tuple* (`(1,2)`).
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from graphopt.base import Pass
from graphopt.errors import UsageError


@dataclass(frozen=True)
class Written:
    """A value as it was written.

    Attributes:
        kind: "bare", "quoted", "tuple", or "number" for a bare word that TOML already found not to be a string.
        text: the word, or the content of the quotes.
        items: the members of a tuple.
        position: offset in the source text, for error messages.
    """

    kind: Literal["bare", "number", "quoted", "tuple"]
    text: str = ""
    items: tuple[Written, ...] = ()
    position: int = 0


class Mismatch(ValueError):
    """A written value that does not fit the type of its option; `position` is where it stands."""

    def __init__(self, what: str, position: int) -> None:
        self.position = position
        super().__init__(what)


_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|inf)")
_NOT_FITTING = object()
_RANK: dict[Any, int] = {type(None): 0, bool: 1, int: 2, float: 3, str: 5}


def option_types(kind: type[Pass]) -> dict[str, Any]:
    """The annotated type of each option of a pass, by field name.

    Raises:
        UsageError: an annotation cannot be resolved or is of a kind that has no written form.
    """
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise UsageError(
            f"its annotations cannot be read: {error}", where=f"pass {kind.name!r}", hint="correct the pass"
        ) from error
    found = {f.name: hints[f.name] for f in fields(kind) if f.init}
    for name, annotation in found.items():
        for part in _leaves(annotation):
            if part not in (int, float, bool, str, type(None)) and typing.get_origin(part) is not Literal:
                raise UsageError(
                    f"type {type_name(annotation)} has no written form",
                    where=f"option {kind.name}.{name}",
                    hint="use int, float, bool, str, Literal, tuples and Optional of these",
                )
    return found


def default_of(kind: type[Pass], name: str) -> Any:
    """The default of an option; `dataclasses.MISSING` where it must be given."""
    found = next(f for f in fields(kind) if f.name == name)
    return found.default_factory() if found.default_factory is not MISSING else found.default


def type_name(annotation: Any) -> str:
    """An annotation as the help shows it: `float or none`, `'a' | 'b'`, `(int, ...)`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is Literal:
        return " | ".join(a if isinstance(a, str) else _scalar(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(a) for a in arguments)
    if origin is tuple:
        return f"({', '.join('...' if a is Ellipsis else type_name(a) for a in arguments)})"
    return getattr(annotation, "__name__", str(annotation))


def read_value(written: Written, annotation: Any) -> Any:
    """The value of type `annotation` that was written.

    Raises:
        Mismatch: it is of another type.
    """
    value = _fit(written, annotation)
    if value is _NOT_FITTING:
        shown = repr(written.text) if written.kind == "quoted" else written.text or "a tuple"
        advice = ""
        if typing.get_origin(annotation) is tuple and written.kind != "tuple":
            advice = f" (write ({written.text}))"
        if written.kind == "tuple":
            _blame_member(written, annotation)
        raise Mismatch(f"{shown} is not {type_name(annotation)}{advice}", written.position)
    return value


def write_value(value: Any, annotation: Any) -> str:
    """The shortest text that `read_value` turns into exactly `value`.

    Raises:
        Mismatch: the value is not of the annotated type, so no text gives it.
    """
    for text, written in _spellings(value, annotation):
        back = _fit(written, annotation)
        if back is not _NOT_FITTING and _same(back, value):
            return text
    raise Mismatch(f"{value!r} is not {type_name(annotation)}", 0)


def _leaves(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (tuple, types.UnionType, typing.Union):
        for part in typing.get_args(annotation):
            if part is not Ellipsis:
                yield from _leaves(part)
    else:
        yield annotation


def _fit(written: Written, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        # From the type that takes the fewest bare words to str, which takes all: what a later one loses can be quoted.
        for part in sorted(arguments, key=lambda a: _RANK.get(a, len(_RANK) - 1)):
            value = _fit(written, part)
            if value is not _NOT_FITTING:
                return value
        return _NOT_FITTING
    if origin is tuple:
        return _fit_tuple(written, arguments)
    if written.kind == "tuple":
        return _NOT_FITTING
    if origin is Literal:
        return _fit_literal(written, arguments)
    if annotation is str:
        return _NOT_FITTING if written.kind == "number" else written.text
    if written.kind == "quoted":
        return _NOT_FITTING
    if annotation is type(None):
        return None if written.text.lower() == "none" else _NOT_FITTING
    if annotation is bool:
        return {"true": True, "false": False}.get(written.text.lower(), _NOT_FITTING)
    if annotation is int:
        return int(written.text) if _INT.fullmatch(written.text) else _NOT_FITTING
    if annotation is float:
        return float(written.text) if _FLOAT.fullmatch(written.text) else _NOT_FITTING
    return _NOT_FITTING


def _fit_literal(written: Written, choices: tuple[Any, ...]) -> Any:
    for choice in sorted(choices, key=lambda c: isinstance(c, str)):
        if isinstance(choice, str):
            if written.kind != "number" and written.text == choice:
                return choice
        elif written.kind != "quoted" and written.text.lower() == _scalar(choice):
            return choice
    return _NOT_FITTING


def _fit_tuple(written: Written, arguments: tuple[Any, ...]) -> Any:
    kinds = _member_types(written, arguments)
    if written.kind != "tuple" or kinds is None:
        return _NOT_FITTING
    values = tuple(_fit(item, kind) for item, kind in zip(written.items, kinds, strict=True))
    return _NOT_FITTING if any(v is _NOT_FITTING for v in values) else values


def _member_types(written: Written, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return (arguments[0],) * len(written.items)
    return arguments if len(arguments) == len(written.items) else None


def _blame_member(written: Written, annotation: Any) -> None:
    """Raise for the member of a tuple that does not fit, or for the wrong length."""
    if typing.get_origin(annotation) is not tuple:
        raise Mismatch(f"a tuple is not {type_name(annotation)}", written.position)
    kinds = _member_types(written, typing.get_args(annotation))
    if kinds is None:
        raise Mismatch(f"{len(written.items)} members do not fit {type_name(annotation)}", written.position)
    for item, kind in zip(written.items, kinds, strict=True):
        read_value(item, kind)


def _spellings(value: Any, annotation: Any) -> Iterator[tuple[str, Written]]:
    """Candidate texts for a value, the plainest first, with what the parser would make of each."""
    if isinstance(value, tuple):
        kinds: list[Any] = []
        for part in _unions(annotation):
            if typing.get_origin(part) is tuple:
                blank = Written("tuple", items=(Written("bare"),) * len(value))
                kinds.append(_member_types(blank, typing.get_args(part)))
        for members in (k for k in kinds if k is not None):
            pairs = [next(_exact(v, kind), None) for v, kind in zip(value, members, strict=True)]
            if all(pair is not None for pair in pairs):
                chosen = [pair for pair in pairs if pair is not None]
                inner = ",".join(text for text, _ in chosen)
                text = f"({inner},)" if len(chosen) == 1 else f"({inner})"
                yield text, Written("tuple", items=tuple(w for _, w in chosen))
        return
    if isinstance(value, str):
        if BARE.fullmatch(value):
            yield value, Written("bare", value)
        yield quote(value), Written("quoted", value)
        return
    yield _scalar(value), Written("bare", _scalar(value))


def _exact(value: Any, annotation: Any) -> Iterator[tuple[str, Written]]:
    for text, written in _spellings(value, annotation):
        back = _fit(written, annotation)
        if back is not _NOT_FITTING and _same(back, value):
            yield text, written


def _unions(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        for part in typing.get_args(annotation):
            yield from _unions(part)
    else:
        yield annotation


BARE = re.compile(r"[^\s,{}()='\"]+")
"""A word that needs no quotes."""


def quote(text: str) -> str:
    """Text in double quotes with JSON escapes; what `graphopt.spec` reads back as the same text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, int):
        return str(int(value))
    return str(value)


def _same(a: Any, b: Any) -> bool:
    """Equal, and no bool taken for a number or number for a string on the way."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
