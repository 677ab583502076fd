"""The engine of a bundle on a machine that has TensorRT: built and run by our own copies of scripts and runner."""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.backends.texts import text
from graphopt.errors import MissingBackendError

if TYPE_CHECKING:
    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array

SCRIPTS = {
    "build_engine.sh": "tensorrt_build.txt",
    "bench.sh": "tensorrt_bench.txt",
    "trt_common.sh": "tensorrt_common.txt",
    "run.py": "tensorrt_run.txt",
}
"""Files of a bundle, and where their text is."""


class EngineSession:
    """A bundle's engine in a folder of its own, removed with the session.

    Args:
        bundle: checked.
        runner: the module of `run.py`, set up for `folder`.
        folder: holds model, scripts and, once built, the engine.
    """

    def __init__(self, bundle: Bundle, runner: types.ModuleType, folder: Path) -> None:
        self._manifest, self._folder = bundle.manifest, folder
        try:
            self._model = runner.open_model(bundle.manifest)
        except SystemExit as stopped:
            shutil.rmtree(folder, ignore_errors=True)
            raise MissingBackendError(
                f"the engine could not be built or loaded (exit code {stopped.code}; the reason is above)",
                where=f"target {bundle.target.name!r}", hint="run build_engine.sh in the bundle, and read build.log",
            ) from stopped  # fmt: skip

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in the types that the model declares.

        Raises:
            DataError: a feed is missing, unknown, or has a wrong type or shape.
        """
        import numpy as np

        from graphopt.executor import TensorSpec, check_feeds

        specs = [TensorSpec(v["name"], np.dtype(v["dtype"]), tuple(v["shape"])) for v in self._manifest["inputs"]]
        check_feeds(feeds, specs)
        found = self._model.run(dict(feeds))
        kinds = {v["name"]: np.dtype(v["dtype"]) for v in self._manifest["outputs"]}
        return {name: np.asarray(found[name]).astype(kind, copy=False) for name, kind in kinds.items()}

    def close(self) -> None:
        """Remove the engine."""
        shutil.rmtree(self._folder, ignore_errors=True)


def runner_module(folder: Path) -> types.ModuleType:
    """The module of run.py, our own text, for a folder."""
    module = types.ModuleType("graphopt_tensorrt_run")
    module.__file__ = str(folder / "run.py")
    exec(compile(text(SCRIPTS["run.py"]), "tensorrt_run.txt", "exec"), module.__dict__)
    return module


def has_trtexec() -> bool:
    """Whether trtexec is where build_engine.sh looks for it."""
    return any(
        shutil.which(name)
        for name in (os.environ.get("TRTEXEC", ""), "trtexec", "/usr/src/tensorrt/bin/trtexec")
        if name
    )
