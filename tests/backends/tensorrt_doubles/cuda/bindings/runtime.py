"""The calls of the CUDA runtime that run.py makes, on memory of this process; leaks and wild addresses are errors."""

from __future__ import annotations

import atexit
import ctypes
import os

MEMORY: dict[int, ctypes.Array] = {}


class cudaMemcpyKind:
    cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost = 1, 2


def cudaStreamCreate() -> tuple[int, int]:
    return 0, 7


def cudaStreamSynchronize(stream: int) -> tuple[int]:
    return (0 if stream == 7 else 400,)


def cudaMalloc(size: int) -> tuple[int, int]:
    if size <= 0:
        return 1, 0
    buffer = ctypes.create_string_buffer(size)
    MEMORY[ctypes.addressof(buffer)] = buffer
    return 0, ctypes.addressof(buffer)


def cudaFree(address: int) -> tuple[int]:
    return (0 if MEMORY.pop(address, None) is not None else 1,)


def cudaMemcpy(target: int, source: int, size: int, kind: int) -> tuple[int]:
    device = target if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if len(MEMORY[device]) < size:
        return (1,)
    ctypes.memmove(target, source, size)
    return (0,)


def cudaMemcpyAsync(target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
    return cudaMemcpy(target, source, size, kind)


def _leaks() -> None:
    if MEMORY and not os.environ.get("DOUBLE_MAY_LEAK"):
        print(f"leaked {len(MEMORY)} buffers", flush=True)
        os._exit(99)


atexit.register(_leaks)
