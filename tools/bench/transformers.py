"""What transformers keep when they are pruned: quality over the share of the encoder's parameters, as Markdown tables.

    python tools/bench/transformers.py                              both models, three shares, three ways
    python tools/bench/transformers.py stories --latency 0.9 0.75   budgets of measured latency
    python tools/bench/transformers.py minilm --onnxsim VENV/bin/python

minilm: sentence embeddings, Spearman's correlation on STS-B's test pairs; calibrated on 1024 other sentences.
stories: a language model, perplexity of 72 stories; calibrated on 24 others. Shares are those of the encoder: tables
that tokens are looked up in do not count. Latency: one thread, one sentence of 40 tokens, one story of 256, ratios to
the model as it came in one interleaved measurement. onnxsim's pruner has no budget: its sparsity (of hidden units and
heads) is bisected for the same number of parameters. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cifar import DATA

import graphopt
from graphopt import registry
from graphopt.executor import Session

Feeds = dict[str, Any]
WAYS = ("", "score=l2", "reconstruct=none", "score=l2,reconstruct=none")


def sentences() -> Iterator[Feeds]:
    """32 sentences of about the same length at a time, so that little is padded; lengths in random order."""
    with np.load(DATA / "sts" / "calib1024.npz") as data:
        ids, mask = data["ids"].astype(np.int64), data["mask"].astype(np.int64)
    order = np.argsort(mask.sum(axis=1), kind="stable").reshape(-1, 32)
    for rows in np.random.default_rng(0).permutation(order):
        longest = int(mask[rows].sum(axis=1).max())
        yield {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}


def stories() -> Iterator[Feeds]:
    """One story at a time, without padding."""
    with np.load(DATA / "lm" / "stories260k_tokens.npz") as data:
        for tokens, length in zip(data["calib"].astype(np.int64), data["calib_len"], strict=True):
            yield {"input_ids": tokens[None, :length]}


def embeddings(model: Any) -> list[np.ndarray[Any, Any]]:
    """Unit vectors [n, 384] of both sides of STS-B's test pairs."""
    with np.load(DATA / "sts" / "stsb_test.npz") as data, Session(model, optimize=True) as session:
        sides = []
        for side in "12":
            ids, mask = data[f"ids{side}"].astype(np.int64), data[f"mask{side}"].astype(np.int64)
            found = []
            for start in range(0, len(ids), 64):
                part, longest = slice(start, start + 64), int(mask[start : start + 64].sum(axis=1).max())
                feeds = {"input_ids": ids[part, :longest], "attention_mask": mask[part, :longest]}
                found.append(next(iter(session.run(feeds).values())))
            sides.append(np.concatenate(found))
        return sides


def spearman(model: Any) -> float:
    """Rank correlation of cosine similarities with people's judgement."""
    from scipy.stats import spearmanr

    first, second = embeddings(model)
    with np.load(DATA / "sts" / "stsb_test.npz") as data:
        return float(spearmanr((first * second).sum(axis=1), data["score"]).statistic)


def perplexity(model: Any) -> float:
    """Of the evaluation stories, token by token."""
    from scipy.special import log_softmax

    total = count = 0.0
    with np.load(DATA / "lm" / "stories260k_tokens.npz") as data, Session(model, optimize=True) as session:
        for tokens, length in zip(data["eval"].astype(np.int64), data["eval_len"], strict=True):
            logits = next(iter(session.run({"input_ids": tokens[None]}).values()))[0, : length - 1]
            total -= float(
                log_softmax(logits.astype(np.float64), axis=-1)[np.arange(length - 1), tokens[1:length]].sum()
            )
            count += length - 1
    return float(np.exp(total / count))


@dataclass(frozen=True)
class Network:
    """A model, its data and its score."""

    file: str
    calibration: Callable[[], Iterator[Feeds]]
    score: Callable[[Any], float]
    unit: str
    timed: Feeds


NETWORKS = {
    "minilm": Network(
        "minilm_l6.onnx", sentences, spearman, "Spearman",
        {name: np.ones((1, 40), np.int64) for name in ("input_ids", "attention_mask")},
    ),
    "stories": Network(
        "stories260k.onnx", stories, perplexity, "perplexity", {"input_ids": np.ones((1, 256), np.int64)}
    ),
}  # fmt: skip


def sizes(model: Any) -> tuple[int, int]:
    """Parameters: all, and those of tables that Gather reads along axis 0."""
    floats = {k: v for k, v in model.graph.initializers.items() if v.const_value.dtype.is_floating_point()}
    tables = {n.inputs[0].name for n in model.graph if n.op_type == "Gather" and n.inputs[0].name in floats}
    return sum(v.const_value.size for v in floats.values()), sum(floats[t].const_value.size for t in tables)


def by_onnxsim(python: str, network: Network, wanted: int, method: str, folder: Path) -> Any:
    """The model as onnxsim's pruner leaves it, with at most `wanted` parameters; None where it does not get there."""
    feeds = list(network.calibration())
    np.savez(folder / "calibration.npz", **{f"{i}|{k}": v for i, f in enumerate(feeds) for k, v in f.items()})
    script = Path(__file__).with_name("peer_onnxsim_budget.py")
    source, target = DATA / "models" / network.file, folder / f"{method}.onnx"
    command = [python, str(script), str(source), str(folder / "calibration.npz"), str(wanted), method, str(target)]
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    return graphopt.load(target) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--params", nargs="*", type=float, default=[0.9, 0.8, 0.7], help="of the encoder's parameters")
    parser.add_argument("--latency", nargs="*", type=float, default=[], help="of the dense model's time")
    parser.add_argument("--options", nargs="+", default=list(WAYS), help="options of prune beside the budget")
    parser.add_argument("--onnxsim", metavar="PYTHON", help="interpreter of an environment with onnxsim")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measured rounds")
    given = parser.parse_args()
    target = registry.target(given.target)
    for name in given.networks:
        network = NETWORKS[name]
        dense = graphopt.load(DATA / "models" / network.file)
        whole, tables = sizes(dense)
        rows: list[tuple[str, Any, float]] = [("as it came", dense, 0.0)]
        budgets = [f"params={(share * (whole - tables) + tables) / whole:.4f}" for share in given.params]
        budgets += [f"latency={share}" for share in given.latency]
        for budget in budgets:
            for way in given.options:
                chain = f"fold,prune{{{','.join(p for p in (budget, way) if p)}}}"
                start = time.process_time()
                result = graphopt.optimize(
                    dense, chain, target=target, calib=network.calibration, bench=False, verify_each="structure"
                )
                rows.append((f"`{chain}`", result.model, time.process_time() - start))
                print(f"{name} {chain}: {network.score(result.model):.4f}", file=sys.stderr, flush=True)
        if given.onnxsim:
            with tempfile.TemporaryDirectory() as folder:
                for share in given.params:
                    for method in ("l2", "wanda"):
                        wanted = int(share * (whole - tables)) + tables
                        found = by_onnxsim(given.onnxsim, network, wanted, method, Path(folder))
                        if found is not None:
                            rows.append((f"onnxsim, {method}", found, 0.0))
        backend = registry.backend(target.backend)
        models = [model for _, model, _ in rows]
        ratios = backend.bench(models, target, network.timed, threads=1, seconds=given.seconds).ratios
        print(
            f"\n| {name} | parameters of the encoder | {network.unit} | latency | processor s |\n|---|---|---|---|---|"
        )
        for (text, model, seconds), ratio in zip(rows, ratios, strict=True):
            every, looked_up = sizes(model)
            share = (every - looked_up) / (whole - tables)
            print(f"| {text} | {share:.3f} | {network.score(model):.4f} | {ratio:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
