"""Compare `fold,quantize` with the static quantisation of onnxruntime.quantization and of NNCF: accuracy and latency.

    python tools/bench/quantization.py --data ../shared/data --models resnet20_cifar10,resnet56_cifar10 \
        --nncf-python /path/to/venv-with-nncf/bin/python --out table.md

Every tool gets the same unlabelled training images; accuracy is top-1 on the test images; latencies are taken in one
process, interleaved in alternating order, and given as medians of the per-round ratios to the float model. NNCF has
dependencies of its own, so it runs in its own environment; without `--nncf-python` it is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NNCF_SCRIPT = """
import sys, numpy as np, onnx, nncf
source, data, out, preset = sys.argv[1:]
model = onnx.load(source)
name = model.graph.input[0].name
images = np.load(data)["x"]
feeds = [{name: images[i:i + 1]} for i in range(min(300, len(images)))]
kind = nncf.QuantizationPreset.MIXED if preset == "mixed" else nncf.QuantizationPreset.PERFORMANCE
onnx.save(nncf.quantize(model, nncf.Dataset(feeds), preset=kind, subset_size=len(feeds)), out)
"""


def images(data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Normalised CIFAR-10 images (N, 3, 32, 32) and labels."""
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
    with np.load(data / "cifar10" / f"{split}.npz") as stored:
        return (stored["images"].astype(np.float32) / 255 - mean) / std, stored["labels"]


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(path: Path, x: np.ndarray, labels: np.ndarray) -> float:
    s = session(path)
    name = s.get_inputs()[0].name
    right = sum(
        int((s.run(None, {name: x[i : i + 250]})[0].argmax(1) == labels[i : i + 250]).sum())
        for i in range(0, len(x), 250)
    )
    return right / len(x)


def latencies(paths: list[Path], feeds: np.ndarray, rounds: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """Median milliseconds, and median of the ratios to the first model, of each model."""
    sessions = [session(p) for p in paths]
    names = [s.get_inputs()[0].name for s in sessions]
    for s, name in zip(sessions, names, strict=True):
        for _ in range(5):
            s.run(None, {name: feeds})
    times = np.zeros((rounds, len(paths)))
    for r in range(rounds):
        order = list(range(len(paths)))[:: 1 if r % 2 == 0 else -1]
        for i in order:
            each = []
            for _ in range(inner):
                start = time.perf_counter()
                sessions[i].run(None, {names[i]: feeds})
                each.append(time.perf_counter() - start)
            times[r, i] = np.median(each)
    return np.median(times, axis=0) * 1e3, np.median(times / times[:, :1], axis=0)


def ours(source: Path, calib: np.ndarray, out: Path, options: str) -> None:
    import graphopt

    passes = f"fold,quantize{{{options}}}"
    graphopt.optimize(source, passes=passes, target="cpu", calib={_input(source): calib}).save(out)


def _input(source: Path) -> str:
    return str(session(source).get_inputs()[0].name)


def onnxruntime_static(source: Path, calib: np.ndarray, out: Path, *, per_channel: bool, activation: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            name = _input(source)
            self.feeds: Iterator[dict[str, np.ndarray]] = iter(
                {name: calib[i : i + 32]} for i in range(0, min(256, len(calib)), 32)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    kinds = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
    quantize_static(
        str(source), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=kinds[activation], weight_type=QuantType.QInt8,
    )  # fmt: skip


def nncf(python: Path, source: Path, calib: np.ndarray, out: Path, preset: str) -> None:
    data = out.with_suffix(".npz")
    np.savez(data, x=calib)
    subprocess.run([str(python), "-c", NNCF_SCRIPT, str(source), str(data), str(out), preset], check=True)
    data.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", default="resnet20_cifar10,resnet56_cifar10")
    parser.add_argument("--nncf-python", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/quantization"), help="folder for the models made")
    parser.add_argument("--out", type=Path, help="file for the table; it is printed in any case")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--test-images", type=int, default=10000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    calib, _ = images(args.data, "train2048")
    x, labels = images(args.data, "test")
    x, labels = x[: args.test_images], labels[: args.test_images]
    lines = ["| model | variant | top-1 % | bytes | batch 1 ms | ratio | batch 32 ratio |", "|---" * 7 + "|"]
    for model in args.models.split(","):
        source = args.data / "models" / f"{model}.onnx"
        variants = {"float32": source}

        def made(name: str, model: str = model, variants: dict[str, Path] = variants) -> Path:
            path = args.work / f"{model}.{name.replace(' ', '-')}.onnx"
            variants[name] = path
            return path

        for ranges in ("auto", "minmax", "mse", "percentile"):
            ours(source, calib, made(f"graphopt {ranges}"), f"ranges={ranges}")
        for activation, per_channel in (("u8", False), ("u8", True), ("s8", True)):
            out = made(f"onnxruntime {activation.upper()}S8 per {'channel' if per_channel else 'tensor'}")
            onnxruntime_static(source, calib, out, per_channel=per_channel, activation=activation)
        if args.nncf_python:
            for preset in ("performance", "mixed"):
                nncf(args.nncf_python, source, calib, made(f"nncf {preset}"), preset)
        paths = list(variants.values())
        one, ratio = latencies(paths, x[:1], args.rounds, 30)
        _, ratio32 = latencies(paths, x[:32], max(3, args.rounds // 3), 3)
        for (name, path), ms, r, r32 in zip(variants.items(), one, ratio, ratio32, strict=True):
            top1 = 100 * accuracy(path, x, labels)
            lines.append(f"| {model} | {name} | {top1:.2f} | {path.stat().st_size} | {ms:.3f} | {r:.3f} | {r32:.3f} |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
