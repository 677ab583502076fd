"""The shared models as subjects of a comparison: what calibrates and what measures them, and the shapes they run on.

Labelled models have their own metric (top-1, Spearman, perplexity, agreement), on data that calibration never saw. The
others are measured by the signal-to-noise ratio of their worst output to the model as it came. Where a model comes with
one or two samples, these both calibrate and measure, which flatters every tool alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import transformers as text
from cifar import DATA

from graphopt.executor import Session

Feeds = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        file: the model.
        calibration: unlabelled calls, anew every time.
        metric: name of the score and of its unit.
        score: measures a model file.
        shapes: one call of each shape that is timed, by its name.
    """

    file: Path
    calibration: Callable[[], Iterable[Feeds]]
    metric: str
    score: Callable[[Path], float]
    shapes: dict[str, Feeds]


def subject(name: str) -> Subject:
    """One of the shared models, by the stem of its file."""
    file = DATA / "models" / f"{name}.onnx"
    if name.startswith("resnet"):
        x, labels = cifar.images("test")
        shapes = {f"batch {n}": {"input": x[:n]} for n in (1, 32)}
        return Subject(file, cifar.calibration, "top-1, %", lambda path: 100 * top1(path, x, labels), shapes)
    if name == "minilm_l6":
        sizes = {"16 tokens": (1, 16), "40 tokens": (1, 40), "batch 32 x 40": (32, 40)}
        return Subject(
            file, text.sentences, "Spearman", text.spearman, {k: _sentences(*size) for k, size in sizes.items()}
        )
    if name == "stories260k":
        shapes = {f"{n} tokens": {"input_ids": _story()[:, :n]} for n in (16, 256)}
        return Subject(file, text.stories, "perplexity", text.perplexity, shapes)
    if name == "stories260k_kv":
        return _by_noise(file, steps(file, "calib"), steps(file, "eval"))
    if name == "magika_v3_3":
        with np.load(DATA / "inputs" / f"{name}_labelled.npz") as stored:
            content, reference = stored["bytes"], stored["reference"]
        seen = [{"bytes": row[None]} for row in content[::2]]
        return Subject(
            file, lambda: seen, "agreement, %", lambda path: agreement(path, content[1::2], reference[1::2]),
            {"batch 1": seen[0]},
        )  # fmt: skip
    calls = samples(DATA / "inputs" / f"{name}.npz")
    return _by_noise(file, calls, calls)


def names() -> list[str]:
    """All shared models."""
    return sorted(path.stem for path in (DATA / "models").glob("*.onnx"))


def samples(path: Path) -> list[Feeds]:
    """Calls of a file with keys `<sample>|<input>`."""
    with np.load(path) as stored:
        order = sorted({key.split("|")[0] for key in stored.files}, key=int)
        return [{k.split("|", 1)[1]: stored[k] for k in stored.files if k.split("|")[0] == s} for s in order]


def steps(file: Path, split: str) -> list[Feeds]:
    """Steps of a language model with a cache: the first eight words of a story at once, then one at a time."""
    found = []
    with np.load(DATA / "lm" / "stories260k_tokens.npz") as stored, Session(file, optimize=True) as session:
        for tokens in stored[split].astype(np.int64)[:4]:
            past = np.zeros((5, 2, 1, 4, 0, 8), np.float32)
            for start, stop in [(0, 8), *((i, i + 1) for i in range(8, 40))]:
                call = {"input_ids": tokens[None, start:stop], "past": past}
                past = session.run(call)["present"]
                found.append(call)
    return found


def top1(path: Path, x: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Share of images that are classified rightly."""
    with Session(path, optimize=True) as session:
        name = session.inputs[0].name
        found = [next(iter(session.run({name: x[i : i + 250]}).values())) for i in range(0, len(x), 250)]
    return float((np.concatenate(found).argmax(axis=1) == labels).mean())


def agreement(path: Path, content: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """Percentage of files that are taken for what the reference takes them for."""
    with Session(path, optimize=True) as session:
        found = next(iter(session.run({"bytes": content}).values()))
    return float(100 * (found.argmax(axis=1) == reference).mean())


def sqnr(reference: Path, path: Path, calls: Sequence[Feeds]) -> float:
    """Signal-to-noise ratio in dB of the worst floating-point output over all calls; inf where nothing differs."""
    power: dict[str, np.ndarray[Any, Any]] = {}
    with Session(reference, optimize=True) as first, Session(path, optimize=True) as second:
        for call in calls:
            wanted, found = first.run(call), second.run(call)
            for name, want in wanted.items():
                if want.dtype.kind == "f":
                    exact = want.astype(np.float64)
                    sums = [np.sum(exact**2), np.sum((found[name] - exact) ** 2)]
                    power[name] = power.get(name, np.zeros(2)) + sums
    ratios = [signal / noise if noise else np.inf for signal, noise in power.values()]
    return float(10 * np.log10(min(ratios)))


def _by_noise(file: Path, calibration: list[Feeds], measured: list[Feeds]) -> Subject:
    shapes = {"as sampled": calibration[-1]}
    return Subject(file, lambda: calibration, "SQNR, dB", lambda path: sqnr(file, path, measured), shapes)


def _sentences(rows: int, tokens: int) -> Feeds:
    """Real sentences of at least so many tokens, cut."""
    with np.load(DATA / "sts" / "calib1024.npz") as stored:
        ids, mask = stored["ids"].astype(np.int64), stored["mask"].astype(np.int64)
    order = np.argsort(-mask.sum(axis=1), kind="stable")[:rows]
    return {"input_ids": ids[order, :tokens], "attention_mask": mask[order, :tokens]}


def _story() -> np.ndarray[Any, Any]:
    """The longest calibration story, [1, tokens]."""
    return max((np.asarray(call["input_ids"]) for call in text.stories()), key=lambda ids: ids.shape[1])


def limited(calls: Iterable[Feeds], most: int) -> Iterator[Feeds]:
    """At most so many samples; a call of many rows counts as many."""
    seen = 0
    for call in calls:
        if seen >= most:
            return
        yield call
        seen += max((len(a) for a in call.values() if getattr(a, "ndim", 0) > 1), default=1)
