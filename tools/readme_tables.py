"""Write the tables of passes and targets in README.md anew, from the registry.

python tools/readme_tables.py            # rewrite
python tools/readme_tables.py --check    # exit 1 where they are out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from graphopt import registry
from graphopt.pipeline.describe import describe

README = Path(__file__).resolve().parent.parent / "README.md"


def passes_table() -> str:
    rows = ["| pass | effect | what it does |", "|---|---|---|"]
    for name in registry.passes():
        found = describe(registry.pass_class(name))
        effect = found.effect + (", needs data" if found.needs_calibration else "")
        rows.append(f"| `{name}` | {effect} | {found.summary} |")
    return "\n".join(rows)


def targets_table() -> str:
    rows = ["| target | backend | architecture | what it is | int8 | channels |", "|---|---|---|---|---|---|"]
    for name, target in registry.targets().items():
        quant = target.quant
        scheme = "no" if quant is None else f"{quant.activation} x {quant.weight}"
        rows.append(
            f"| `{name}` | {target.backend} | {target.arch} | {target.description} | {scheme} "
            f"| multiples of {target.channel_multiple} |"
        )
    return "\n".join(rows)


def updated(text: str) -> str:
    """The text with both tables, which stand between marker comments, replaced."""
    for name, table in (("passes", passes_table()), ("targets", targets_table())):
        begin, end = f"<!-- {name}: tools/readme_tables.py -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            sys.exit(f"README.md lacks {begin!r} or {end!r}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if arguments.check:
        sys.exit(0 if old == new else "README.md is out of date: run python tools/readme_tables.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
