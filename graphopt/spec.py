"""Pipelines as text: `'fold,prune{macs=0.5,exclude=(conv1,fc)},quantize'` <-> a tuple of passes.

    pipeline := [pass {"," pass}]
    pass     := name ["{" [option {"," option}] "}"]
    option   := field "=" value
    value    := word | "'" text "'" | '"' text '"' | "(" [value {"," value}] ")"

Blanks between tokens mean nothing. In quotes the escapes of JSON hold. Recipe files are in `graphopt.pipeline.recipe`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn

from graphopt.base import Pass
from graphopt.errors import GraphoptError, UsageError
from graphopt.pipeline.options import (
    BARE,
    Mismatch,
    Written,
    default_of,
    option_types,
    read_value,
    type_name,
    write_value,
)
from graphopt.registry import pass_class, suggest

Resolve = Callable[[str], type[Pass]]


def parse(text: str, resolve: Resolve = pass_class) -> tuple[Pass, ...]:
    """The passes that a pipeline names, with their options set.

    Args:
        text: the pipeline; blank means no passes.
        resolve: finds the class of a pass by name.

    Raises:
        UsageError: wrong syntax, unknown pass or option, wrong type or range; shows the place with a caret.
    """
    reader = _Reader(text)
    made: list[Pass] = []
    reader.blanks()
    while not reader.at_end():
        made.append(_parse_pass(reader, resolve))
        reader.blanks()
        if reader.at_end():
            break
        reader.expect(",", "a comma between two passes")
        reader.blanks()
        if reader.at_end():
            reader.fail("a pass name is missing after the comma", reader.position)
    return tuple(made)


def to_spec(passes: Sequence[Pass]) -> str:
    """The pipeline as text; options that equal their default are left out. Inverse of `parse`.

    Raises:
        UsageError: an option holds a value that is not of its type.
    """
    return ",".join(_pass_text(p) for p in passes)


def make_pass(kind: type[Pass], values: dict[str, Any]) -> Pass:
    """Make a pass from typed option values.

    Raises:
        UsageError: an option that must be given is missing, or the pass refuses a value; names the pass.
    """
    for name in option_types(kind):
        if default_of(kind, name) is MISSING and name not in values:
            raise UsageError(
                f"option {name!r} must be given", where=f"pass {kind.name!r}", hint=f"see `graphopt passes {kind.name}`"
            )
    try:
        return kind(**values)
    except GraphoptError as error:
        if error.where is None or kind.name not in error.where:
            error.where = f"{kind.name}: {error.where}" if error.where else kind.name
        raise
    except (ValueError, TypeError) as error:
        shown = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise UsageError(
            f"{error} (given {shown})", where=kind.name, hint=f"see `graphopt passes {kind.name}`"
        ) from error


def unknown_option(kind: type[Pass], name: str) -> str:
    """What to say about an option that a pass does not have."""
    known = option_types(kind)
    if not known:
        return f"pass {kind.name!r} has no options"
    listing = f"its options are {', '.join(known)}"
    near = suggest(name, known, "").partition("? ")
    return f"pass {kind.name!r} has no option {name!r}; {near[0] + '? ' if near[1] else ''}{listing}"


def read_written(text: str) -> Written:
    """One value in the syntax of pipelines.

    Raises:
        UsageError: wrong syntax.
    """
    reader = _Reader(text)
    reader.blanks()
    written = _parse_value(reader)
    reader.blanks()
    if not reader.at_end():
        reader.fail("more text than one value", reader.position)
    return written


def _pass_text(p: Pass) -> str:
    parts = []
    for name, annotation in option_types(type(p)).items():
        value = getattr(p, name)
        try:
            text = write_value(value, annotation)
        except Mismatch as error:
            raise UsageError(
                str(error), where=f"{p.name}.{name}", hint=f"see `graphopt passes {p.name}` for its type"
            ) from error
        default = default_of(type(p), name)
        # Compared as text: 1 == True == 1.0 in Python, but they are different options.
        if default is MISSING or text != _default_text(default, annotation):
            parts.append(f"{name}={text}")
    return f"{p.name}{{{','.join(parts)}}}" if parts else p.name


def _default_text(default: Any, annotation: Any) -> str | None:
    try:
        return write_value(default, annotation)
    except Mismatch:
        return None


def _parse_pass(reader: _Reader, resolve: Resolve) -> Pass:
    start = reader.position
    name = reader.word("a pass name")
    try:
        kind = resolve(name)
    except UsageError as error:
        reader.fail(str(error), start)
    reader.blanks()
    values: dict[str, Any] = {}
    starts: dict[str, int] = {}
    if reader.peek() == "{":
        reader.position += 1
        values, starts = _parse_options(reader, kind)
    try:
        return make_pass(kind, values)
    except UsageError as error:
        # An error about one option points at its value.
        at = next((at for option, at in starts.items() if error.where == f"{kind.name}.{option}"), start)
        reader.fail(str(error), at)


def _parse_options(reader: _Reader, kind: type[Pass]) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of the options up to the closing brace, and where each value stands."""
    known = option_types(kind)
    values: dict[str, Any] = {}
    starts: dict[str, int] = {}
    while True:
        reader.blanks()
        if reader.peek() == "}":
            reader.position += 1
            return values, starts
        start = reader.position
        name = reader.word("an option name or '}'")
        if name not in known:
            reader.fail(unknown_option(kind, name), start)
        if name in values:
            reader.fail(f"option {name!r} is given twice", start)
        reader.blanks()
        reader.expect("=", f"'=' and a value for {name!r} ({type_name(known[name])})")
        reader.blanks()
        starts[name] = reader.position
        try:
            values[name] = read_value(_parse_value(reader), known[name])
        except Mismatch as error:
            reader.fail(f"{kind.name}.{name}: {error}", error.position)
        reader.blanks()
        if reader.peek() == ",":
            reader.position += 1
        elif reader.peek() != "}":
            reader.fail("expected ',' or '}'", reader.position)


def _parse_value(reader: _Reader) -> Written:
    start = reader.position
    char = reader.peek()
    if char in ("'", '"'):
        return Written("quoted", reader.quoted(), position=start)
    if char != "(":
        return Written("bare", reader.word("a value"), position=start)
    reader.position += 1
    items: list[Written] = []
    while True:
        reader.blanks()
        if reader.peek() == ")":
            reader.position += 1
            return Written("tuple", items=tuple(items), position=start)
        items.append(_parse_value(reader))
        reader.blanks()
        if reader.peek() == ",":
            reader.position += 1
        elif reader.peek() != ")":
            quoted = f"; quote a value that holds {reader.peek()!r}" if not reader.at_end() else ""
            reader.fail(f"expected ',' or ')'{quoted}", reader.position)


@dataclass
class _Reader:
    """A cursor over the text, and errors that show where it stands."""

    text: str
    position: int = 0

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def blanks(self) -> None:
        while self.peek().isspace():
            self.position += 1

    def expect(self, char: str, what: str) -> None:
        if self.peek() != char:
            self.fail(f"expected {what}", self.position)
        self.position += 1

    def word(self, what: str) -> str:
        found = BARE.match(self.text, self.position)
        if found is None:
            self.fail(f"expected {what}", self.position)
        self.position = found.end()
        return found.group()

    def quoted(self) -> str:
        start, mark = self.position, self.peek()
        end = start + 1
        while end < len(self.text) and self.text[end] != mark:
            end += 2 if self.text[end] == "\\" else 1
        if end >= len(self.text):
            self.fail(f"the quote {mark} is not closed", start)
        inner = self.text[start + 1 : end]
        if mark == "'":
            # JSON knows double quotes only: \' is ours, and a bare " inside single quotes needs its escape.
            inner = _requote(inner)
        try:
            value = json.loads(f'"{inner}"', strict=False)
        except ValueError as error:
            self.fail(f"wrong escape in the quoted text: {error}", start)
        self.position = end + 1
        return str(value)

    def fail(self, what: str, position: int) -> NoReturn:
        """Raise a UsageError whose last line is the cause, below the line of the text and a caret."""
        begin = self.text.rfind("\n", 0, position) + 1
        end = self.text.find("\n", position)
        line = self.text[begin : end if end >= 0 else len(self.text)]
        column = position - begin
        first = max(0, column - 60)
        shown = ("..." if first else "") + line[first : first + 100]
        caret = " " * (column - first + (3 if first else 0)) + "^"
        raise UsageError(f"in the pass list, column {position + 1}:\n  {shown}\n  {caret}\n{what}")


def _requote(inner: str) -> str:
    out, i = [], 0
    while i < len(inner):
        if inner[i] == "\\" and i + 1 < len(inner):
            out.append("'" if inner[i + 1] == "'" else inner[i : i + 2])
            i += 2
        else:
            out.append('\\"' if inner[i] == '"' else inner[i])
            i += 1
    return "".join(out)
