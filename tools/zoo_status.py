"""What the analysis reaches of every network of the zoo: python tools/zoo_status.py [--expect] [NETWORK ...]

Prints a table: units, how many are EXACT, the reachable share of the parameters, the certificate at half of all units,
axes that should be prunable and are not, and the commonest reasons of frozen axes; then the crashes. With --expect it
prints the figures of tests/zoo/expected.toml instead. Exported files are kept in --cache.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "models"))

from zoo.architecture import Architecture
from zoo.export import EXPORTERS
from zoo.measure import analysed, frozen_axes, proof, reach

from graphopt.analysis.units import Coupling
from graphopt.report.units import frozen_rows
from zoo import ZOO

CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "d" / "zoo"
HEAD = "| network | exporter | units (exact) | reach (exact) | certificate | control | not prunable | frozen because |"


def reasons(coupling: Coupling, count: int = 5) -> str:
    """The reasons that freeze most positions."""
    rows = frozen_rows(coupling.frozen)[:count]
    return "; ".join(f"{row['units']}x {row['reason']}"[:110] for row in rows).replace("|", "/")


def row(architecture: Architecture, exporter: str, cache: Path) -> str:
    coupling = analysed(architecture, exporter, cache)
    exact = sum(unit.exact for unit in coupling.units)
    cells = [architecture.name, exporter, f"{len(coupling.units)} ({exact})"]
    cells.append(f"{reach(coupling, exact=False):.0%} ({reach(coupling):.0%})")
    certificate = proof(architecture, coupling) if exact else None
    if certificate is None:
        cells += ["", ""]
    else:
        verdict = "" if certificate.holds else "FAILS "
        control = certificate.control
        cells += [f"{verdict}{certificate.difference:.0e}", "" if control is None else f"{control:.0e}"]
    lost = [name for name, length in architecture.axes.items() if frozen_axes(coupling, length)]
    return f"| {' | '.join([*cells, ', '.join(lost), reasons(coupling)])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--expect", action="store_true")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    chosen = [ZOO[name] for name in options.networks] or list(ZOO.values())
    crashes: list[str] = []
    if not options.expect:
        print(f"{HEAD}\n|{'---|' * 8}")
    for architecture in chosen:
        least: list[str] = []
        for exporter in EXPORTERS:
            if exporter in architecture.cannot_export:
                if not options.expect:
                    print(
                        f"| {architecture.name} | {exporter} | not exported: {architecture.cannot_export[exporter]} |"
                    )
                continue
            try:
                if options.expect:
                    share = math.floor(100 * reach(analysed(architecture, exporter, options.cache))) / 100
                    least.append(f"{exporter} = {share:.2f}")
                else:
                    print(row(architecture, exporter, options.cache), flush=True)
            except Exception as error:
                frames = "".join(traceback.format_tb(error.__traceback__)[-6:])
                crashes.append(
                    f"## {architecture.name} {exporter}\n\n{frames}{type(error).__name__}: {str(error)[:600]}"
                )
                print(f"| {architecture.name} | {exporter} | CRASH {type(error).__name__}: {str(error)[:200]!r} |")
        if options.expect:
            print(f"{architecture.name} = {{ {', '.join(least)} }}")
    if crashes:
        print("\n# Crashes\n\n(python tools/zoo_status.py NETWORK)\n")
        print("\n".join(crashes))
    return int(bool(crashes))


if __name__ == "__main__":
    sys.exit(main())
