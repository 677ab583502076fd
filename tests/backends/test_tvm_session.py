"""The runtime's threads are those that were asked for, whatever the environment says."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("tvm_ffi", reason="needs the extra 'tvm'")

SCRIPT = """
from graphopt.backends.tvm_session import load_runtime, set_threads
load_runtime()
import tvm_ffi
for count in (3, 1, 2):
    set_threads(count)
    print(tvm_ffi.get_global_func("runtime.NumThreads")())
"""


def test_threads_are_neither_those_of_the_environment_nor_half_of_the_processors() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["3", "1", "2"]
