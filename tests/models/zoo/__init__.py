"""The architecture zoo: small networks of every family in use, built with torch and exported to ONNX."""

from __future__ import annotations

from zoo import convolutional, language, mobile, recurrent, vision_transformers
from zoo.architecture import Architecture

FAMILIES = (convolutional, mobile, vision_transformers, language, recurrent)

ZOO: dict[str, Architecture] = {
    architecture.name: architecture for family in FAMILIES for architecture in family.ARCHITECTURES
}
"""Every architecture by its name."""
