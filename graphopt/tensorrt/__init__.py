"""What TensorRT asks of an ONNX file, checked without it: every rule that the file alone can break."""

from __future__ import annotations

from graphopt.tensorrt.findings import Finding
from graphopt.tensorrt.validate import validate

__all__ = ["Finding", "validate"]
