"""Names of ONNX tensors as names of torch parameters, and back.

'layer.0.weight' becomes the parameter `weight` of a module `0` of a module `layer`, so that `state_dict` has the ONNX
names. Names that this cannot express are escaped as in URLs: a name that is also the beginning of another ('a' beside
'a.b'), empty parts ('a..b'), parts that every torch module has as attributes ('type', 'forward').
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote


def onnx_name(name: str) -> str:
    """The ONNX name of a parameter or buffer of a module that `to_torch` made."""
    return unquote(name)


def torch_names(names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """torch names for ONNX names.

    Args:
        names: ONNX names, all different.
        taken: attributes that modules have already.
    """
    attributes = set(taken)
    wanted = {name: _escaped(name, attributes) for name in names}
    folders = {name.rsplit(".", count)[0] for name in wanted.values() for count in range(1, name.count(".") + 1)}
    return {name: _last_escaped(target) if target in folders else target for name, target in wanted.items()}


def _escaped(name: str, attributes: set[str]) -> str:
    name = name.replace("%", "%25")
    parts = name.split(".")
    if not all(parts):
        return name.replace(".", "%2E")
    return ".".join(_first_escaped(part) if part in attributes else part for part in parts)


def _last_escaped(name: str) -> str:
    *folders, leaf = name.split(".")
    return ".".join([*folders, _first_escaped(leaf)])


def _first_escaped(part: str) -> str:
    return f"%{ord(part[0]):02X}{part[1:]}"
