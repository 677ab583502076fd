"""What other tools make of a model: onnxruntime.quantization here, NNCF in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from metrics import Feeds, Subject, limited

SAMPLES = 256
"""Calibration samples that each tool sees."""

OPSET = 13
"""Per-channel scales and NNCF need it."""

NNCF_SCRIPT = """
import sys, numpy as np, onnx, nncf
source, data, out, kind = sys.argv[1:]
model = onnx.load(source)
if kind == "weights":
    onnx.save(nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM), out)
else:
    stored = np.load(data)
    count = 1 + max(int(key.split("|")[0]) for key in stored.files)
    feeds = [{k.split("|", 1)[1]: stored[k] for k in stored.files if k.split("|")[0] == str(i)} for i in range(count)]
    more = {"model_type": nncf.ModelType.TRANSFORMER} if kind == "transformer" else {}
    preset = nncf.QuantizationPreset.MIXED if kind == "mixed" else nncf.QuantizationPreset.PERFORMANCE
    dataset = nncf.Dataset(feeds)
    onnx.save(nncf.quantize(model, dataset, preset=preset, subset_size=len(feeds), **more), out)
"""


class Make(Protocol):
    """Writes a quantised model, or raises."""

    def __call__(self, source: Path, out: Path) -> None:
        """Quantise `source` into `out`."""


def peers(subject: Subject, transformer: bool, nncf_python: Path | None) -> dict[str, Make]:
    """Every scheme of the other tools for a model, by name; ranges are of extremes, which are their defaults."""
    made: dict[str, Make] = {}
    for channel in (True, False):
        per = f"per {'channel' if channel else 'tensor'}"
        made[f"onnxruntime static U8S8 {per}"] = partial(_static, subject, channel, None)
        if transformer:
            made[f"onnxruntime static U8S8 {per}, MatMul"] = partial(_static, subject, channel, ["MatMul"])
        made[f"onnxruntime dynamic S8 {per}"] = partial(_dynamic, channel)
    if transformer:
        made["onnxruntime 8-bit weights, blocks of 32"] = partial(_weights, 8, 32, True)
        made["onnxruntime 4-bit weights, blocks of 32"] = partial(_weights, 4, 32, True)
        made["onnxruntime 4-bit weights, blocks of 16, asymmetric"] = partial(_weights, 4, 16, False)
    if nncf_python is not None:
        kinds = ["transformer"] if transformer else ["performance", "mixed"]
        for kind in (*kinds, "weights"):
            made[f"NNCF {'8-bit weights' if kind == 'weights' else f'static, {kind}'}"] = partial(
                _nncf, nncf_python, subject, kind
            )
    return made


def _static(subject: Subject, per_channel: bool, ops: list[str] | None, source: Path, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls: Iterator[Feeds] = limited(subject.calibration(), SAMPLES)

        def get_next(self) -> Feeds | None:
            return next(self.calls, None)

    quantize_static(
        str(_prepared(source, out)), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=ops,
    )  # fmt: skip


def _dynamic(per_channel: bool, source: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(_prepared(source, out)), str(out), per_channel=per_channel, weight_type=QuantType.QInt8)


def _weights(bits: int, block: int, symmetric: bool, source: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, accuracy_level=4, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(_prepared(source, out)), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def _prepared(source: Path, out: Path) -> Path:
    """The model as the tools want it: in opset 13, and after the preprocessing that onnxruntime.quantization advises.

    What fails is left out, and said so. Shapes of the preprocessing go: stale ones make dynamic quantisation fail.
    """
    import onnx
    import onnx.version_converter
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = out.with_name(f"{source.stem}.prepared.onnx")
    if path.is_file():
        return path
    model = onnx.load(source)
    try:
        if _opset(source) < OPSET:
            model = onnx.version_converter.convert_version(model, OPSET)
        onnx.save(model, path)
        # A path: of a model in memory it makes one that refers to a file, and then loses that file.
        quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
        model = onnx.load(path)
    except Exception as error:
        print(f"{source.stem}: not preprocessed for onnxruntime.quantization: {_first_line(error)}", file=sys.stderr)
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def _nncf(python: Path, subject: Subject, kind: str, source: Path, out: Path) -> None:
    calls: Iterable[Feeds] = limited(subject.calibration(), SAMPLES) if kind != "weights" else ()
    # NNCF reads one sample a call.
    single = [
        {k: v[i : i + 1] for k, v in call.items()} if _rows(call) else call for call in calls for i in _each(call)
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "calls.npz"
        np.savez(data, **{f"{i}|{k}": v for i, call in enumerate(single) for k, v in call.items()})
        command = [
            str(python),
            "-c",
            NNCF_SCRIPT,
            str(_prepared(source, out) if _opset(source) < OPSET else source),
            str(data),
            str(out),
            kind,
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")


def _opset(source: Path) -> int:
    import onnx

    imports = onnx.load(source, load_external_data=False).opset_import
    return int(next(entry.version for entry in imports if entry.domain in ("", "ai.onnx")))


def _rows(call: Feeds) -> bool:
    """Whether all inputs have samples along axis 0."""
    return len({np.shape(v)[:1] for v in call.values()}) == 1 and all(np.ndim(v) > 1 for v in call.values())


def _each(call: Feeds) -> range:
    return range(len(next(iter(call.values()))) if _rows(call) else 1)


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
