"""Write docs/operators.md anew, from the operator rules.

python tools/operator_table.py            # rewrite
python tools/operator_table.py --check    # exit 1 where it is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from graphopt.analysis.operators import FROZEN, Operator, operators

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operators.md"
HEAD = """# Operators

What becomes of removable units at each operator: which positions live and die together, and where they have to stay.
Written by `tools/operator_table.py` from the rules in `graphopt/analysis/ops/`; the family is the file.

- **frozen**: nothing that the operator touches is removed, for the reason given. `graphopt inspect MODEL --units`
  repeats it with the name of the node.
- **counted**: its multiply-accumulates enter the cost of a unit.
- **rewritten**: sizes in its attributes or constants change with what is removed.
- An operator that is not listed freezes what it touches, with "no rule for domain::operator" as the reason.
"""
_DOMAINS = {"": "ONNX", "com.microsoft": "ONNX Runtime (com.microsoft)"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for domain in sorted({operator.domain for operator in operators()}):
        parts.append(f"\n## {_DOMAINS.get(domain, domain)}\n\n| operator | family | units | |\n|---|---|---|---|\n")
        parts += [_row(operator) for operator in operators() if operator.domain == domain]
    return "".join(parts)


def _row(operator: Operator) -> str:
    family = f"**{FROZEN}**" if operator.family == FROZEN else operator.family
    marks = [word for word, told in (("counted", operator.counted), ("rewritten", operator.rewritten)) if told]
    return f"| `{operator.name}` | {family} | {operator.units.replace('|', '&#124;')} | {', '.join(marks)} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args()
    current = PAGE.read_text("utf-8") if PAGE.is_file() else ""
    if current == page():
        return 0
    if arguments.check:
        print(f"{PAGE} is out of date: run python tools/operator_table.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
