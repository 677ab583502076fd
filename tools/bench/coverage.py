"""Every network of the zoo through graphopt and its peers: what runs, what is exact at half the width, how much goes.

    python tools/bench/coverage.py --peer-python VENV/bin/python [NETWORK ...]

VENV holds torch, torch-pruning, onnxsim and onnxruntime; without it the peers' columns are empty. Prints one table:

- graphopt, for each of torch's exporters: the share of the parameters that belong to an EXACT unit, the share that
  leaves with half of the units of every layer, and the certificate's difference where it does not hold.
- torch-pruning: half the width of the module, group by group; the share that leaves, and the largest change of an
  output by taking a group whose producers had been zeroed before (see peer_torch_pruning.py).
- onnxsim.pruning: half the width of the exported file (dynamo's, else TorchScript's) in which three fifths of the EXACT
  units of every layer are zero; the share that leaves, and the change of an output (see peer_onnxsim.py). Empty where
  graphopt knows no units to zero.

"Exact" is a relative difference of at most 1e-5 for all. With both sides of every layer halved, three quarters leave.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

import numpy as np
from zoo.architecture import Architecture
from zoo.export import EXPORTERS
from zoo.measure import analysed, families, half, proof, reach

from graphopt.analysis.certificate import TOLERANCE, spare_axes, zero_units
from graphopt.analysis.cost import model_stats
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling
from graphopt.model import save
from zoo import ZOO

CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "zoo"
HERE = Path(__file__).resolve().parent
PEERS = ("torch-pruning", "onnxsim.pruning")


def ours(architecture: Architecture, exporter: str) -> dict[str, Any]:
    """Reach, removed share and certificate of one exported file."""
    if exporter in architecture.cannot_export:
        return {}
    try:
        coupling = analysed(architecture, exporter, CACHE)
        if not any(unit.exact for unit in coupling.units):
            return {"reach": 0.0, "removed": 0.0, "difference": 0.0}
        small = coupling.model.clone()
        remove_units(small, coupling, half(coupling, 1))
        removed = 1 - model_stats(small).parameters / model_stats(coupling.model).parameters
        return {"reach": reach(coupling), "removed": removed, "difference": proof(architecture, coupling).difference}
    except Exception as error:  # a crash is a finding of this table
        return {"error": f"{type(error).__name__}: {error}"}


def mostly_zero(coupling: Coupling, seed: int) -> set[int]:
    """Three fifths of the EXACT units of every family, rounded up, but never all."""
    random = np.random.default_rng(seed)
    dead: set[int] = set()
    for family in families(coupling):
        exact = [unit.id for unit in family if unit.exact]
        dead.update(random.permutation(exact)[: min(-(-len(exact) * 3 // 5), len(exact) - 1)].tolist())
    return spare_axes(coupling, dead)


def write_for_onnxsim(architectures: Iterable[Architecture], folder: Path) -> list[str]:
    """Files with zeroed units, and inputs; the names of those that could be written."""
    names = []
    for architecture in architectures:
        exporter = next(name for name in EXPORTERS if name not in architecture.cannot_export)
        try:
            coupling = analysed(architecture, exporter, CACHE)
            dead = mostly_zero(coupling, 1)
            if not dead:
                continue
            zeroed = coupling.model.clone()
            zero_units(zeroed, coupling, dead)
        except Exception as error:
            print(f"{architecture.name}: {error}", file=sys.stderr)
            continue
        save(zeroed, folder / f"{architecture.name}.onnx")
        np.savez(folder / f"{architecture.name}.npz", **architecture.feeds(1))
        names.append(architecture.name)
    return names


def ask(python: Path, script: str, names: list[str], *arguments: str) -> dict[str, dict[str, Any]]:
    """A peer's lines by network. A peer that dies or hangs is started again after the network that it died on."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(names):
        rest = [name for name in names if name not in found]
        command = [str(python), str(HERE / script), *arguments, *rest]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * len(rest), check=False)
            lines, end = done.stdout, f"died with code {done.returncode}: {done.stderr[-200:]}"
        except subprocess.TimeoutExpired as stuck:
            lines, end = (stuck.stdout or b"").decode(), "did not end"
        for line in lines.splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                found[entry.pop("network")] = entry
        if len(found) < len(names) and not any(name in found for name in rest[-1:]):
            found[next(name for name in rest if name not in found)] = {"error": end}
    return found


def cell(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    if "error" in entry:
        return f"fails: {entry['error'].splitlines()[0][:60]}".replace("|", "/")
    share = f"{entry['removed']:.0%}" if "reach" not in entry else f"{entry['removed']:.0%} of {entry['reach']:.0%}"
    if not entry["removed"]:
        return "nothing"
    return share if entry["difference"] <= TOLERANCE else f"{share}, **inexact {entry['difference']:.0e}**"


def totals(columns: dict[str, dict[str, dict[str, Any]]]) -> None:
    for name, entries in columns.items():
        ran = [entry for entry in entries.values() if entry and "error" not in entry]
        touched = [entry for entry in ran if entry["removed"]]
        exact = sum(entry["difference"] <= TOLERANCE for entry in touched)
        mean = np.mean([entry["removed"] for entry in touched]) if touched else 0.0
        asked = sum(bool(entry) for entry in entries.values())
        print(
            f"- {name}: {asked} asked, {len(ran)} ran, {len(touched)} changed, {exact} of these exact; {mean:.0%} gone"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with the peers")
    options = parser.parse_args()
    chosen = [ZOO[name] for name in options.networks] or list(ZOO.values())
    columns = {f"graphopt, {exporter}": {a.name: ours(a, exporter) for a in chosen} for exporter in EXPORTERS}
    if options.peer_python:
        with tempfile.TemporaryDirectory() as scratch:
            zeroed = write_for_onnxsim(chosen, Path(scratch))
            modules = [architecture.name for architecture in chosen]
            columns[PEERS[0]] = ask(options.peer_python, "peer_torch_pruning.py", modules)
            columns[PEERS[1]] = ask(options.peer_python, "peer_onnxsim.py", zeroed, scratch)
    print(f"| network | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for architecture in chosen:
        print(f"| {architecture.name} | {' | '.join(cell(c.get(architecture.name)) for c in columns.values())} |")
    print()
    totals(columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
