"""A compiled TVM module behind names and numpy arrays. It needs TVM's runtime, not its compiler."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import DataError, ModelError

if TYPE_CHECKING:
    from graphopt.data.feeds import Array
    from graphopt.executor import TensorSpec

ALIGNMENT = 64
"""Bytes: kernels load whole vectors and take for granted that arrays begin where one can."""

CPU, POOLED = 1, 2
"""Codes of the runtime: DLPack's number of processors, and the allocator that keeps memory between runs."""


class TvmSession:
    """A module on the processor of this machine.

    Args:
        module: what `relax` compiled, loaded.
        inputs: of the model, in its order.
        outputs: names, in the model's order.
        threads: that kernels may be split over; the pool belongs to the process, and the last session that ran sets it.
    """

    def __init__(self, module: Any, inputs: Sequence[TensorSpec], outputs: Sequence[str], threads: int = 1) -> None:
        self.inputs, self.output_names = list(inputs), list(outputs)
        self._threads = threads
        machine = module["vm_load_executable"]()
        machine["vm_initialization"](CPU, 0, POOLED)
        self._module, self._machine = module, machine
        self._main = machine["main"]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            DataError: a feed is missing, unknown, or has a wrong type or shape, or the model fails on these values.
        """
        call = self.ready(feeds)
        try:
            found = flat(call())
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"the compiled model fails on these inputs: {str(error).strip().splitlines()[-1]}",
                hint="give inputs of the sizes that the model was lowered for",
            ) from error
        return {name: np.from_dlpack(value).copy() for name, value in zip(self.output_names, found, strict=True)}

    def ready(self, feeds: Mapping[str, Array]) -> Callable[[], Any]:
        """One run on these feeds without the checks and copies of `run`, for timing.

        Raises:
            DataError: a feed is missing, unknown, or has a wrong type or shape.
        """
        import tvm_ffi

        from graphopt.executor import check_feeds

        check_feeds(feeds, self.inputs)
        arrays = [aligned(np.asarray(feeds[spec.name], dtype=spec.dtype)) for spec in self.inputs]
        tensors = [tvm_ffi.from_dlpack(array) for array in arrays]
        set_threads(self._threads)
        main = self._main
        return lambda: main(*tensors)


def loaded(library: Path) -> Any:
    """A module from a shared object; the runtime is loaded first.

    Raises:
        ModelError: it is no library of this machine.
    """
    import tvm_ffi

    load_runtime()
    try:
        return tvm_ffi.load_module(str(library))
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"cannot be loaded: {str(error).strip().splitlines()[-1]}", where=str(library),
            hint="lower the model again on this machine",
        ) from error  # fmt: skip


@functools.cache
def load_runtime() -> None:
    """Load TVM's runtime, where `import tvm` has not done so; threads stay where the system puts them."""
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    importlib.import_module("tvm_ffi")  # the runtime library needs its library
    spec = importlib.util.find_spec("tvm")
    assert spec is not None and spec.origin is not None, "checked by the backend's `unavailable`"
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)


def set_threads(count: int) -> None:
    """Threads of the pool that all modules of the process share.

    Without a list of processors the runtime asks the system for their number again at each parallel loop, some ten
    microseconds of it, and takes half of them at most. The list is counted alone: TVM_BIND_THREADS is 0.
    """
    import tvm_ffi

    tvm_ffi.get_global_func("runtime.config_threadpool")(0, count, [str(number) for number in range(count)])


def aligned(array: Array) -> Array:
    """A copy whose first element stands where vectors can be loaded."""
    space = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    made = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def flat(value: Any) -> list[Any]:
    """The tensors of a result, which is one, or a tuple of them."""
    import tvm_ffi

    return [value] if isinstance(value, tvm_ffi.Tensor) else [tensor for part in value for tensor in flat(part)]
