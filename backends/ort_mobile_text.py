"""What bundles for phones tell their readers."""

from __future__ import annotations

ABOUT = {
    "model.ort": "the model in ONNX Runtime's own format",
    "model.onnx": "the model, portable ONNX",
    "required_operators.config": "operators and types that the model needs, for a reduced build of ONNX Runtime",
    "delegates.txt": "what the delegates take of the model, what they refuse and why, and what would help",
    "delegates.json": "the same for programs",
    "main.cc": "runs the model with ONNX Runtime's C++ interface",
    "npz.h": "reads and writes .npz files for main.cc",
    "settings.h": "file and execution provider for main.cc",
    "CMakeLists.txt": "builds main.cc",
    "run.py": "runs the model on ONNX Runtime's own kernels where there is a Python, on arm64 Linux for instance",
    "bench.py": "times the model as run.py runs it",
    "bench.sh": "times the runner on a phone by adb",
}

ABOUT_CONTEXT = "compiled for Hexagon: context.onnx is loaded in place of the model, from the same folder"

QNN_LICENCE = "Qualcomm's compiler made the context: read the licence of onnxruntime-qnn before you hand it on."
