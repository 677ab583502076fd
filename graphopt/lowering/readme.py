"""README.md and bench.sh of a bundle, rendered from its manifest: the same for every backend."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = "bench.sh"
README = "README.md"
OURS = {
    "manifest.json": "what is in here: hashes, inputs and outputs, versions, pipeline, measured numbers",
    BENCH: "times the model on the device",
    README: "this file",
}


def write_bench(stage: Path, manifest: Mapping[str, Any]) -> None:
    """Write bench.sh, unless the backend wrote its own."""
    path = stage / BENCH
    if path.exists():
        return
    words = [_in_folder(word, stage) for word in manifest["bench"]]
    path.write_text(
        "#!/bin/sh\n"
        f"# Time the model of this folder on this device; arguments go to: {shlex.join(manifest['bench'])}\n"
        "set -eu\n"
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)\n'
        f'exec {" ".join(words)} "$@"\n',
        encoding="utf-8",
    )


def _in_folder(word: str, stage: Path) -> str:
    if word == "python3":
        return '"${PYTHON:-python3}"'
    if word.startswith("./") or (stage / word).is_file():
        return f'"$here"/{shlex.quote(word.removeprefix("./"))}'
    return shlex.quote(word)


def write_readme(stage: Path, manifest: Mapping[str, Any]) -> None:
    """Write README.md."""
    (stage / README).write_text(render(stage, manifest), encoding="utf-8")


def render(stage: Path, manifest: Mapping[str, Any]) -> str:
    """The text of README.md; `stage` is the folder with the files."""
    target = manifest["target"]
    files = sorted({p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file()} | OURS.keys())
    about = {**OURS, **manifest["about"]}
    parts = [
        f"# {_title(manifest)} for {target['name']}",
        f"{target.get('description', '')}".strip(),
        "## Run",
        manifest["guide"].strip(),
        _code(f"{shlex.join(manifest['run'])} in.npz out.npz", _bench(stage)),
        "Keys of `in.npz` are the names of the inputs, keys of `out.npz` those of the outputs.",
        _list("On the device it needs:", manifest["needs"]),
        "## Inputs and outputs",
        _table(
            ("", "name", "type", "shape"),
            [(kind[:-1], f"`{v['name']}`", v["dtype"], _shape(v["shape"]))
             for kind in ("inputs", "outputs") for v in manifest[kind]],
        ),
        "## Files",
        _table(("file", "what it is"), [(f"`{name}`", about.get(name, "")) for name in files]),
        "## Measured",
        "\n".join(f"- {line}" for line in _figures(manifest)),
        "## How it was made",
        "\n".join(f"- {line}" for line in _history(manifest)),
        _list("## Limits", [*manifest["warnings"], *manifest["limits"]]),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _bench(stage: Path) -> str:
    """How bench.sh is called; one of a backend that does not run without inputs says so in its usage."""
    path = stage / BENCH
    wants = path.exists() and f"usage: {BENCH} in.npz" in path.read_text(encoding="utf-8")
    return f"sh {BENCH}{' in.npz' if wants else ''}"


def _title(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"] or {}
    name = source.get("name") or manifest["report"].get("model")
    return f"`{Path(name).name}`" if name else "A model"


def _figures(manifest: Mapping[str, Any]) -> list[str]:
    return [*_time(manifest["measured"]), _difference(manifest["verified"]), *_reported(manifest["report"])]


def _time(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return ["Time: not measured here; `bench.sh` measures it on the device."]
    where = measured.get("device") or measured.get("processor") or "this machine"
    threads = measured.get("threads", 1)
    at = f"{threads} thread" if threads == 1 else f"{threads} threads"
    first = f"Time: {measured['latency_ms']:.3g} ms a run ({measured['inputs']} inputs, {at}, {where})."
    told = {"latency_ms", "rounds", "threads", "batch", "inputs", "device", "processor", "machine", "cores", "system"}
    if "ratio_to_onnxruntime" in measured:
        told |= {"ratio_to_onnxruntime", "onnxruntime_ms"}
        first += (
            f" ONNX Runtime takes {measured['onnxruntime_ms']:.3g} ms for the model as it was given: this bundle takes "
            f"{measured['ratio_to_onnxruntime']:.3g} times as long."
        )
    more = [f"{k}: {_number(v)}" for k, v in measured.items() if k not in told and isinstance(v, (int, float))]
    return [first, *more]


def _difference(verified: Mapping[str, Any] | None) -> str:
    if verified is None:
        return "Difference to the model: not compared (`graphopt lower --verify` does)."
    return (
        f"Difference to the model: {verified['relative']:.2g} relative (cosine similarity {verified['cosine']:.6g}). "
        f"Run on {_inputs(verified['feeds'], verified['inputs'])}: {verified['ran']}. "
        f"Compared with the model by {verified['reference']}."
    )


def _inputs(count: int, kind: str) -> str:
    return f"{count} {kind} input{'' if count == 1 else 's'}"


def _reported(report: Mapping[str, Any]) -> list[str]:
    """Accuracy, fidelity and latency of the run that made the model, as far as they were measured."""
    lines = []
    accuracy, fidelity, latency = (report.get(key) or {} for key in ("accuracy", "fidelity", "latency"))
    if accuracy.get("after") is not None:
        before = f", before the optimisation {accuracy['before']:.4g}" if accuracy.get("before") is not None else ""
        lines.append(f"Accuracy ({accuracy['metric']}): {accuracy['after']:.4g}{before}.")
    if fidelity.get("cosine") is not None:
        lines.append(
            f"Fidelity of the optimised model to the one before: cosine similarity {fidelity['cosine']:.6g} "
            f"({fidelity['data']} inputs)."
        )
    if latency.get("ratio") is not None:
        lines.append(
            f"Latency of the optimised model over the one before: {latency['ratio']:.3g} "
            f"(quartiles {latency['low']:.3g} to {latency['high']:.3g}, {latency['rounds']} pairs)."
        )
    return lines


def _history(manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    if manifest["source"]:
        lines.append(f"From `{manifest['source']['name']}` (sha256 {manifest['source']['sha256'][:16]}).")
    pipeline = manifest["pipeline"]
    if pipeline["optimize"]:
        lines.append(f"Optimised with `{pipeline['optimize']}`.")
    for step in pipeline["prepare"]:
        cost = f", relative difference {step['relative']:.2g}" if step["relative"] is not None else ""
        lines.append(f"Prepared for the target with `{step['pass']}`: {step['status']}{cost}.")
    if manifest["calibration"]:
        lines.append(f"Data: {manifest['calibration']['name']} (sha256 {manifest['calibration']['sha256'][:16]}).")
    lines.append("With " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()) + ".")
    return lines


def _shape(shape: Sequence[int | str | None] | None) -> str:
    return "any" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(*lines: str) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _list(head: str, items: Sequence[str]) -> str:
    return "\n".join([head, "", *(f"- {item}" for item in items)]) if items else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
