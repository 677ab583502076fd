"""Accuracy, size and latency of pruned ResNets, all variants of one network interleaved in one measurement.

    python tools/bench/pruning.py                       both networks, MACs 0.9, 0.7, 0.5, with and without int8
    python tools/bench/pruning.py resnet20 --macs 0.5 --options 'score=l2' 'reconstruct=mean' 'multiple=1'

2048 unlabelled training images calibrate, all 10,000 test images measure. Latency: one thread, batch 1 and batch 32,
medians of paired rounds, as ratios to the model as it came. GRAPHOPT_DATA names the folder of the data.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from cifar import DATA, images

import graphopt
from graphopt import registry
from graphopt.analysis.cost import model_stats
from graphopt.executor import Session


def top1(model: Any, x: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    with Session(model, optimize=True) as session:
        name = session.inputs[0].name
        found = [next(iter(session.run({name: x[i : i + 250]}).values())).argmax(1) for i in range(0, len(x), 250)]
    return float((np.concatenate(found) == labels).mean())


def chains(shares: list[float], options: list[str]) -> list[tuple[str, ...]]:
    """Pipelines as steps that share their beginnings."""
    found: list[tuple[str, ...]] = [("fold",), ("fold", "quantize")]
    for share in shares:
        for extra in options:
            prune = f"prune{{macs={share}{',' + extra if extra else ''}}}"
            found += [("fold", prune), ("fold", prune, "quantize")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.9, 0.7, 0.5])
    parser.add_argument("--options", nargs="+", default=[""], help="options of prune beside macs, one variant each")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measured rounds per batch size")
    given = parser.parse_args()
    calibration, _ = images("train2048")
    x, labels = images("test")
    target = registry.target(given.target)
    for network in given.networks:
        path = DATA / "models" / f"{network}_cifar10.onnx"
        dense = graphopt.load(path)
        name = dense.graph.inputs[0].name or ""
        rows: list[tuple[str, float, float, float, float]] = [("as it came", 1.0, 1.0, top1(dense, x, labels), 0.0)]
        models = [dense]
        made: dict[tuple[str, ...], tuple[Any, float]] = {(): (dense, 0.0)}
        before = model_stats(dense)
        for chain in chains(given.macs, given.options):
            for length in range(1, len(chain) + 1):
                if chain[:length] not in made:
                    model, spent = made[chain[: length - 1]]
                    start = time.process_time()
                    result = graphopt.optimize(
                        model, chain[length - 1], target=target, calib={name: calibration}, bench=False,
                        verify_each="structure",
                    )  # fmt: skip
                    made[chain[:length]] = (result.model, spent + time.process_time() - start)
            model, spent = made[chain]
            after = model_stats(model)
            share, size = (after.macs or 0) / (before.macs or 1), after.bytes / before.bytes
            rows.append((",".join(chain), share, size, top1(model, x, labels), spent))
            models.append(model)
            print(f"{network} {rows[-1][0]}: {100 * rows[-1][3]:.2f} %, {spent:.0f} s of processor time", flush=True)
        backend = registry.backend(target.backend)
        ratios = [
            backend.bench(models, target, {name: x[:batch]}, threads=1, seconds=given.seconds).ratios
            for batch in (1, 32)
        ]
        print(f"\n| {network} | MACs | bytes | top-1 % | latency, batch 1 | batch 32 | processor s |")
        print("|---|---|---|---|---|---|---|")
        for (pipeline, share, size, accuracy, seconds), one, many in zip(rows, *ratios, strict=True):
            print(
                f"| `{pipeline}` | {share:.3f} | {size:.3f} | {100 * accuracy:.2f} | {one:.3f} | {many:.3f} "
                f"| {seconds:.0f} |"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
