"""graphopt: a compiler for trained neural networks.

    import graphopt
    result = graphopt.optimize("model.onnx", "fold,quantize", calib="calibration.npz")
    result.save("out/")

Names are loaded when first used, so that `import graphopt` costs nothing.
"""

from __future__ import annotations

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# Python that is started in the root of a checkout finds ./graphopt first, and passes/ and backends/ are not in there:
# they are in the link tree of the editable install, which is further down the path.
__path__ = extend_path(__path__, __name__)

_HOMES = {
    "api": ("Result", "optimize"),
    "backend": ("Backend", "BenchResult"),
    "base": ("Context", "Effect", "Pass", "PassResult", "Skip", "option"),
    "errors": (
        "DataError",
        "GateRefused",
        "GraphoptError",
        "MissingBackendError",
        "ModelError",
        "PassFailure",
        "UsageError",
        "VerificationError",
    ),
    "fx.from_torch": ("from_torch",),
    "fx.prune_module": ("PrunedModule", "prune_module"),
    "fx.to_torch": ("to_torch", "update_weights"),
    "inspection": ("Inspection", "inspect"),
    "jobs": ("bench", "compare", "compare_layers", "lower", "run"),
    "manager": ("PassManager",),
    "model": ("load", "save"),
    "pipeline.instruments": ("Instrument",),
    "pipeline.recipe": ("Recipe", "read_recipe", "write_recipe"),
    "report.data": ("Report",),
    "spec": ("parse", "to_spec"),
    "target": ("QuantScheme", "Target"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from graphopt.api import Result as Result
    from graphopt.api import optimize as optimize
    from graphopt.backend import Backend as Backend
    from graphopt.backend import BenchResult as BenchResult
    from graphopt.base import Context as Context
    from graphopt.base import Effect as Effect
    from graphopt.base import Pass as Pass
    from graphopt.base import PassResult as PassResult
    from graphopt.base import Skip as Skip
    from graphopt.base import option as option
    from graphopt.errors import DataError as DataError
    from graphopt.errors import GateRefused as GateRefused
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.errors import MissingBackendError as MissingBackendError
    from graphopt.errors import ModelError as ModelError
    from graphopt.errors import PassFailure as PassFailure
    from graphopt.errors import UsageError as UsageError
    from graphopt.errors import VerificationError as VerificationError
    from graphopt.fx.from_torch import from_torch as from_torch
    from graphopt.fx.prune_module import PrunedModule as PrunedModule
    from graphopt.fx.prune_module import prune_module as prune_module
    from graphopt.fx.to_torch import to_torch as to_torch
    from graphopt.fx.to_torch import update_weights as update_weights
    from graphopt.inspection import Inspection as Inspection
    from graphopt.inspection import inspect as inspect
    from graphopt.jobs import bench as bench
    from graphopt.jobs import compare as compare
    from graphopt.jobs import compare_layers as compare_layers
    from graphopt.jobs import lower as lower
    from graphopt.jobs import run as run
    from graphopt.manager import PassManager as PassManager
    from graphopt.model import load as load
    from graphopt.model import save as save
    from graphopt.pipeline.instruments import Instrument as Instrument
    from graphopt.pipeline.recipe import Recipe as Recipe
    from graphopt.pipeline.recipe import read_recipe as read_recipe
    from graphopt.pipeline.recipe import write_recipe as write_recipe
    from graphopt.report.data import Report as Report
    from graphopt.spec import parse as parse
    from graphopt.spec import to_spec as to_spec
    from graphopt.target import QuantScheme as QuantScheme
    from graphopt.target import Target as Target


def __getattr__(name: str) -> Any:
    """Load a public name, or the version, when it is first asked for."""
    import importlib

    if name == "__version__":
        from graphopt.version import version

        return version()
    if name not in _HOME_OF:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"graphopt.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF, "__version__"])
