"""The architecture zoo: small networks of every family in use, built with torch and exported to ONNX."""

from __future__ import annotations

from zoo import (
    attentive,
    convolutional,
    decoders,
    detection,
    generative,
    image_to_image,
    language,
    mixers,
    mobile,
    recurrent,
    signals,
    vision_transformers,
)
from zoo.architecture import Architecture

FAMILIES = (
    attentive,
    convolutional,
    decoders,
    mobile,
    image_to_image,
    detection,
    vision_transformers,
    language,
    recurrent,
    mixers,
    generative,
    signals,
)

ZOO: dict[str, Architecture] = {
    architecture.name: architecture for family in FAMILIES for architecture in family.ARCHITECTURES
}
"""Every architecture by its name."""
